"""Studies: a claim, variants that are compared over seeds, and a verdict on what was expected of them."""
