"""Ray clusters: joined, or started on this machine."""
