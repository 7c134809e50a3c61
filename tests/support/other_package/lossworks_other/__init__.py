"""Entries of another package than Lossworks."""
