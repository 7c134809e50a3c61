"""The room for Ray Tune sweeps over the hyperparameters of losses."""
