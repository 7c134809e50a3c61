"""Searches of losses and their hyperparameters: what is searched, how, and what is shown of it."""
