"""Sharded checkpoints, written and read."""
