"""What ``lossworks bench`` runs: figures side by side with the alternatives, in one run."""
