"""The head as operators that torch differentiates and compiles."""
