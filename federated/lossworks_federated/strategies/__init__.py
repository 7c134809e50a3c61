"""Strategies: a file each, with what a client does and what the server does."""
