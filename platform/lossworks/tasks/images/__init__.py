"""Tasks whose answers are images: a class or a value for each pixel."""
