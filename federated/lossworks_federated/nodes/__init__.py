"""Federations whose nodes have their own data: what a node does with them, and what all agree on first."""
