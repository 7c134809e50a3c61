"""What carries messages to clients: the cohort engine, Flower's simulation, a real federation."""
