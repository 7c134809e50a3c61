"""Ray Train actors and Ray Jobs submission: lossworks train and what it starts."""
