"""What the server does: rounds, which replies count, what is measured, a federation as a run."""
