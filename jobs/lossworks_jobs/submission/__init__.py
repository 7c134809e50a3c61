"""Jobs: what is sent to a cluster's job server, and what runs there."""
