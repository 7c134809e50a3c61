"""What a person sees of a federation: progress, tables and pictures."""
