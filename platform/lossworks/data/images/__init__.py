"""Images with a class for each pixel: drawn or read, split, and changed by chance at each visit."""
