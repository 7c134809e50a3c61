"""Small runs of every task give the losses that are committed; a change that moves one has to explain it."""

import json

import pytest

from lossworks.tasks import task_slugs
from lossworks_testing.golden import FOLDER, SPECS, curve, names


@pytest.mark.parametrize("name", names())
def test_a_run_gives_its_golden_curve(name, tmp_path):
    """Up to the rounding in which processors differ, which grows over the steps."""
    golden = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    found = curve(name, tmp_path)

    assert found["losses"] == pytest.approx(golden["losses"], rel=1e-3)
    assert set(found["ends"]) == set(golden["ends"])
    for figure in ("eval/loss",):
        assert found["ends"][figure] == pytest.approx(golden["ends"][figure], rel=1e-2)


def test_every_task_has_one():
    """So that a new task brings its own."""
    # A teacher of other tokens has to be trained first.
    without = {"cross-tokenizer"}
    assert {spec["task"] for spec in SPECS.values()} | {"language-model"} | without == set(task_slugs())
