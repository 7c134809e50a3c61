"""What a task trains, clients train: language models by owner, regressions, segmenters, adapters alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.func import functional_call

from lossworks.cohort import MemberLearner, Seen, StackedLearner, repeat
from lossworks.data.batch import IGNORE_INDEX
from lossworks.data.text.owned_tokens import OwnedTokens
from lossworks.errors import UserError
from lossworks.models import Outputs
from lossworks.models.interface import Head
from lossworks.runs import RunFolder
from lossworks.tensors import load_tensors
from lossworks.tracking import read_all
from lossworks.training.weights.export import evaluate_folder, export_run
from lossworks_federated.client.client_work import _optimizer
from lossworks_federated.client.local_rules import Margin
from lossworks_federated.engines.cohort_grid import CohortGrid
from lossworks_federated.federate import federate
from lossworks_federated.server.rounds import RoundFiles, Rounds
from lossworks_federated.server.session import FederationWatcher, Session
from lossworks_federated.shared_setup import make_setup
from lossworks_federated.specs import FederationSpec
from lossworks_testing.federation import OneByOneGrid, difference, equal

OWNERS = ("ada", "bob", "eve")


@pytest.fixture(scope="module")
def letters(tmp_path_factory) -> Path:
    """Records of three owners, of whom each uses words of its own."""
    folder = tmp_path_factory.mktemp("letters")
    draw = np.random.default_rng(0)
    with (folder / "letters.jsonl").open("w", encoding="utf-8") as file:
        for number in range(60):
            who = OWNERS[number % 3]
            words = " ".join(f"{who}{draw.integers(5)}" for _ in range(int(draw.integers(4, 30))))
            file.write(json.dumps({"text": words, "who": who}) + "\n")
    return folder


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path_factory):
    """Tokens are made once for all."""
    monkeypatch.setenv("LOSSWORKS_HOME", str(tmp_path_factory.getbasetemp() / "tasks-home"))


def text_spec(letters, strategy="fedavg", **changes) -> FederationSpec:
    values = {
        "task": "language-model",
        "rounds": 2,
        "strategies": [strategy],
        "data": {
            "corpus": f"text:{letters}",
            "owner": "who",
            "vocab_size": 264,
            "sequence_length": 16,
            "held_out_fraction": 0.2,
        },
        "split": {"kind": "natural", "clients": 3},
        "model": {"layers": 1, "width": 16, "heads": 2},
        "local": {"epochs": 1, "batch_size": 8, "lr": 0.1},
    }
    return FederationSpec.parse({**values, **changes})


def setup_of(spec):
    return make_setup(spec.told(spec.strategies[0], 0))


def run(spec, path, grid=None):
    setup = setup_of(spec)
    engine = CohortGrid(setup, path / "clients") if grid is None else grid(setup, path / "clients")
    outcome = Rounds(spec, spec.strategies[0], setup, engine, RoundFiles(path / "child")).run()
    return load_tensors(path / "child" / "model.safetensors"), outcome


def test_no_sequence_holds_text_of_two_owners(letters):
    """And each owner's text is all there, once, but for what fills no pair of tokens."""
    setup = setup_of(text_spec(letters))
    kind = setup.kind
    seen = dict.fromkeys(OWNERS, 0)
    for part in (kind.train, kind.held_out):
        for row in range(len(part)):
            batch, owner = part.batch(np.array([row])), str(part.owners[row])
            targets = batch["targets"][0]
            counted = targets[targets != IGNORE_INDEX]
            assert (targets[len(counted) :] == IGNORE_INDEX).all()
            seen[owner] += len(counted)
    owned = OwnedTokens.read(kind.corpus.folder)
    owned = dict(zip(owned.names, owned.sizes(), strict=True))
    assert seen == {owner: owned[owner] - 1 for owner in OWNERS}
    for client in range(3):
        assert len({kind.train.owners[row] for row in setup.split.train[client]}) == 1


def test_a_client_descends_like_a_plain_loop(letters):
    """One client's round equals torch's optimiser on the dense cross-entropy of the same batches."""
    spec = text_spec(letters, local={"epochs": 2, "batch_size": 4, "lr": 0.05, "momentum": 0.9})
    setup = setup_of(spec)
    found = setup.learner.train(
        repeat(setup.initial, 3), setup.batches([0, 1, 2], 1, 2), _optimizer(spec.local)
    )
    for client in range(3):
        model = setup.kind.build_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for rows in setup.batches_of(client, 1):
            batch = setup.train.batch(rows.numpy())
            logits = model.logits(batch["inputs"])
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten()).backward()
            optimizer.step()
        for name, value in model.named_parameters():
            assert torch.allclose(found.params[name][client], value, atol=2e-5), name


