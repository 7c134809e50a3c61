"""Nodes with their own data: what they agree on, that nothing else is read, and that nothing is pooled."""

import csv
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lossworks.data.learnt import Learnt
from lossworks.data.standardise import Standardisation
from lossworks.errors import RunError, UserError
from lossworks.runs import RunFolder
from lossworks.tensors import load_tensors
from lossworks.tracking import read_all
from lossworks_federated.client.client_app import client_app
from lossworks_federated.engines.sequential_grid import SequentialGrid
from lossworks_federated.federate import FederationResult, federate
from lossworks_federated.loopback import main as loopback
from lossworks_federated.nodes.agreement import agree, merged, standardisation_of
from lossworks_federated.nodes.own_data import facts_of, own_setup, sums_of
from lossworks_federated.specs import FederationSpec, StrategySpec
from lossworks_federated.strategies.catalogue import strategy
from lossworks_testing.federation import difference, equal, tiny

logging.getLogger("flwr").setLevel(logging.ERROR)
SIZES = (40, 25, 60)


def write_sites(folder: Path, **changes: Any) -> list[str]:
    """Write a table a site, whose sizes, classes, scales and categories differ, and return their sources."""
    stream = np.random.default_rng(0)
    sources = []
    for site, size in enumerate(SIZES):
        labels = stream.integers(0, 3, size) if site else np.zeros(size, dtype=int)
        rows = [
            {
                "age": f"{1e6 + 10 * site + label + stream.normal():.6f}",
                "dose": "" if stream.random() < 0.1 else f"{label - stream.normal():.6f}",
                "ward": ("north", "south", f"site-{site}")[stream.integers(0, 3)],
                "label": f"kind-{label}",
            }
            for label in labels
        ]
        path = folder / f"site-{site}.csv"
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({**row, **changes.get(path.stem, {})} for row in rows)
        sources.append(f"csv:{path}")
    return sources


def of_nodes(strategy: Any = "fedavg", **changes: Any) -> FederationSpec:
    split = {"kind": "nodes", "clients": 3}
    values = {"split": split, "data": {}, "local": {"epochs": 2, "batch_size": 8, "lr": 0.05}, "rounds": 3}
    return tiny(strategy, **{**values, **changes})


def grid_of(sources: list[str | None], folder: Path | None = None, **how: Any) -> SequentialGrid:
    configs = [{} if source is None else {"data": source} for source in sources]
    return SequentialGrid(client_app(folder, **how), len(sources), node_configs=configs)


def agreed(spec: FederationSpec, sources: list[str]) -> dict[str, Any]:
    task = spec.told(StrategySpec(), 0)
    return dict(agree(grid_of(sources), task, spec.nodes, 60.0).facts)


def pooled(sources: list[str], folder: Path) -> str:
    """Write one table of all sites, with whose each row is."""
    rows = []
    for site, source in enumerate(sources):
        with Path(source.removeprefix("csv:")).open() as file:
            rows += [{**row, "site": f"{site}"} for row in csv.DictReader(file)]
    with (folder / "all.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return f"csv:{folder / 'all.csv'}"


def test_nodes_agree_on_what_all_of_their_data_hold(tmp_path: Path) -> None:
    """One node has one class alone; categories of one are features of all; the scale is the pooled data's."""
    sources = write_sites(tmp_path)
    facts = agreed(of_nodes(), sources)

    assert facts["classes"] == ["kind-0", "kind-1", "kind-2"]
    ward = next(column for column in facts["columns"] if column["name"] == "ward")
    assert ward["categories"] == ["north", "site-0", "site-1", "site-2", "south"]
    everything = pooled(sources, tmp_path)
    task = of_nodes().told(StrategySpec(), 0)
    found = sums_of(task, everything, {**facts, "standardisation": None})
    with_columns = np.sqrt(found["squares"] / found["count"])
    assert facts["standardisation"]["mean"] == pytest.approx(found["mean"].tolist(), rel=1e-12)
    assert facts["standardisation"]["deviation"] == pytest.approx(with_columns.tolist(), rel=1e-9)


def test_what_is_constant_at_each_node_is_a_feature_if_nodes_differ(tmp_path: Path) -> None:
    """One that is the same everywhere is none; a site with many wards does not hide those of the others."""
    wards = {"site-0": {"ward": "a"}, "site-1": {"ward": "b"}, "site-2": {"ward": "b"}}
    alike = {site: {"ward": "a"} for site in wards}
    for changes, categories in (
        (wards, ["a", "b"]),
        (alike, None),
        ({"site-0": {"ward": "a"}}, ["a", "north", "site-1", "site-2", "south"]),
    ):
        sources = write_sites(tmp_path, **changes)
        facts = agreed(of_nodes(), sources)
        found = {column["name"]: column["categories"] for column in facts["columns"]}

        assert found.get("ward") == categories
        setups = [
            own_setup(of_nodes().told(StrategySpec(), 0).model_dump_json(), json.dumps(facts), source, place)
            for place, source in enumerate(sources)
        ]
        assert {setup.train.batch(np.arange(1))["inputs"].shape[1] for setup in setups} == set(facts["shape"])


def test_the_scale_of_sums_is_that_of_all_values() -> None:
    """In float64, around a mean that is large beside the deviation; unknown cells count nowhere."""
    stream = np.random.default_rng(0)
    parts = [1e8 + stream.normal(size=(n, 4)) * [1, 2, 0, 3] for n in (5, 1, 40)]
    parts[0][0, 0] = np.nan
    parts[1][0, 3] = np.nan
    sums = []
    for part in parts:
        count = np.isfinite(part).sum(0).astype(float)
        mean = np.nansum(part, 0) / np.maximum(count, 1)
        sums.append({"count": count, "mean": mean, "squares": np.nansum((part - mean) ** 2, 0)})
    found, expected = standardisation_of(sums), Standardisation.of(np.concatenate(parts))

    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-14)
    np.testing.assert_allclose(found.deviation, expected.deviation, rtol=1e-6)
    assert found.deviation[2] == 1


