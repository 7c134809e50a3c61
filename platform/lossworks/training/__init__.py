"""Training: one plain-torch loop, its sharding, checkpoints and measures."""
