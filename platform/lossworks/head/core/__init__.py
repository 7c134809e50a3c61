"""What every implementation of the head shares: the problem, its rows, its options, its losses."""
