"""A training run on Ray: its driver, its workers, and how it ends."""
