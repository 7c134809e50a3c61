"""The entries, one file a loss or close family; ``lossworks.losses.document`` finds them here."""
