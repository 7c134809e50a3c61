"""Losses of classes: one label a row."""
