"""The head in plain torch, tuned for CPUs: tiles of logits, their sums and their gradients."""
