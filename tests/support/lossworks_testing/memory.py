"""Peak memory of a call, for tests: the measure that the library reports."""

from lossworks.training.measure.memory import peak_bytes

__all__ = ["peak_bytes"]
