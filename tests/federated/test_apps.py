"""ClientApps of other packages: run as they are, and with the parts of strategies by ``local_rule``."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from lossworks.cli import main
from lossworks.cohort import Member
from lossworks.errors import RunError, UserError
from lossworks.tensors import load_tensors
from lossworks.tracking import read_all
from lossworks_federated.apps.plain_torch import load_model, local_rule
from lossworks_federated.client.app_memory import keep_app, recall_app
from lossworks_federated.client.client_memory import Moment
from lossworks_federated.engines.sequential_grid import SequentialGrid
from lossworks_federated.flower_private import identify
from lossworks_federated.loopback import main as loopback
from lossworks_federated.server.participants import participants_of
from lossworks_federated.server.rounds import RoundFiles, RoundLoop
from lossworks_federated.shared_setup import SharedSetup
from lossworks_federated.specs import FederationSpec
from lossworks_federated.strategies.catalogue import ASYNCHRONOUS, CLIENT_PART, POOLED, REPORTS, strategies
from lossworks_testing.federation import OTHER_PACKAGE, difference, equal, install_package, tiny, trained

NEEDING = {slug for slug, one in strategies().items() if {CLIENT_PART, REPORTS} & set(one.flags)}
OURS_ALONE = {slug for slug, one in strategies().items() if {ASYNCHRONOUS, POOLED} & set(one.flags)}
"""Of strategies that need virtual time, or all data in one place."""


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_package(tmp_path / "info", monkeypatch)


def of_app(strategy: Any = "fedavg", app: Any = "quick-start", **changes: Any) -> FederationSpec:
    values = {"engine": "sequential", "rounds": 2, "split": {"clients": 3}, "local": {"lr": 0.05}, **changes}
    return FederationSpec.parse({"kind": "federation", "strategies": [strategy], "app": app, **values})


def rounds_in(spec: FederationSpec, folder: Path) -> RoundLoop:
    """Return the rounds of a spec's only strategy and seed in its own engine."""
    taking = participants_of(spec)
    grid = taking.grid(spec.strategies[0], spec.seeds[0], folder / "clients")
    return taking.rounds(spec.strategies[0], spec.seeds[0], grid, RoundFiles(folder / "child"))


def ended(spec: FederationSpec, folder: Path) -> Member:
    rounds_in(spec, folder).run()
    return load_tensors(folder / "child" / "model.safetensors")


# As they are


@pytest.mark.parametrize(
    "name", [*sorted(set(strategies()) - NEEDING - OURS_ALONE), {"name": "fedld", "margin": 0.0}], ids=str
)
def test_a_quick_start_app_trains_under_every_strategy_without_a_part(
    name: Any, packages: None, tmp_path: Path
) -> None:
    """Its model has whole numbers, too; what it reports and its package measures is recorded."""
    model = ended(of_app(name), tmp_path)
    rows = [row["metrics"] for row in read_all(tmp_path / "child" / "metrics.jsonl")]

    assert rows[-1]["server/loss"] < rows[0]["server/loss"]
    assert rows[-1]["train/train_loss"] == rows[-1]["train/loss"] > 0
    assert 0 < rows[-1]["clients/accuracy_mean"] <= 1
    assert model["norm.num_batches_tracked"].dtype == torch.int64
    if name == "fedavg":
        assert int(model["norm.num_batches_tracked"]) == 2 * 5  # five batches of eight in each round


def test_fedavg_of_a_quick_start_app_is_the_mean_of_what_its_clients_return(
    packages: None, tmp_path: Path
) -> None:
    rounds = rounds_in(of_app(rounds=1), tmp_path)
    rounds.run()
    received = rounds.strategy.received
    mean = {name: received.params(slice(None))[name].double().mean(0) for name in received.updates}
    model = load_tensors(tmp_path / "child" / "model.safetensors")

    assert received.partitions == (0, 1, 2)
    for name, value in model.items():
        torch.testing.assert_close(value.double(), mean[name], rtol=1e-5, atol=1e-6)


