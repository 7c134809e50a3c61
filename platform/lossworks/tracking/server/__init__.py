"""MLflow's server for a team: its database, its users, its process."""
