"""Losses by which a language model forgets some answers and keeps others."""
