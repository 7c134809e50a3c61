"""The catalogue: what losses, methods and analyses there are, and what they declare; read without torch."""
