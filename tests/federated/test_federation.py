"""Whole federations: faults, what is measured, what is kept, tracking, privacy and the command."""

import json
import logging
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict

from lossworks.cli import main
from lossworks.errors import RunError, UserError
from lossworks.metrics.intervals import MeanInterval
from lossworks.tensors import load_tensors
from lossworks.tracking import read_all
from lossworks_federated.client.client_memory import Moment, keep, recall
from lossworks_federated.client.faults import FAULTS, fault_of
from lossworks_federated.engines.cohort_grid import CohortGrid
from lossworks_federated.federate import federate
from lossworks_federated.server.accountant import noise_over_sensitivity
from lossworks_federated.server.measures import drift, spread
from lossworks_federated.server.rounds import FederationOutcome, RoundFiles
from lossworks_federated.shared_setup import SharedSetup
from lossworks_federated.spec_parts import FaultSpec, PrivacySpec
from lossworks_federated.specs import FederationSpec
from lossworks_federated.strategies.catalogue import ASYNCHRONOUS
from lossworks_federated.strategies.catalogue import strategies as catalogue
from lossworks_federated.strategies.interface import OwnTest
from lossworks_testing.federation import difference, equal, rounds_of, setup_of, tiny, trained

logging.getLogger("flwr").setLevel(logging.ERROR)


COMMAND = "import sys; from lossworks.cli import main; sys.exit(main())"


def rows_of(path: Path) -> list[dict[str, float]]:
    return [row["metrics"] for row in read_all(path / "child" / "metrics.jsonl")]


# Faults


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("drop_out", "failed"),
        ("straggle", "late"),
        ("nan", "nonfinite"),
        ("shape", "shape"),
        ("empty", "empty"),
    ],
)
def test_faulty_replies_are_left_out_and_counted(fault: str, reason: str, tmp_path: Path) -> None:
    spec = tiny(faults={fault: 0.4}, rounds=4)
    seed = spec.seeds[0]
    expected = [
        sum(fault_of(spec.faults, seed, number, client) == fault for client in range(6))
        for number in range(1, 5)
    ]
    assert 0 < sum(expected) < 24
    model = trained(spec, tmp_path)
    rows = rows_of(tmp_path)[1:]
    assert [row[f"round/{reason}"] for row in rows] == expected
    assert [row["round/usable"] for row in rows] == [6 - lost for lost in expected]
    assert all(value.isfinite().all() for value in model.values())


def test_a_round_is_what_its_usable_replies_make_it(tmp_path: Path) -> None:
    spec = tiny(faults={"nan_clients": [0, 3]}, rounds=1)
    rounds = rounds_of(spec, tmp_path)
    rounds.run()
    received, origin = rounds.strategy.received, rounds.strategy.origin
    assert received.partitions == (1, 2, 4, 5)
    assert received.refused == {"nonfinite": (0, 3)}
    p = received.examples / received.examples.sum()
    after = load_tensors(tmp_path / "child" / "model.safetensors")
    for name, updates in received.updates.items():
        expected = origin[name] + torch.tensordot(p, updates.double(), dims=1)
        torch.testing.assert_close(after[name].double(), expected, rtol=0, atol=1e-6)


def test_too_few_replies_end_the_run_with_the_last_model_saved(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"0 usable replies of 6.*says 'fault: dropped out'"):
        trained(tiny(faults={"drop_out": 1.0}), tmp_path)
    outcome = FederationOutcome.read(tmp_path / "child" / "outcome.json")
    assert (outcome.status, outcome.rounds) == ("failed", 0)
    assert equal(load_tensors(tmp_path / "child" / "model.safetensors"), setup_of(tiny()).initial)
    with pytest.raises(RunError, match=r"5 usable replies of 6, fewer than min_replies=6 \(NaN or infinity"):
        trained(tiny(faults={"nan_clients": [2]}, min_replies=6), tmp_path / "strict")


