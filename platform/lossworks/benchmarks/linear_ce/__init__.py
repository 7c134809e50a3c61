"""``lossworks bench linear-ce``."""
