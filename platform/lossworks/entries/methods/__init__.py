"""Methods: procedures that change how training goes, or what follows it."""