def test_liars_are_refused_by_a_guard_and_outvoted_by_a_median(tmp_path: Path) -> None:
    guard = {"largest_norm": 5.0, "least_cosine": 0.0}
    split = {"kind": "iid", "clients": 10}
    changes = {"split": split, "faults": {"sign_flip_clients": [7]}, "rounds": 2}
    rounds = rounds_of(tiny(guard=guard, **changes), tmp_path / "guarded")
    rounds.run()
    assert rounds.strategy.received.refused == {"opposed": (7,)}
    honest = tiny(split=split, rounds=2)
    misled, robust = (trained(tiny(entry, **changes), tmp_path / entry) for entry in ("fedavg", "fedmedian"))
    right = trained(honest, tmp_path / "honest")
    assert difference(robust, right) < difference(misled, right)
    scaled = rounds_of(tiny(guard=guard, split=split, rounds=1, faults={"scale": 0.15}), tmp_path / "scaled")
    scaled.run()
    shouting = [c for c in range(10) if fault_of(FaultSpec(scale=0.15), 0, 1, c)]
    assert shouting
    assert scaled.strategy.received.refused == {"too_long": tuple(shouting)}


def test_faults_have_their_shares_and_repeat() -> None:
    spec = FaultSpec(drop_out=0.3, nan=0.2)
    drawn = [fault_of(spec, 0, number, client) for number in range(40) for client in range(100)]
    assert drawn == [fault_of(spec, 0, number, client) for number in range(40) for client in range(100)]
    assert abs(drawn.count("drop_out") / 4000 - 0.3) < 0.03
    assert abs(drawn.count("nan") / 4000 - 0.2) < 0.03
    assert {kind for kind in drawn if kind} <= set(FAULTS)


# Measures


def test_loss_terms_add_up_to_the_global_loss(tmp_path: Path) -> None:
    trained(tiny(), tmp_path)
    for row in rows_of(tmp_path)[1:]:
        terms = [row[f"terms/{name}"] for name in ("local", "shift", "aggregation")]
        assert sum(terms) == pytest.approx(row["terms/global"], abs=1e-12)
        assert row["terms/global"] == pytest.approx(row["server/cross_entropy"], abs=1e-5)


def test_local_loss_is_that_of_the_clients_own_models(tmp_path: Path) -> None:
    rounds = rounds_of(tiny(rounds=1), tmp_path)
    rounds.run()
    setup, received = rounds._setup, rounds.strategy.received
    total = 0.0
    for index, client in enumerate(received.partitions):
        rows = torch.from_numpy(setup.split.train[client])
        own = received.params(slice(index, index + 1))
        logits = setup.learner.model(own, setup.train.inputs[rows][None])[1][0]
        total += float(torch.nn.functional.cross_entropy(logits, setup.train.labels[rows], reduction="sum"))
    expected = total / float(received.examples.sum())
    assert rows_of(tmp_path)[1]["terms/local"] == pytest.approx(expected, rel=1e-5)


def test_drift_against_its_definition(tmp_path: Path) -> None:
    rounds = rounds_of(tiny("fedld", rounds=1), tmp_path)
    rounds.run()
    received, origin = rounds.strategy.received, rounds.strategy.origin
    new = load_tensors(tmp_path / "child" / "model.safetensors")
    found = drift(received, origin, new)
    g = torch.cat([value.flatten(1).double() for value in received.updates.values()], 1)
    p = received.examples / received.examples.sum()
    mean = p @ g
    applied = torch.cat([(new[name] - origin[name]).flatten().double() for name in received.updates])
    norms = g.norm(dim=1)
    expected = {
        "drift/norm": norms.mean(),
        "drift/disagreement": ((g - mean).square().sum(1).mean() / g.square().sum(1).mean()).sqrt(),
        "drift/cosine": (g @ mean / (norms * mean.norm())).mean(),
        "drift/applied_norm": applied.norm() / mean.norm(),
        "drift/applied_cosine": applied @ mean / (applied.norm() * mean.norm()),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=1e-4), name


def test_spread_over_clients() -> None:
    tested = {client: OwnTest(10 * (client + 1), {"accuracy": client / 20}) for client in range(20)}
    found = spread(tested, "accuracy", "max")
    assert found["clients/accuracy_worst10"] == pytest.approx(np.mean([0, 1 / 20]))
    assert found["clients/accuracy_mean"] == pytest.approx(np.mean(np.arange(20) / 20))
    assert found["clients/accuracy_min"] == 0
    assert found["clients/accuracy_weighted"] > found["clients/accuracy_mean"]
    assert spread({}, "accuracy", "max") == {}

    bits = {client: OwnTest(10, {"bits_per_byte": 1.0 + client}) for client in range(20)}
    found = spread(bits, "bits_per_byte", "min")
    assert found["clients/bits_per_byte_worst10"] == pytest.approx(19.5)
    assert found["clients/bits_per_byte_max"] == 20


