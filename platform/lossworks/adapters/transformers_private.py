"""transformers besides its documented interface: which implementation of attention a model has."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """Have a model of transformers form its attention probabilities inside, and be as it was afterwards."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
