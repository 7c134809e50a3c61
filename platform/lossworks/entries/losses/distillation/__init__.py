"""Losses that train a model to say what a teacher says."""
