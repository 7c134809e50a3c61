"""What a run will take, found out without data, workers or memory for it."""
