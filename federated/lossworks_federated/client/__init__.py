"""What clients do: local training, what they keep between rounds, the faults put into their replies."""