@pytest.mark.parametrize(
    "strategy",
    [
        "fedavg",
        "fedld",
        {"name": "fedld", "variant": "reference"},
        "fedlex",
        "scaffold",
        "moon",
        "centralised",
    ],
    ids=str,
)
def test_both_engines_give_the_same(letters, tmp_path, strategy):
    """A process a client, or all in one: equal to the bit, since a client is computed by one thread."""
    torch.set_num_threads(1)
    spec = text_spec(letters, strategy)
    ours, outcome = run(spec, tmp_path / "cohort")
    theirs, _ = run(spec, tmp_path / "apart", OneByOneGrid)

    assert equal(ours, theirs), difference(ours, theirs)
    assert outcome.metrics["server/bits_per_byte"] < 8
    figures = {name for name in outcome.metrics if name.startswith("clients/")}
    assert {
        f"clients/bits_per_byte_{which}" for which in ("mean", "weighted", "worst10", "std", "max")
    } == figures
    assert outcome.metrics["clients/bits_per_byte_worst10"] == pytest.approx(
        max(one["bits_per_byte"] for one in outcome.clients.values())
    )


def test_terms_add_up_for_tokens(letters, tmp_path):
    """Local, shift and aggregation give the loss of the global model on held-out text."""
    _, outcome = run(text_spec(letters), tmp_path)
    terms = [outcome.metrics[f"terms/{name}"] for name in ("local", "shift", "aggregation")]

    assert sum(terms) == pytest.approx(outcome.metrics["terms/global"])
    assert outcome.metrics["terms/global"] == pytest.approx(outcome.metrics["server/cross_entropy"], rel=1e-5)


@pytest.mark.parametrize("on", ["logits", "softmax"])
@pytest.mark.parametrize("reduce", ["sample", "batch"])
def test_the_margin_needs_no_logits(on, reduce):
    """From features and head it is what it is from logits, with its gradients, in float64."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 3, 5, 8, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 8, generator=g, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 11, (1, 3, 5), generator=g)
    targets[0, 1, 3:] = IGNORE_INDEX
    rule = Margin(0.3, on, reduce)
    head = Head(weight)
    given = (
        Outputs(hidden, head),
        Outputs(hidden, None, dense=head.logits(hidden)),
    )
    values, gradients = [], []
    for outputs in given:
        value = rule.penalty(Seen(hidden, outputs, targets)).sum()
        values.append(float(value))
        gradients.append(torch.autograd.grad(value, (hidden, weight)))

    assert values[0] == pytest.approx(values[1], rel=1e-6)
    for ours, dense in zip(*gradients, strict=True):
        assert torch.allclose(ours, dense, atol=1e-6)


def test_one_client_with_all_is_centralised(letters, tmp_path):
    """The baseline is what FedAvg gives where all owners are one."""
    data = {"corpus": f"text:{letters}", "vocab_size": 264, "sequence_length": 16}
    alone = text_spec(letters, split={"kind": "iid", "clients": 1}, data=data)
    pooled = text_spec(letters, "centralised", split={"kind": "iid", "clients": 1}, data=data)

    assert equal(run(alone, tmp_path / "a")[0], run(pooled, tmp_path / "b")[0])
    setup = setup_of(text_spec(letters, "centralised"))
    whole = np.sort(np.concatenate([setup.split.train[0], *setup.split.test]))
    assert np.array_equal(whole, np.arange(len(setup.train)))


def test_adapters_alone_are_sent(letters, tmp_path):
    """Every parameter of the base stays as it was made, and is no part of what clients return."""
    spec = text_spec(letters, lora=2)
    setup = setup_of(spec)
    assert setup.initial.keys()
    assert all("lora" in name for name in setup.initial)
    model, outcome = run(spec, tmp_path)
    assert model.keys() == setup.initial.keys()
    assert outcome.metrics["bytes/up"] == 2 * 3 * sum(4 * value.numel() for value in model.values())
    assert isinstance(setup.learner, MemberLearner)


def test_a_regression_is_federated(tmp_path):
    """Dealt unevenly by the size of its targets; its clients are compared by their errors."""
    spec = FederationSpec.parse(
        {
            "task": "regression",
            "rounds": 3,
            "strategies": ["fedavg"],
            "split": {"kind": "dirichlet", "clients": 4, "alpha": 0.3},
            "model": {"kind": "mlp", "layers": 1, "width": 8},
            "local": {"epochs": 1, "batch_size": 16, "lr": 0.05},
        }
    )
    setup = setup_of(spec)
    assert setup.split.heterogeneity()["label_distance"] > 0.2
    _, outcome = run(spec, tmp_path)
    assert outcome.metrics["server/r2"] > 0
    assert outcome.metrics["clients/rmse_worst10"] == pytest.approx(outcome.metrics["clients/rmse_max"])


def test_a_segmenter_is_federated(tmp_path):
    """Its clients are compared by their overlap, and the global model is a segmenter's run."""
    spec = FederationSpec.parse(
        {
            "task": "segmentation",
            "rounds": 4,
            "strategies": ["fedavg"],
            "data": {"source": "walls:32", "side": 32},
            "split": {"kind": "iid", "clients": 3},
            "model": {"levels": 1, "width": 4, "groups": 2},
            "local": {"epochs": 2, "batch_size": 4, "lr": 0.05},
        }
    )
    _, outcome = run(spec, tmp_path)

    assert outcome.metrics["server/dice"] > 0.4
    assert outcome.metrics["server/b0_error"] >= 0


