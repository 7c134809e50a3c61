"""The flame graph of a profiled run."""