def test_the_same_seed_gives_the_same_and_a_run_goes_on(packages: None, tmp_path: Path) -> None:
    """Though the app shuffles with torch's global stream, which is as it was afterwards."""
    for name, app in (("fedavg", "quick-start"), ("scaffold", "with-rule")):
        whole = ended(of_app(name, app, rounds=3), tmp_path / name / "whole")
        before = torch.get_rng_state()
        ended(of_app(name, app, rounds=1), tmp_path / name / "cut")
        assert torch.equal(torch.get_rng_state(), before)
        assert equal(ended(of_app(name, app, rounds=3), tmp_path / name / "cut"), whole)
        assert not equal(ended(of_app(name, app, rounds=3, seeds=[1]), tmp_path / name / "other"), whole)


def test_the_command_runs_an_app(packages: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a key of its run configuration from the command line; pictures leave out what is not measured."""
    runs = tmp_path / "runs"
    (tmp_path / "spec.yaml").write_text(
        "kind: federation\napp: {name: quick-start, local-epochs: 2}\nengine: sequential\nrounds: 2\n"
        f"split: {{clients: 3}}\nmeasure: {{target: 0.5}}\nstorage: {runs}\n"
    )
    assert main(["federate", str(tmp_path / "spec.yaml"), "app.batch-size=16", "local.lr=0.05"]) == 0
    printed = capsys.readouterr().out
    assert "engine sequential" in printed
    assert "fedavg" in printed
    (kept,) = runs.glob("*/spec.yaml")
    assert FederationSpec.read(kept).app.config == {"local-epochs": 2, "batch-size": 16}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"app": "quikstart"}, "quikstart: no such ClientApp; did you mean quick-start?"),
        (
            {"engine": "cohort"},
            "app=quick-start: engine=cohort trains our own clients; take engine=sequential",
        ),
        ({"app": {"name": "quick-start", "batchsize": 3}}, "batchsize is no key .* did you mean batch-size"),
        ({"app": {"name": "quick-start", "batch-size": "x"}}, "app.batch-size='x': must be of the type int"),
        ({"model": {"width": 3}}, "model: with app=quick-start the app has its own; leave the field out"),
        ({"split": {"clients": 3, "alpha": 9}}, "only split.clients is asked for"),
        ({"local": {"epochs": 3}}, "only local.lr is asked for"),
        ({"privacy": "local"}, "privacy: with app=quick-start the app has its own"),
        (
            {"strategies": ["fedlex"]},
            "fedlex needs something of clients that app=quick-start leaves undone: let",
        ),
        ({"strategies": ["fednova"]}, "fednova needs something of clients"),
        ({"strategies": ["fedld"]}, "or fedld with margin=0, which leaves clients alone"),
        ({"strategies": [{"name": "fedavg", "also": ["fedprox"]}]}, "fedprox needs something of clients"),
    ],
)
def test_what_an_app_can_not_be_asked_is_refused(changes: dict, says: str, packages: None) -> None:
    with pytest.raises(UserError, match=says):
        of_app(**{"strategies": ["fedavg"], **changes})


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("no_such_module:APP", "app=odd: no_such_module:APP: can't be imported: ModuleNotFoundError"),
        ("lossworks_other.apps:quick_start", "app=odd: .* is a ClientApp; it must be an OfferedApp"),
    ],
)
def test_an_app_that_can_not_be_used_is_named(
    value: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_package(tmp_path / "info", monkeypatch, {"lossworks.client_apps": {"odd": value}})
    with pytest.raises(UserError, match=says):
        of_app(app="odd")


def test_without_any_package_it_is_said_how_one_offers_an_app() -> None:
    with pytest.raises(UserError, match="no installed package offers a ClientApp; one does through an entry"):
        of_app()


def test_what_an_app_keeps_in_its_context_is_there_when_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrays, numbers, texts and bytes, of the round that is gone on from; each child begins without."""
    install_package(
        tmp_path / "info",
        monkeypatch,
        {"lossworks.client_apps": {"counting": "lossworks_other.apps:COUNTING"}},
    )
    whole = ended(of_app(app="counting", rounds=4), tmp_path / "whole")
    for rounds in (1, 3):
        ended(of_app(app="counting", rounds=rounds), tmp_path / "cut")
    assert equal(ended(of_app(app="counting", rounds=4), tmp_path / "cut"), whole)
    assert float(whole["w"]) == 1 + 2 + 3 + 4
    assert sorted(file.stem for file in (tmp_path / "whole" / "clients").rglob("*/0/*")) == ["app-3", "app-4"]

    spec = of_app(app="counting")
    app = participants_of(spec).app(tmp_path / "both")
    context = Context(1, 1, {"partition-id": 0}, RecordDict(), {})
    for federation, expected in (("a", [1, 2]), ("b", [1])):
        for server_round, value in enumerate(expected, 1):
            message = instruction([], {"w": torch.zeros(1)}, seed=0, federation=federation)
            message.content["config"]["server-round"] = server_round
            assert float(app(message, context).content["arrays"]["w"].numpy()[0]) == value


def test_a_context_that_an_app_has_emptied_is_empty_when_it_goes_on(tmp_path: Path) -> None:
    moments = [Moment("run", number, 1, tmp_path) for number in range(4)]
    context = Context(1, 1, {"partition-id": 0}, RecordDict({"texts": ConfigRecord({"a": "b"})}), {})
    keep_app(context, moments[1])
    del context.state["texts"]
    keep_app(context, moments[2])
    for moment, names in ((moments[3], set()), (moments[2], {"texts"})):
        again = Context(1, 1, {"partition-id": 0}, RecordDict(), {})
        recall_app(again, moment)
        assert set(again.state) == names


# With the parts of strategies


def plain_app(setup: SharedSetup, leave_out: str = "") -> ClientApp:
    """Return our client's work as a loop of plain PyTorch."""
    app, task = ClientApp(), setup.task

    def made() -> Any:
        return setup.kind.build_model()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        config, partition = message.content["config"], int(context.node_config["partition-id"])
        model = made()
        optimizer = torch.optim.SGD(model.parameters(), lr=config["lr"])
        batches = setup.batches([partition], config["server-round"], config.get("epochs", task.local.epochs))
        losses = []
        with local_rule(message, model, optimizer, context, features=lambda m, x: m.hidden(x)) as rule:
            for rows, counts in zip(batches.rows, batches.counts, strict=True):
                row = rows[0, : counts[0]]
                optimizer.zero_grad()
                hidden = model.hidden(setup.train.inputs[row])
                logits = model.head().logits(hidden)
                loss = F.cross_entropy(logits, setup.train.labels[row])
                if leave_out != "penalty":
                    loss = loss + rule.penalty(logits, inputs=setup.train.inputs[row], features=hidden)
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        return rule.reply(
            {"loss": sum(losses) / len(losses), "num-examples": len(setup.split.train[partition])}
        )

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        model = made()
        load_model(message, model, context)
        rows = torch.from_numpy(setup.split.test[int(context.node_config["partition-id"])])
        with torch.no_grad():
            logits = model.head().logits(model.hidden(setup.train.inputs[rows]))
        right = float((logits.argmax(1) == setup.train.labels[rows]).float().mean())
        metrics = MetricRecord({"accuracy": right, "num-examples": len(rows)})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


COMBINED = [
    {"name": "scaffold", "also": ["fedlex"]},
    {"name": "fedadam", "also": [{"name": "fedprox", "mu": 0.5}]},
    {"name": "fedld", "variant": "reference", "also": ["moon"]},
    {"name": "fedlex", "variant": "reference", "refresh": "each-round"},
    {"name": "fednova", "also": [{"name": "fedprox", "mu": 0.5}]},
]


@pytest.mark.parametrize("entry", [*sorted(set(strategies()) - OURS_ALONE), *COMBINED], ids=str)
def test_a_plain_loop_with_local_rule_is_our_client(entry: Any, tmp_path: Path) -> None:
    """Three rounds of four of six clients: the same model and the same tests to rounding."""
    model = {"kind": "resnet", "layers": 1, "width": 8, "groups": 2} if entry == "fedbn" else {}
    changes = {"model": model} if model else {}
    spec = tiny(entry, clients_per_round=4, measure={"terms": False}, **changes)
    ours = trained(spec, tmp_path / "ours")
    theirs = trained(spec, tmp_path / "theirs", lambda setup: SequentialGrid(plain_app(setup), 6))

    assert difference(ours, theirs) < 1e-5
    tests = [
        read_all(tmp_path / who / "child" / "metrics.jsonl")[-1]["metrics"] for who in ("ours", "theirs")
    ]
    assert tests[0]["clients/accuracy_mean"] == pytest.approx(tests[1]["clients/accuracy_mean"], abs=0.02)


def without_rule(setup: SharedSetup) -> ClientApp:
    """Return an app that does no part: it returns what it is sent."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        del context
        content = RecordDict(
            {"arrays": message.content["arrays"], "metrics": MetricRecord({"num-examples": 1})}
        )
        return Message(content, reply_to=message)

    return app


@pytest.mark.parametrize("name", sorted(NEEDING))
def test_a_client_without_a_strategy_s_part_is_refused_by_name(name: str, tmp_path: Path) -> None:
    """With what to do, whatever the strategy; a client that has it is taken beside others that have not."""
    missing = "step-weight" if name == "fednova" else f"part/{name}"
    says = f"0 usable replies of 6 .trained without what the strategy needs of clients: .*no {missing} .*"
    with pytest.raises(RunError, match=says + "trains within `local_rule` of lossworks_federated.apps"):
        trained(tiny(name), tmp_path, lambda setup: SequentialGrid(without_rule(setup), 6))


def instruction(parts: list[dict], arrays: Member, **config: Any) -> Message:
    identify(1)
    told = ConfigRecord({"parts": json.dumps(parts), "server-round": 1, **config})
    return Message(RecordDict({"arrays": ArrayRecord(arrays), "config": told}), 1, "train")


def step_with(
    parts: list[dict],
    optimizer: Any = torch.optim.SGD,
    context: Context | None = None,
    ask: bool = True,
    **how: Any,
) -> Message:
    """Take one step of a linear model within ``local_rule``."""
    model = torch.nn.Linear(3, 2)
    message = instruction(parts, dict(model.state_dict()))
    moving = optimizer(model.parameters(), lr=0.1, **how)
    with local_rule(message, model, moving, context) as rule:
        logits = model(torch.ones(4, 3))
        loss = logits.square().mean() + (rule.penalty(logits) if ask else 0)
        loss.backward()
        moving.step()
    return rule.reply({"num-examples": 4})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"parts": [{"name": "scaffold"}]}, "scaffold keeps something between rounds: local_rule.*context"),
        ({"parts": [{"name": "scaffold"}], "momentum": 0.9}, "keeps something|needs torch.optim.SGD"),
        ({"parts": [{"name": "fedld"}], "ask": False}, r"fedld: add rule.penalty\(logits\) to the loss"),
        ({"parts": [{"name": "moon"}]}, "moon keeps something between rounds"),
    ],
)
def test_a_loop_that_can_not_do_a_part_is_told_what_to_do(arguments: dict, says: str) -> None:
    with pytest.raises(RunError, match=says):
        step_with(**arguments)


def test_what_a_part_needs_of_the_optimiser_and_the_loop_is_asked_for() -> None:
    context = Context(1, 1, {"partition-id": 0}, RecordDict(), {})
    with pytest.raises(RunError, match=r"scaffold needs torch.optim.SGD without momentum"):
        step_with([{"name": "scaffold"}], context=context, momentum=0.9)
    with pytest.raises(RunError, match=r"scaffold needs torch.optim.SGD without momentum"):
        step_with([{"name": "scaffold"}], torch.optim.AdamW, context)
    with pytest.raises(RunError, match=r"moon: rule.penalty needs inputs: call it as"):
        step_with([{"name": "moon"}], context=context)
    model = torch.nn.Linear(3, 2)
    message = instruction([], dict(model.state_dict()))
    with (
        pytest.raises(RunError, match=r"no optimizer.step\(\) within local_rule"),
        local_rule(message, model, torch.optim.SGD(model.parameters())),
    ):
        pass
    with pytest.raises(RunError, match="is no model of this client: weight is missing"):
        local_rule(instruction([], {"w": torch.zeros(1)}), model, torch.optim.SGD(model.parameters()))


def test_without_a_part_it_is_the_loop_as_it_was_and_reports_its_steps() -> None:
    """Three arguments are enough; a reply has what Flower's own strategies read, in the model's dtypes."""
    reply = step_with([]).content
    assert set(reply["metrics"]) == {"num-examples", "steps", "step-weight"}
    assert {array.dtype for array in reply["arrays"].values()} == {"float32"}
    marked = step_with([{"name": "fedprox", "mu": 0.1}]).content
    assert marked["metrics"]["part/fedprox"] == 1


# In Flower's own engine


@pytest.mark.slow
def test_flower_s_simulation_runs_an_app_as_the_sequential_engine_does(tmp_path: Path) -> None:
    """In a process of its own: Flower shuts Ray down at the end, and other tests use it."""
    code = (
        "import sys, pytest\nfrom pathlib import Path\nfrom lossworks.cli import main\n"
        "from lossworks_testing.federation import install_package\n"
        "install_package(Path(sys.argv[1]), pytest.MonkeyPatch())\n"
        "sys.exit(main(sys.argv[2:]))\n"
    )
    (tmp_path / "spec.yaml").write_text(
        "kind: federation\napp: with-rule\nrounds: 2\nsplit: {clients: 3}\nstrategies: [fedavg, scaffold]\n"
    )
    models = []
    paths = [str(OTHER_PACKAGE), str(tmp_path / "info"), str(OTHER_PACKAGE.parent)]
    for engine in ("flower", "sequential"):
        home = tmp_path / engine
        environment = {**os.environ, "LOSSWORKS_HOME": str(home), "PYTHONPATH": os.pathsep.join(paths)}
        command = [
            sys.executable,
            "-c",
            code,
            str(tmp_path / "info"),
            "federate",
            str(tmp_path / "spec.yaml"),
        ]
        done = subprocess.run(
            [*command, f"engine={engine}"], capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        models.append(sorted((home / "runs").glob("*/*/model.safetensors")))
        shutil.rmtree(tmp_path / "info")
    assert [len(found) for found in models] == [2, 2]
    for ours, theirs in zip(*models, strict=True):
        # To rounding: Flower's processes have one thread, and sums of several are in another order.
        assert difference(load_tensors(ours), load_tensors(theirs)) < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_deployed_app_is_the_sequential_engine_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """SuperNodes run the package's app; its part of SCAFFOLD is kept at the node."""
    install_package(tmp_path / "info", monkeypatch)
    monkeypatch.setenv("LOSSWORKS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(OTHER_PACKAGE), str(tmp_path / "info")]))
    spec = of_app("scaffold", "with-rule", split={"clients": 2}, measure={"every": 2})
    (tmp_path / "spec.yaml").write_text(json.dumps(spec.model_dump(mode="json")))

    assert loopback([str(tmp_path / "spec.yaml")]) == 0, capsys.readouterr().err
    (theirs,) = (tmp_path / "home" / "runs").glob("*/*/model.safetensors")
    assert equal(load_tensors(theirs), ended(spec, tmp_path / "here"))