def test_a_node_trains_on_its_own_examples_in_the_order_of_the_federation_s_classes(tmp_path: Path) -> None:
    sources = write_sites(tmp_path)
    spec = of_nodes()
    facts, task = agreed(spec, sources), spec.told(StrategySpec(), 0)
    setup = own_setup(task.model_dump_json(), json.dumps(facts), sources[2], 2)

    assert [len(rows) for rows in setup.split.train] == [0, 0, 48]
    assert len(setup.split.test[2]) == 12
    assert len(setup.train.inputs) == SIZES[2]
    with Path(sources[2].removeprefix("csv:")).open() as file:
        labels = [int(row["label"][-1]) for row in csv.DictReader(file)]
    assert setup.train.labels.tolist() == labels
    assert setup.learner is not None
    alone = own_setup(task.model_dump_json(), json.dumps(facts), sources[0], 0)
    assert equal(alone.initial, setup.initial)


def run(spec: FederationSpec, folder: Path, sources: list[str], **how: Any) -> FederationResult:
    return federate(spec, grid=grid_of(sources, folder / "clients", **how))


def test_a_federation_of_nodes_is_that_of_the_same_examples_in_one_place(tmp_path: Path) -> None:
    """FedAvg of one full batch: gradient descent on all training examples, computed from the pooled table."""
    sources = write_sites(tmp_path)
    split = {"kind": "nodes", "clients": 3, "test_fraction": 0.0}
    spec = of_nodes(split=split, local={"epochs": 1, "batch_size": 10_000, "lr": 0.1}, rounds=4)
    result = run(spec, tmp_path, sources)
    model = load_tensors(next(result.folder.path.glob("*/model.safetensors")))

    learnt = Learnt.read(result.folder.path / "learnt", "it")
    assert learnt is not None
    data = pooled(sources, tmp_path)
    task = spec.told(StrategySpec(), 0)
    one = own_setup(task.model_dump_json(), json.dumps(dict(learnt.facts)), data, 0)
    weights = {name: value.clone().requires_grad_() for name, value in one.initial.items()}
    for _ in range(4):
        _, logits = one.learner.model(
            {name: value[None] for name, value in weights.items()}, one.train.inputs[None]
        )
        loss = one.learner.loss(logits[0], one.train.labels).mean()
        slopes = torch.autograd.grad(loss, list(weights.values()))
        weights = {
            name: (value - 0.1 * slope).detach().requires_grad_()
            for (name, value), slope in zip(weights.items(), slopes, strict=True)
        }
    assert difference(model, {name: value.detach() for name, value in weights.items()}) < 1e-5


