"""Strategies that take in each reply as it arrives; clients start and arrive in virtual time."""
