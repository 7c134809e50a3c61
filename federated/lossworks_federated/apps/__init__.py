"""ClientApps of others: how they are offered and called, and how they do a strategy's part in clients."""
