"""Ways to train one spec, and whether they give one result."""
