"""The audit of losses, and its command."""
