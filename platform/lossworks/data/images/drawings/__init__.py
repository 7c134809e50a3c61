"""Images that are drawn with their masks, each kind in a file."""