def test_bytes_are_those_of_the_arrays(tmp_path: Path) -> None:
    size = 4 * sum(value.numel() for value in setup_of(tiny()).initial.values())
    for entry, down, up in (
        ("fedavg", 2 * 6, 2 * 6),
        ("scaffold", 4 * 6, 4 * 6),  # control variates both ways
        ("fedlex", 4 * 6 + 6, 2 * 6 + 6),  # the guidance, and the exploration
    ):
        trained(tiny(entry, rounds=2), tmp_path / entry)
        last = rows_of(tmp_path / entry)[-1]
        assert (last["bytes/down"] / size, last["bytes/up"] / size) == (down, up)


def test_rounds_that_are_not_measured_have_no_measures(tmp_path: Path) -> None:
    trained(tiny(rounds=5, measure={"every": 2, "clients": 3}), tmp_path)
    measured = ["server/accuracy" in row for row in rows_of(tmp_path)]
    assert measured == [True, False, True, False, True, True]
    assert all("train/loss" in row for row in rows_of(tmp_path)[1:])


def test_intervals_are_students() -> None:
    found = MeanInterval.of([1.0, 2.0, 3.0])
    assert found is not None
    assert found.value == 2.0
    assert found.half_width == pytest.approx(4.302653 / 3**0.5, rel=1e-6)  # t of 2 degrees, deviation 1
    assert MeanInterval.of([1.0]).half_width is None  # type: ignore[union-attr]
    assert MeanInterval.of([float("nan")]) is None


# What clients keep


def client(partition: int = 4, **config: str) -> Context:
    return Context(1, 1, {"partition-id": partition, **config}, RecordDict(), {})


def value(number: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"scaffold": {"w": torch.full((2,), float(number)), "a": torch.zeros(())}}


def recalled(one: Context, moment: Moment) -> float | None:
    found = recall([one], ["scaffold"], moment)[0]
    return float(found["scaffold"]["w"][0]) if found else None


@pytest.mark.parametrize("stored", [True, False])
def test_clients_recall_what_was_kept_before_a_round(stored: bool, tmp_path: Path) -> None:
    def moment(number: int, name: str = "run") -> Moment:
        return Moment(name, number, 2, tmp_path if stored else None)

    first = client()
    for number in range(1, 6):
        keep([first], [value(number)], moment(number), local=False)
    assert recalled(first, moment(6)) == 5
    if stored:
        # A new process, going on after the state that the server saved at round 4.
        assert recalled(client(), moment(5)) == 4
        assert recalled(client(5), moment(5)) is None
        with closing(sqlite3.connect(tmp_path / "run" / "clients.sqlite")) as database:
            rounds = database.execute("SELECT round FROM kept ORDER BY round").fetchall()
        assert rounds == [(4,), (5,)]  # what the server can go on from, and the newest
        # Round 3 again, after which nothing of the attempt that was stopped is left.
        keep([client()], [value(30)], moment(3), local=False)
        assert recalled(client(), moment(9)) == 30
    # The same node in another federation starts anew.
    assert recalled(first, moment(1, "other")) is None


def test_a_store_that_is_gone_is_said(tmp_path: Path) -> None:
    """But a node with a folder of its own may be asked in a later round for the first time."""
    assert recalled(client(), Moment("run", 1, 1, tmp_path)) is None
    with pytest.raises(RunError, match=r"clients\.sqlite is gone.*scaffold before round 2.*put it back"):
        recalled(client(), Moment("run", 2, 1, tmp_path))
    assert recalled(client(4, **{"state-folder": str(tmp_path)}), Moment("run", 2, 1, tmp_path)) is None


def test_a_federation_whose_clients_state_is_gone_does_not_go_on(tmp_path: Path) -> None:
    trained(tiny("scaffold", rounds=2), tmp_path)
    shutil.rmtree(tmp_path / "clients")
    with pytest.raises(RunError, match="is gone"):
        rounds_of(tiny("scaffold", rounds=3), tmp_path).run()
    trained(tiny("fedavg", rounds=2), tmp_path / "none")
    assert not list((tmp_path / "none" / "clients").glob("*"))  # which keeps nothing, and misses nothing
    trained(tiny("fedavg", rounds=3), tmp_path / "none")


