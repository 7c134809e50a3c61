"""Training of models of text: next tokens, answers, preferences, what is to be forgotten, and sentences."""