def test_members_are_measured_alike_by_both_learners():
    """Of a classifier: at once, or one by one through the task, as training measures."""
    spec = FederationSpec.parse(
        {"split": {"clients": 3, "alpha": 0.3}, "model": {"kind": "mlp", "layers": 1, "width": 8}}
    )
    setup = setup_of(spec)
    assert isinstance(setup.learner, StackedLearner)
    other = MemberLearner(setup.kind.build_model(), setup.kind, setup.train)
    g = torch.Generator().manual_seed(0)
    params = {
        name: value + 0.1 * torch.randn(value.shape, generator=g)
        for name, value in repeat(setup.initial, 3).items()
    }
    for data in (setup.train, setup.kind.held_out):
        rows = [np.arange(5), np.arange(7, 60), np.arange(3, 4)]
        pairs = zip(
            setup.learner.measured(params, data, rows), other.measured(params, data, rows), strict=True
        )
        for ours, theirs in pairs:
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
            assert ours.yardsticks == pytest.approx(theirs.yardsticks, rel=1e-5, nan_ok=True)
        assert setup.learner.losses(params, data, rows) == pytest.approx(
            other.losses(params, data, rows), rel=1e-5
        )
    whole = {name: value[:1] for name, value in params.items()}
    inputs = setup.kind.held_out.batch(np.arange(4))["inputs"]
    features = functional_call(
        setup.kind.build_model(),
        {name: value[0] for name, value in params.items()},
        ({"inputs": inputs}, lambda outputs, _: outputs.hidden),
    )
    for learner in (setup.learner, other):
        assert torch.allclose(learner.features(whole, inputs[None])[0], features, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"task": "no-such"}, "task='no-such' must be one of"),
        ({"task": 3}, "task=3 must be one of"),
        ({"loss": "comp-sum", "model": {"widht": 3}}, "did you mean"),
        ({"data": {"owner": None}}, "split.kind=natural and data.owner need each other"),
        ({"data": {"corpus": "facts:4", "owner": "folder"}}, "doesn't say whose a text is"),
        ({"loss": "label-distribution-aware-margin"}, "loss"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(letters, changes, says):
    """Before anything is read."""
    values = text_spec(letters).model_dump(mode="json", exclude_unset=True)
    for name, value in changes.items():
        values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
    with pytest.raises(UserError, match=says):
        FederationSpec.parse(values)


def test_rows_without_classes_are_dealt_by_none(letters):
    """Dirichlet's draws and shards need classes."""
    data = {"corpus": f"text:{letters}", "vocab_size": 264}
    spec = text_spec(letters, split={"kind": "dirichlet", "clients": 3}, data=data)
    with pytest.raises(UserError, match=r"split.kind=dirichlet: deals rows by their class"):
        setup_of(spec)


def test_owners_that_nobody_names_are_refused(letters):
    """A field that records lack, or a file without records."""
    spec = text_spec(letters, data={"corpus": f"text:{letters}", "owner": "whom", "vocab_size": 264})
    with pytest.raises(UserError, match=r"data.owner='whom': no such field; there are: text, who"):
        setup_of(spec)


def test_the_global_model_is_used_like_a_trained_one(letters, tmp_path, monkeypatch):
    """It exports, evaluates to what the federation measured, and the best round is kept beside the last."""
    monkeypatch.setenv("LOSSWORKS_HOME", str(tmp_path / "home"))
    spec = text_spec(letters, {"name": "fedavg", "lr": 5.0}, lora=2, seeds=[0], rounds=3)
    found = federate(spec)
    (child,) = Session(spec, found.folder, FederationWatcher()).children
    run = RunFolder.find(f"{spec.name}: {child.title}")
    assert run.run_id == (child.files.path / "run-id").read_text()
    rows = {row["step"]: row["metrics"] for row in read_all(child.files.journal)}
    losses = {step: rows[step]["server/loss"] for step in (1, 2, 3)}
    best = min(losses, key=losses.__getitem__)

    for newest, step in ((True, 3), (False, best)):
        folder = tmp_path / f"model-{newest}"
        assert export_run(run, folder, best=not newest) == step
        evaluation = evaluate_folder(folder)
        assert evaluation.loss == pytest.approx(losses[step], rel=1e-5)
        assert evaluation.yardsticks["eval/bits_per_byte"] == pytest.approx(
            rows[step]["server/bits_per_byte"], rel=1e-5
        )
    begun = FederationSpec.parse({**spec.model_dump(mode="json", exclude_unset=True), "start": run.run_id})
    again = setup_of(begun.model_copy(update={"lora": spec.lora}))
    (first,) = again.learner.measured(
        {name: value[None] for name, value in again.initial.items()},
        again.kind.held_out,
        [np.arange(len(again.kind.held_out))],
    )
    assert first.loss == pytest.approx(losses[best], rel=1e-5)