def test_a_damaged_store_is_said(tmp_path: Path) -> None:
    trained(tiny("scaffold", rounds=1), tmp_path)
    (store,) = tmp_path.rglob("clients.sqlite")
    store.write_bytes(b"no database" * 1000)
    with pytest.raises(RunError, match=r"clients\.sqlite: what clients keep can't be read"):
        rounds_of(tiny("scaffold", rounds=2), tmp_path).run()


def test_what_clients_keep_is_not_in_memory_where_it_is_on_disk(tmp_path: Path) -> None:
    spec = tiny("scaffold", rounds=3)
    grids: list[CohortGrid] = []

    def grid(folder: Path | None) -> Callable[[SharedSetup], CohortGrid]:
        def made(setup: SharedSetup) -> CohortGrid:
            grids.append(CohortGrid(setup, folder))
            return grids[-1]

        return made

    on_disk = trained(spec, tmp_path / "disk", grid(tmp_path / "disk" / "clients"))
    in_memory = trained(spec, tmp_path / "memory", grid(None))
    assert difference(on_disk, in_memory) == 0
    assert [len(one._contexts) for one in grids] == [0, 6]


def test_a_federations_name_can_not_leave_the_folder(tmp_path: Path) -> None:
    keep([client()], [value(1)], Moment("../../elsewhere", 1, 1, tmp_path / "in"), local=False)
    assert [file.parent.parent.name for file in tmp_path.rglob("*.sqlite")] == ["in"]


# Privacy


def test_local_privacy_clips_and_adds_noise(tmp_path: Path) -> None:
    size = sum(value.numel() for value in setup_of(tiny()).initial.values())
    privacy = {"kind": "local", "clipping_norm": 0.5, "epsilon": 1e6, "delta": 1e-5}
    for entry in ("fedavg", {"name": "fedprox", "mu": 0.1}, "fedld", "moon"):
        rounds = rounds_of(tiny(entry, rounds=1, privacy=privacy), tmp_path / str(entry))
        rounds.run()
        norms = torch.cat([u.flatten(1) for u in rounds.strategy.received.updates.values()], 1).norm(dim=1)
        assert norms.max() < 0.5 + 1e-4 * size  # ε of a million is next to no noise
    loud = {**privacy, "epsilon": 10.0}
    rounds = rounds_of(tiny(rounds=1, privacy=loud), tmp_path / "loud")
    rounds.run()
    sigma = 2 * 0.5 * noise_over_sensitivity(PrivacySpec.model_validate(loud))
    norms = torch.cat([u.flatten(1) for u in rounds.strategy.received.updates.values()], 1).norm(dim=1)
    assert norms.mean() == pytest.approx(sigma * size**0.5, rel=0.1)


def test_central_privacy_adds_the_servers_noise(tmp_path: Path) -> None:
    privacy = {"kind": "central", "clipping_norm": 0.5, "noise_multiplier": 0.0}
    quiet = trained(tiny(rounds=1, privacy=privacy), tmp_path / "quiet")
    noisy = trained(tiny(rounds=1, privacy={**privacy, "noise_multiplier": 1.2}), tmp_path / "noisy")
    noise = torch.cat([(noisy[name] - quiet[name]).flatten() for name in quiet])
    assert float(noise.std()) == pytest.approx(1.2 * 0.5 / 6, rel=0.15)  # all six count alike


def test_central_noise_is_that_of_the_clients_that_answered(tmp_path: Path) -> None:
    """Of fewer clients each has a larger share, and hiding it takes more noise."""
    privacy = {"kind": "central", "clipping_norm": 0.5, "noise_multiplier": 1.2}
    spec = tiny(rounds=1, privacy=privacy, faults={"drop_out": 0.5}, seeds=[4])
    noisy_rounds = rounds_of(spec, tmp_path / "noisy")
    noisy_rounds.run()
    received = noisy_rounds.strategy.received
    quiet_privacy = {**privacy, "noise_multiplier": 0.0}
    quiet = trained(
        tiny(rounds=1, privacy=quiet_privacy, faults={"drop_out": 0.5}, seeds=[4]), tmp_path / "quiet"
    )
    noisy = load_tensors(tmp_path / "noisy" / "child" / "model.safetensors")
    noise = torch.cat([(noisy[name] - quiet[name]).flatten() for name in quiet])

    assert 0 < len(received.partitions) < 6
    assert float(noise.std()) == pytest.approx(1.2 * 0.5 / len(received.partitions), rel=0.15)


