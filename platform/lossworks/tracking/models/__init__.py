"""Trained models in MLflow, and the code that it keeps with them to run them."""
