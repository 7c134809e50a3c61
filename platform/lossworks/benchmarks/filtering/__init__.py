"""``lossworks bench filtering``."""
