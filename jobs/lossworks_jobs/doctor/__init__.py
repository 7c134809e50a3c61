"""``lossworks doctor``: what of this machine, its installation and its servers is as a run needs it."""