@pytest.mark.parametrize("kind", ["central", "local"])
@pytest.mark.parametrize(
    ("fault", "counted"),
    [
        ("drop_out", "failed"),
        ("straggle", "late"),
        ("empty", "empty"),
        ("shape", "failed"),
        ("nan", "nonfinite"),
    ],
)
def test_privacy_and_faulty_clients_go_together(kind: str, fault: str, counted: str, tmp_path: Path) -> None:
    """What a faulty client sends is left out for what it is; nothing unclipped is used, and nothing ends."""
    spec = tiny(rounds=2, privacy={"kind": kind}, faults={fault: 0.4})
    outcome = rounds_of(spec, tmp_path).run()
    rows = [row["metrics"] for row in read_all(tmp_path / "child" / "metrics.jsonl") if row["step"]]

    assert outcome.status == "finished"
    assert sum(row[f"round/{counted}"] for row in rows) > 0
    for row in rows:
        others = sum(value for name, value in row.items() if name.startswith("round/")) - row["round/asked"]
        assert others == row["round/asked"]  # each reply is used, or counted once


def test_a_round_without_a_usable_reply_says_so_under_privacy(tmp_path: Path) -> None:
    spec = tiny(rounds=2, privacy={"kind": "central"}, faults={"drop_out": 1.0})
    with pytest.raises(RunError, match=r"round 1: 0 usable replies of 6.*an error in place of a reply"):
        rounds_of(spec, tmp_path).run()


def test_figures_that_were_recorded_before_a_kill_are_in_the_outcome(tmp_path: Path) -> None:
    """The last state is saved, and the process is gone before the outcome is written."""
    spec = tiny(rounds=3)
    whole = rounds_of(spec, tmp_path).run()
    (tmp_path / "child" / "outcome.json").unlink()
    again = rounds_of(spec, tmp_path).run()

    assert again.rounds == 3
    assert again.metrics == whole.metrics


