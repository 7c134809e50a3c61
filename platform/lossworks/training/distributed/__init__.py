"""How processes train together: their place among each other, and how a model is spread over them."""
