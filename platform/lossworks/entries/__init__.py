"""The entries of the catalogue, one file a paper or close family: losses, methods and analyses."""