def test_a_federation_of_nodes_goes_on(tmp_path: Path) -> None:
    """SCAFFOLD keeps its control variates at the nodes; the second time nobody is asked what it has."""
    sources = write_sites(tmp_path)
    spec = of_nodes("scaffold", rounds=4)
    whole = run(spec, tmp_path / "whole", sources)
    rows = [row["metrics"] for row in read_all(next(whole.folder.path.glob("*/metrics.jsonl")))]
    assert "server/accuracy" not in rows[-1]
    assert 0 < rows[-1]["clients/accuracy_weighted"] <= 1
    assert rows[-1]["train/loss"] < rows[1]["train/loss"]

    before = set(whole.folder.path.parent.iterdir())
    cut = grid_of(sources, tmp_path / "cut" / "clients")
    answers, trained = cut.answers, []

    def stopped(messages: Any) -> Any:
        trained.extend(messages if messages[0].metadata.message_type == "train" else [])
        if len(trained) > 2 * len(sources):
            raise KeyboardInterrupt
        return answers(messages)

    cut.answers = stopped  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        federate(spec, grid=cut)
    (folder,) = set(whole.folder.path.parent.iterdir()) - before
    again = grid_of(sources, tmp_path / "cut" / "clients")
    answers, asked_for = again.answers, []

    def seen(messages: Any) -> Any:
        asked_for.extend(message.metadata.message_type for message in messages)
        return answers(messages)

    again.answers = seen  # type: ignore[method-assign]
    result = federate(spec, grid=again, resume=RunFolder.find(folder.name))
    models = [load_tensors(next(one.glob("*/model.safetensors"))) for one in (whole.folder.path, folder)]
    assert equal(*models)
    assert set(asked_for) == {"train", "evaluate"}
    assert not result.failed


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"data": {"source": "csv:x.csv"}},
            "data.source=csv:x.csv: with split.kind=nodes each node has its own",
        ),
        ({"data": {"label_noise": 0.1}}, "data.label_noise=0.1: with split.kind=nodes"),
        ({"nodes": {"mean": [1.0]}}, "mean and deviation are given together"),
        ({"nodes": {"mean": [1.0], "deviation": [1.0, 2.0]}}, "1 means and 2 deviations"),
        ({"nodes": {"mean": [1.0], "deviation": [0.0]}}, "deviation"),
        ({"split": {"kind": "nodes", "clients": 3, "noise": 1.0}}, "split.noise=1"),
        (
            {"split": {"kind": "iid", "clients": 3}, "nodes": {"mean": [1.0], "deviation": [1.0]}},
            "for split.kind",
        ),
    ],
)
def test_specs_that_do_not_fit_own_data_are_refused(changes: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        of_nodes(**changes)


def test_own_data_need_nodes() -> None:
    with pytest.raises(UserError, match="the data are at the nodes of a deployed federation"):
        federate(of_nodes())


def asked(spec: FederationSpec, sources: list[str | None], **how: Any) -> str:
    """Return the first error among replies to an instruction to train."""
    from flwr.app import ConfigRecord

    from lossworks_federated.records import array_record
    from lossworks_federated.server.rounds import build_strategy

    grid = grid_of(sources, **how)
    plan = build_strategy(spec, StrategySpec(), spec.told(StrategySpec(), 0), learnt="{}")
    arrays = array_record({"w": torch.zeros(1)})
    replies = grid.send_and_receive(plan.configure_train(1, arrays, ConfigRecord(), grid))
    return next(iter(replies)).error.reason


def test_a_node_reads_what_its_own_configuration_names_and_nothing_else(tmp_path: Path) -> None:
    """The server names no file, unless the app is a simulation's; own data serve no other tasks."""
    source = write_sites(tmp_path)[1]
    named = tiny(data={"source": source}, split={"kind": "iid", "clients": 1})
    assert "a node reads only what its own configuration names as data" in asked(named, [None])
    assert "is no model of this client" in asked(named, [None], reads_paths=True)
    assert "which only tasks of split.kind=nodes train on" in asked(tiny(split={"clients": 1}), [source])
    mine = of_nodes(split={"kind": "nodes", "clients": 1})
    assert "names no data: start it with --node-config" in asked(mine, [None])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("missing", r"node 2 can't say what it has: data.source: .*no such file"),
        ("one class", "hold the class kind-0 alone"),
        (
            "kinds",
            "column 'age' is a .* at one node and a .* at another; say what it is with data.columns.age",
        ),
        ("columns", "a node's table has no column 'ward', which another's has; leave it out"),
        ("scale", r"nodes.mean has 1 numbers; the nodes' data have \d+ features"),
        ("number", "node 2 can't say what it has: .*is no"),
    ],
)
def test_nodes_that_do_not_fit_each_other_are_named(change: str, says: str, tmp_path: Path) -> None:
    sources = write_sites(tmp_path)
    spec = of_nodes()
    site = Path(sources[1].removeprefix("csv:"))
    if change == "missing":
        site.unlink()
    elif change == "one class":
        sources = sources[:1] * 3
    elif change == "kinds":
        lines = site.read_text().splitlines()
        cells = [line.split(",", 1) for line in lines[1:]]
        site.write_text(
            "\n".join([lines[0], *(f"{'old' if n % 2 else 'young'},{c[1]}" for n, c in enumerate(cells))])
        )
    elif change == "columns":
        site.write_text(
            "\n".join(
                ",".join(line.split(",")[:2] + line.split(",")[3:]) for line in site.read_text().splitlines()
            )
        )
    elif change == "scale":
        spec = of_nodes(nodes={"mean": [0.0], "deviation": [1.0]})
    else:
        spec = of_nodes(data={"columns": {"age": "number"}})
        site.write_text(site.read_text().replace("1000010", "some", 1))
    with pytest.raises((UserError, RunError), match=says):
        agreed(spec, sources)


