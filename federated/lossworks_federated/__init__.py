"""The room for Flower apps, strategies and the splits they learn from."""
