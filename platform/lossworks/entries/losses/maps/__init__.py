"""Losses of whole maps, against the masks of images."""