@pytest.mark.parametrize(
    ("entry", "kind", "why"),
    [
        ("fedld", "secagg", "individual updates"),
        ("fedld", "central", "aggregates otherwise"),
        ("fedadam", "central", "aggregates otherwise"),
        ("scaffold", "local", "further arrays"),
        ({"name": "fedprox", "also": ["fedlex"]}, "central", "further arrays"),
    ],
)
def test_privacy_that_can_not_be_had_is_refused(entry: object, kind: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        tiny(entry, privacy=kind)


# The run and the command


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOSSWORKS_HOME", str(home))
    return home


def test_a_comparison_is_tracked_as_parent_and_children(at_home: Path) -> None:
    from mlflow import MlflowClient

    spec = tiny().model_copy(update={"name": "compared"})
    changes = {"strategies": ["fedavg", "fedld"], "seeds": [0, 1], "measure": {"personalise": 1}}
    spec = FederationSpec.parse({**spec.model_dump(mode="json"), **changes})
    result = federate(spec)
    client = MlflowClient(tracking_uri=f"sqlite:///{at_home / 'mlflow.db'}")
    parent = client.get_run(result.folder.run_id)
    assert parent.info.status == "FINISHED"
    found = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    names = {run.info.run_name for run in found}
    assert names == {f"{title}, seed {seed}" for title in ("fedavg", "fedld (paper)") for seed in (0, 1)}
    for run in found:
        points = client.get_metric_history(run.info.run_id, "server/accuracy")
        assert sorted(point.step for point in points) == [0, 1, 2, 3]
        files = {item.path for item in client.list_artifacts(run.info.run_id)}
        assert {"clients.parquet", "personalised.parquet"} <= files
        assert {"model.safetensors", "outcome.json", "spec.yaml"} <= files
    files = {item.path for item in client.list_artifacts(parent.info.run_id)}
    pictures = {"comparison.png", "comparison.svg", "split-seed0.png", "split-seed1.png"}
    pictures |= {f"clients-seed{seed}.{form}" for seed in (0, 1) for form in ("png", "svg")}
    assert pictures | {"comparison.csv", "spec.yaml"} <= files
    assert {path.name for path in result.pictures} == pictures
    mean = result.comparison.mean("fedavg", "accuracy")
    assert mean is not None
    assert mean.count == 2


def test_one_strategy_that_fails_does_not_stop_the_others(at_home: Path) -> None:
    del at_home
    values = {**tiny().model_dump(mode="json"), "min_replies": 6, "faults": {"nan_clients": [0]}}
    values |= {"strategies": ["fedavg", "fedmedian"], "rounds": 1}
    result = federate(FederationSpec.parse(values))
    assert [title for title, _ in result.failed] == ["fedavg, seed 0", "fedmedian, seed 0"]


def write_spec(path: Path, **changes: object) -> Path:
    file = path / "spec.yaml"
    values = {**json.loads(tiny().model_dump_json()), **changes}
    file.write_text(json.dumps(values))  # JSON is YAML
    return file


# A command that is killed when it has journaled round 5 and not yet saved it.
KILLED = """
import os, signal, sys
from lossworks.cli import main
from lossworks.tracking import Journal

class Killed(Journal):
    def write(self, step, metrics):
        super().write(step, metrics)
        if step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

import lossworks_federated.server.rounds as rounds
rounds.Journal = Killed
sys.exit(main())
"""


def test_a_killed_run_goes_on_to_the_same_result(at_home: Path, tmp_path: Path) -> None:
    """From the state of round 4, through round 5 once more: clients and journal know that one already."""
    changes = {"strategies": ["scaffold"], "clients_per_round": 4, "rounds": 8, "checkpoint_every": 2}
    file = write_spec(tmp_path, **changes, name="killed")
    whole = federate(FederationSpec.read(file))
    before = set((at_home / "runs").iterdir())
    command = [sys.executable, "-c", KILLED, "federate", str(file)]
    killed = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (folder,) = set((at_home / "runs").iterdir()) - before
    (child,) = folder.glob("*/states")
    assert RoundFiles(child.parent).rounds_done() == 4
    assert [row["step"] for row in read_all(child.parent / "metrics.jsonl")] == [0, 1, 2, 3, 4, 5]
    assert main(["federate", "--resume", str(folder)]) == 0
    models = [next(path.rglob("model.safetensors")) for path in (folder, whole.folder.path)]
    assert equal(*(load_tensors(model) for model in models))
    curves = [read_all(next(path.rglob("metrics.jsonl"))) for path in (folder, whole.folder.path)]
    accuracies = [[(row["step"], row["metrics"]["server/accuracy"]) for row in rows] for rows in curves]
    assert accuracies[0] == accuracies[1]
    assert [step for step, _ in accuracies[0]] == list(range(9))


def test_the_command_prints_a_table(
    at_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del at_home
    measure = {"target": 0.2, "personalise": 1}
    file = write_spec(tmp_path, measure=measure, rounds=2)
    assert main(["federate", str(file), "strategies=[fedavg,{name: fedld, rho: 0.5}]"]) == 0
    out = capsys.readouterr().out
    told = ("fedld (paper) rho=0.5", "held-out accuracy", "worst tenth", "rounds to 0.2", "round 2/2")
    for text in (
        *told,
        "worst clients: fedavg: ",
        "fine-tuned by each client for 1 epoch",
        "clients helped",
    ):
        assert text in out


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["strategies=[fedavg,fedavg]"], "twice"),
        (["strategies=[fedagv]"], "no such strategy; did you mean fedavg?\n"),
        (["strategies=[]"], "strategies=[]: give at least 1"),
        (["split.clients=5000"], "need"),
        (["privacy=secagg"], "secure aggregation"),
        (["model.dropout=0.5"], "dropout"),
        (["loss=eisl"], "can't train"),
        (["faults.straggle=0.5", "engine=flower"], "deadline_s"),
        (["min_replies=7"], "more than the clients"),
        (["clients_per_round=7"], "there are only split.clients=6 to draw from"),
        (["strategies=[scaffold]", "local.momentum=0.5"], "scaffold needs"),
        (["split=natural"], "data.owner"),
        (["seeds=[1,1]"], "same seed twice"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    overrides: list[str], says: str, tmp_path: Path, at_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = at_home / "runs"
    before = set(runs.iterdir()) if runs.is_dir() else set()
    assert main(["federate", str(write_spec(tmp_path)), *overrides]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert (set(runs.iterdir()) if runs.is_dir() else set()) == before


def test_resume_refuses_what_is_no_federation(
    at_home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del at_home
    (tmp_path / "spec.yaml").write_text("kind: training\ntask: classification\n")
    assert main(["federate", "--resume", str(tmp_path)]) == 2
    assert "describes a training, which `lossworks train` runs and resumes" in capsys.readouterr().err
    assert main(["federate", "--resume", str(tmp_path), "rounds=3"]) == 2
    write_spec(tmp_path)
    for command in ("report", "sync"):
        assert main([command, str(tmp_path)]) == 2
        assert "describes a federation" in capsys.readouterr().err


def test_natural_owners_become_clients(at_home: Path, tmp_path: Path) -> None:
    del at_home
    stream = np.random.default_rng(0)
    owners = np.array([f"site-{index % 7}" for index in range(210)])
    labels = stream.integers(0, 3, 210)
    x = stream.normal(size=(210, 5)) + labels[:, None]
    np.savez(tmp_path / "sites.npz", x=x, y=labels, site=owners)
    data = {"source": f"npz:{tmp_path / 'sites.npz'}", "owner": "site"}
    spec = tiny(data=data, split={"kind": "natural", "clients": 7, "min_size": 2})
    setup = setup_of(spec)
    owners = setup.kind.row_owners()
    assert owners is not None
    for client in range(7):
        mine = {
            setup.kind.row_owners()[row] for row in (*setup.split.train[client], *setup.split.test[client])
        }
        assert mine == {f"site-{client}"}
    fewer = setup_of(tiny(data=data, split={"kind": "natural", "clients": 3, "min_size": 2}))
    assert [len(set(fewer.kind.row_owners()[rows])) for rows in fewer.split.train] == [1, 1, 1]
    assert len(fewer.split.left_out) == 4
    with pytest.raises(UserError, match="7 owners"):
        setup_of(tiny(data=data, split={"kind": "natural", "clients": 8, "min_size": 2}))
    trained(spec, tmp_path / "run")


SIMULATED = ["fedavg", "scaffold", {"name": "fedlex", "explore_epochs": 1}]


@pytest.mark.parametrize(
    ("strategies", "more"),
    [
        (SIMULATED, {}),
        (
            [
                name
                for name, one in sorted(catalogue().items())
                if name not in ("fedavg", "scaffold") and ASYNCHRONOUS not in one.flags
            ],
            {},
        ),
        (["fedavg", "moon"], {"updates": {"kind": "top-k", "share": 0.1}}),
        (["fedavg"], {"updates": {"kind": "quantised", "bits": 6}}),
    ],
    ids=["some", "the others", "top-k", "quantised"],
)
@pytest.mark.slow
def test_flowers_own_simulation_gives_the_same_models(
    strategies: list[object], more: dict[str, object], at_home: Path, tmp_path: Path
) -> None:
    """In a process of its own: Flower shuts Ray down at the end, and other tests use it."""
    split = {"kind": "dirichlet", "clients": 4, "alpha": 0.5}
    changes = {"strategies": strategies, "rounds": 2, "split": split, "faults": {"nan_clients": [2]}, **more}
    changes |= {"devices": {"speed": {"uniform": {"low": 5, "high": 50}}}, "measure": {"personalise": 1}}
    file = write_spec(tmp_path, **changes)
    cohort = federate(FederationSpec.read(file)).folder.path
    before = set((at_home / "runs").iterdir())
    command = [sys.executable, "-c", COMMAND, "federate", str(file), "engine=flower"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    new = set((at_home / "runs").iterdir()) - before
    (flower,) = (
        folder for folder in new if (folder / "comparison.csv").exists()
    )  # the others are its models'
    models = [sorted(folder.glob("*/model.safetensors")) for folder in (cohort, flower)]
    assert [len(found) for found in models] == [len(strategies)] * 2
    for ours, theirs in zip(*models, strict=True):
        assert ours.parent.name == theirs.parent.name
        assert difference(load_tensors(ours), load_tensors(theirs)) < 1e-5
        outcomes = [FederationOutcome.read(model.with_name("outcome.json")) for model in (ours, theirs)]
        of_all = (
            {"virtual/seconds"} if "centralised" in ours.parent.name else {"virtual/seconds", "personal/mean"}
        )
        for figure in of_all:
            assert outcomes[0].metrics[figure] == pytest.approx(outcomes[1].metrics[figure])
