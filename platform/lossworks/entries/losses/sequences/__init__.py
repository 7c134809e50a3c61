"""Losses of whole sequences."""
