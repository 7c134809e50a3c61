"""The parts of specs that tasks bring: which data are read, and by what model."""
