"""The global model beside what clients make of it by fine-tuning it on their own examples."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message

from lossworks.errors import RunError
from lossworks.files import hidden_beside
from lossworks.tasks.interface import Mode
from lossworks_federated.records import METRICS


@dataclass(frozen=True)
class PersonalTest:
    """A client's tests of the global model, and of that model fine-tuned on its own training examples.

    Attributes:
        client: Its number.
        test_examples: On how many it tested both.
        figure: Of the global model, in which clients are compared.
        loss: Of the global model; NaN where it is not known.
        personal_figure: After fine-tuning.
        personal_loss: After fine-tuning.
    """

    client: int
    test_examples: int
    figure: float
    loss: float
    personal_figure: float
    personal_loss: float


def personal_tests(
    replies: Iterable[Message], partition_of: Callable[[int], int], name: str
) -> list[PersonalTest]:
    """Return the tests in replies, sorted by client; clients without test examples have none.

    Args:
        replies: To an instruction to personalise.
        partition_of: Gives the client of a node.
        name: Of the figure in which clients are compared.
    """
    found = []
    for reply in replies:
        told: Any = {} if reply.has_error() else reply.content.metric_records.get(METRICS, {})
        if told.get("num-examples") and {name, f"personal-{name}"} <= set(told):
            found.append(
                PersonalTest(
                    partition_of(reply.metadata.src_node_id),
                    int(told["num-examples"]),
                    *(
                        float(told.get(one, math.nan))
                        for one in (name, "loss", f"personal-{name}", "personal-loss")
                    ),
                )
            )
    return sorted(found, key=lambda one: one.client)


def personal_spread(tests: list[PersonalTest], best: Mode) -> dict[str, float]:
    """Return how clients fare with models of their own.

    Args:
        tests: Of all clients that have tested.
        best: Which figures are better.

    Returns:
        ``mean`` and ``worst10``, the mean of the worst tenth (at least one), after fine-tuning; ``gain``, the
        mean of what it changes, above 0 where it helps; ``helped`` and ``hurt``, how many clients have a
        better and a worse figure; nothing if no client has tested.
    """
    if not tests:
        return {}
    before, after = (
        np.array([getattr(one, name) for one in tests]) for name in ("figure", "personal_figure")
    )
    sign = 1.0 if best == "max" else -1.0
    gains = sign * (after - before)
    found = {
        "mean": after.mean(),
        "worst10": sign * np.sort(sign * after)[: max(1, round(0.1 * len(after)))].mean(),
        "gain": gains.mean(),
        "helped": (gains > 0).sum(),
        "hurt": (gains < 0).sum(),
    }
    return {f"personal/{name}": float(value) for name, value in found.items()}


def write_personal_tests(file: Path, tests: list[PersonalTest], name: str) -> None:
    """Write a row a client as Parquet, in one piece; the figure's columns bear its name.

    Raises:
        RunError: It can't be written.
    """
    import pyarrow as pa
    from pyarrow import parquet

    columns = {
        one.name.replace("figure", name): [getattr(test, one.name) for test in tests]
        for one in fields(PersonalTest)
    }
    partial = hidden_beside(file)
    try:
        parquet.write_table(pa.table(columns), partial, compression="zstd")
        partial.replace(file)
    except OSError as error:
        raise RunError(f"{file}: can't be written: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)
