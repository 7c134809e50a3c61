"""Trained weights: what a run begins from, which of them it trains, and what it gives away."""
