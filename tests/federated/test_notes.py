"""What goes wrong without ending a run is said: tests that fail, and explorers that can't be used."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from flwr.app import Error, Message, MessageType
from rich.console import Console

from lossworks_federated.engines.cohort_grid import CohortGrid
from lossworks_federated.records import CONFIG
from lossworks_federated.reporting.federation_summary import FederationDisplay
from lossworks_federated.server.rounds import FederationOutcome
from lossworks_testing.federation import rounds_of, tiny


class Failing(CohortGrid):
    """Answers some instructions by an error."""

    tests = explorers = 0

    def _group(self, kind: str, group: list[Message]) -> list[Message]:
        explores = kind == MessageType.TRAIN and not group[0].content.config_records[CONFIG]["server-round"]
        failing = self.tests if kind == MessageType.EVALUATE else self.explorers if explores else 0
        errors = [Message(Error(2, "no memory"), reply_to=message) for message in group[:failing]]
        return errors + (super()._group(kind, group[failing:]) if group[failing:] else [])


def noted(path: Path, strategy: Any, **failing: int) -> tuple[str, ...]:
    class Grid(Failing):
        tests, explorers = failing.get("tests", 0), failing.get("explorers", 0)

    return rounds_of(tiny(strategy, rounds=2), path, Grid).run().notes


def test_tests_that_fail_are_said_once(tmp_path: Path) -> None:
    for failing in (1, 6):
        (note,) = noted(tmp_path / f"{failing}", "fedavg", tests=failing)
        assert note == (
            f"round 1: {failing} of 6 clients could not test the model, and count in no figure of clients; "
            "the first says 'no memory'"
        )
    assert FederationOutcome.read(tmp_path / "6" / "child" / "outcome.json").clients == {}


def test_explorers_that_are_left_out_are_said(tmp_path: Path) -> None:
    (some,) = noted(tmp_path / "some", "fedlex", explorers=2)
    assert some.startswith("exploration: the replies of 2 of 6 explorers are left out (an error in place of")
    assert "no memory" in some
    assert "guidance" not in some
    (none,) = noted(tmp_path / "none", "fedlex", explorers=6)
    assert none.endswith("; without any, clients train without guidance")
    assert noted(tmp_path / "fine", "fedlex") == ()


def test_a_run_that_goes_on_still_says_it(tmp_path: Path) -> None:
    class Grid(Failing):
        explorers = 6

    rounds_of(tiny("fedlex", rounds=1), tmp_path, Grid).run()
    assert len(rounds_of(tiny("fedlex", rounds=2), tmp_path).run().notes) == 1


def test_a_person_sees_it() -> None:
    console = Console(file=io.StringIO(), width=200)
    outcome = FederationOutcome("finished", 2, "", {}, {}, notes=("round 1: 6 of 6 clients failed",))
    display = FederationDisplay(2, console)
    for _ in range(2):  # two strategies, of which the same is to be said
        display.end(cast("Any", SimpleNamespace(outcome=outcome)))
    assert console.file.getvalue() == "round 1: 6 of 6 clients failed\n"  # type: ignore[attr-defined]
