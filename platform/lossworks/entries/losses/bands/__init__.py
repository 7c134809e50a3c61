"""Losses of a sharpened band: against the coarse band, and against the panchromatic image."""
