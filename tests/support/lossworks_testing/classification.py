"""A small classifier's run for tests."""

from typing import Any


def tiny(**changes: Any) -> dict[str, Any]:
    """Return a spec that trains in well under a second; ``changes`` replace whole fields."""
    values = {
        "task": "classification",
        "steps": 6,
        "batch_size": 30,
        "workers": 1,
        "sharding": {"kind": "none"},
        "data": {"source": "wine"},
        "model": {"width": 16},
        "optimizer": {"lr": 0.02},
        "evaluation": {"every": 3, "sequences": 1000},
        "checkpoint": {"every": 3},
        "tracking": {"model": False},
    }
    return {**values, **changes}
