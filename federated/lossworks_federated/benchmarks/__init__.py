"""``lossworks bench federated``."""