def test_given_classes_and_scales_are_not_asked_for(tmp_path: Path) -> None:
    """Examples of other classes are left out at the node."""
    sources = write_sites(tmp_path)
    spec = of_nodes(data={"classes": ["kind-2", "kind-0"], "columns": {"ward": "drop", "dose": "drop"}})
    spec = FederationSpec.parse(
        {**spec.model_dump(mode="json"), "nodes": {"mean": [1e6], "deviation": [10.0]}}
    )
    facts = agreed(spec, sources)
    assert facts["classes"] == ["kind-2", "kind-0"]
    assert facts["standardisation"] == {"mean": [1e6], "deviation": [10.0]}
    task = spec.told(StrategySpec(), 0)
    setup = own_setup(task.model_dump_json(), json.dumps(facts), sources[1], 1)
    said = facts_of(task, sources[1])
    assert said["classes"] == ["kind-0", "kind-2"]
    assert set(setup.train.labels.tolist()) == {0, 1}
    assert merged([said, said], ["kind-2", "kind-0"])["classes"] == ["kind-2", "kind-0"]


def test_two_nodes_of_one_partition_are_refused() -> None:
    grid = SequentialGrid(client_app(), 3, node_configs=[{}] * 3)
    strategy_of = strategy("fedavg")()
    del grid.nodes
    own = grid.context_of
    grid.context_of = lambda partition: own(partition % 2)  # type: ignore[method-assign]
    grid.get_node_ids = lambda: [1, 2, 3]  # type: ignore[method-assign]
    with pytest.raises(RunError, match="nodes 1 and 3 both say that they have partition 0"):
        strategy_of.nodes(grid)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["split.kind=nodes", "split.clients=3"], "split.clients=3: give --data SOURCE for each, not 0"),
        (["split.clients=3", "--data", "csv:x"], "nodes' own data are for split.kind=nodes"),
        (["split.kind=nodes", "split.clients=1", "--data", "csv:nowhere.csv"], "that is there"),
        (["split.kind=nodes", "split.clients=1", "--data", "digits"], "--data digits: must be csv:PATH"),
    ],
)
def test_the_loopback_asks_for_a_file_a_node(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert loopback(["federated/specs/digits.yaml", *arguments]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_deployed_nodes_train_on_a_file_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By SuperLink and SuperNodes: the same model as in one process; the app names no file."""
    monkeypatch.setenv("LOSSWORKS_HOME", str(tmp_path / "home"))
    sources = write_sites(tmp_path)
    spec = of_nodes("scaffold", rounds=2, measure={"every": 2})
    (tmp_path / "spec.yaml").write_text(json.dumps(spec.model_dump(mode="json")))
    data = [word for source in sources for word in ("--data", source)]
    folder = tmp_path / "deployed"
    assert loopback([str(tmp_path / "spec.yaml"), *data, "--folder", str(folder)]) == 0, (
        capsys.readouterr().err
    )
    (theirs,) = (tmp_path / "home" / "runs").glob("*/*/model.safetensors")
    ours = next(run(spec, tmp_path / "here", sources).folder.path.glob("*/model.safetensors"))

    assert difference(load_tensors(theirs), load_tensors(ours)) < 1e-5
    for file in (folder / "app").rglob("*"):
        assert file.is_dir() or "site-" not in file.read_text()
