"""What clients do when they are told to, written once: for one client of a real federation, and for many.

M clients of one instruction; w⁰ is the model they are sent.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, RecordDict
from torch import Tensor

from lossworks.cohort import (
    AdamW,
    LocalRule,
    Member,
    Optimizer,
    Sgd,
    Stack,
    member_of,
    repeat,
    stack,
)
from lossworks_federated.client.client_memory import Moment, keep, moment_of, recall
from lossworks_federated.client.faults import afflicted, fault_of
from lossworks_federated.client.local_rules import Together
from lossworks_federated.client.update_coding import KEPT, coding_of
from lossworks_federated.records import CONFIG, MODEL, member_from, model_from, part_mark
from lossworks_federated.shared_setup import SharedSetup
from lossworks_federated.spec_parts import LocalSpec
from lossworks_federated.strategies.catalogue import parts_told
from lossworks_federated.strategies.parts import Cohort, Part


@dataclass(frozen=True)
class Client:
    """A client in this process: its partition, and its context, where it keeps what parts need."""

    partition: int
    context: Context


@dataclass(frozen=True, eq=False)
class Reply:
    """What a client answers.

    Attributes:
        arrays: Tensors by record and name.
        metrics: Numbers by name.
        fault: What was made to go wrong; the caller drops replies that "drop_out" or "straggle".
    """

    arrays: dict[str, Member]
    metrics: dict[str, float]
    fault: str | None = None


def train_clients(
    setup: SharedSetup,
    content: RecordDict,
    clients: Sequence[Client],
    *,
    folder: Path | None = None,
    local: bool = False,
) -> list[Reply]:
    """Train clients as an instruction says.

    Args:
        setup: What they have in common.
        content: The instruction: model, configuration, further arrays of parts.
        clients: Who.
        folder: Where they keep things beyond the end of this process; None for nowhere.
        local: Whether what they keep stays in this process.

    Returns:
        A reply each, in the order of ``clients``.
    """
    size = sum(value.numel() for value in setup.initial.values())
    at_once = setup.learner.at_once(size)
    return [
        reply
        for start in range(0, len(clients), at_once)
        for reply in _train_at_once(setup, content, clients[start : start + at_once], folder, local)
    ]


def _train_at_once(
    setup: SharedSetup, content: RecordDict, clients: Sequence[Client], folder: Path | None, local: bool
) -> list[Reply]:
    task, config = setup.task, content.config_records[CONFIG]
    own = _local(task.local, config)
    server_round = int(config["server-round"])  # type: ignore[arg-type]
    epochs = int(config.get("epochs", own.epochs))  # type: ignore[arg-type]
    origin = model_from(content, setup.initial)
    parts = parts_told(config)
    batches = setup.batches([client.partition for client in clients], server_round, epochs)
    moment = moment_of(config, server_round, folder)
    coding = coding_of(task.updates) if server_round else None  # an exploration is of whole updates
    unsent = [KEPT] if coding is not None and coding.keeps else []
    known = _recall(parts, unsent, clients, moment)
    kept = _stacked(parts, known, origin)
    cohorts = [
        Cohort(setup.learner.features, origin, batches, own, _sent(content, part), kept[part.slug])
        for part in parts
    ]
    params = repeat(origin, len(clients))
    for part in parts:
        params = part.start(params, kept[part.slug])
    rules = [rule for part, cohort in zip(parts, cohorts, strict=True) if (rule := part.rule(cohort))]
    trained = setup.learner.train(params, batches, _optimizer(own), _together(rules))
    outcomes = [
        part.finish(cohort, trained.params, trained.steps)
        for part, cohort in zip(parts, cohorts, strict=True)
    ]
    keeping = {part.slug: outcome.kept for part, outcome in zip(parts, outcomes, strict=True) if part.keeps}
    returned = trained.params
    for part in parts:
        returned = part.returned(origin, returned)
    partitions = [client.partition for client in clients]
    faults = [
        fault_of(task.faults, task.seed, server_round, client) if server_round else None
        for client in partitions
    ]
    models = [afflicted(fault, origin, member_of(returned, index)) for index, fault in enumerate(faults)]
    if coding is not None:
        nothing = {name: torch.zeros_like(value) for name, value in origin.items()} if coding.keeps else {}
        seeds = [(task.seed, server_round, client) for client in partitions]
        written = [
            coding.written(origin, model, one.get(KEPT, nothing), seed)
            for model, one, seed in zip(models, known, seeds, strict=True)
        ]
        models = [sent for sent, _ in written]
        if coding.keeps:
            keeping[KEPT] = stack([kept for _, kept in written])
    _keep(keeping, clients, moment, local)
    sent = {part.slug: outcome.sent for part, outcome in zip(parts, outcomes, strict=True) if outcome.sent}
    weights = step_weights(trained.steps, own, pull_of(parts))
    after: list[float] = []
    if config.get("terms", False):
        rows = [setup.split.train[client.partition] for client in clients]
        after = setup.learner.losses(trained.params, setup.train, rows)
    replies = []
    for index, (client, fault) in enumerate(zip(clients, faults, strict=True)):
        metrics = {
            "num-examples": len(setup.split.train[client.partition]),
            "loss": float(trained.losses[index]),
            "steps": int(trained.steps[index]),
            "step-weight": float(weights[index]),
        }
        metrics |= {part_mark(part.slug): 1 for part in parts}
        if after:
            metrics["loss-after"] = after[index]
        arrays = {MODEL: models[index]}
        arrays |= {slug: member_of(stacked, index) for slug, stacked in sent.items()}
        replies.append(Reply(arrays, metrics, fault))
    return replies


def evaluate_clients(
    setup: SharedSetup, content: RecordDict, clients: Sequence[Client], *, folder: Path | None = None
) -> list[Reply]:
    """Test the model that clients are sent on their own test examples; see ``train_clients``."""
    origin = model_from(content, setup.initial)
    own = own_parameters(setup, content, clients, folder=folder)
    rows = [setup.split.test[client.partition] for client in clients]
    tested = [place for place, r in enumerate(rows) if len(r)]
    if own:
        params = {
            name: own[name][tested] if name in own else value.expand(len(tested), *value.shape)
            for name, value in origin.items()
        }
    else:
        params = {name: value[None] for name, value in origin.items()}
    found = setup.learner.measured(params, setup.train, [rows[place] for place in tested]) if tested else []
    replies = [Reply({}, {"num-examples": 0}) for _ in clients]
    for place, evaluation in zip(tested, found, strict=True):
        figures = {name.removeprefix("eval/"): value for name, value in evaluation.metrics().items()}
        finite = {name: value for name, value in figures.items() if math.isfinite(value)}
        replies[place] = Reply({}, {"num-examples": len(rows[place]), **finite})
    return replies


def own_parameters(
    setup: SharedSetup, content: RecordDict, clients: Sequence[Client], *, folder: Path | None = None
) -> Stack:
    """Return the parameters that clients have in place of the global ones, (M, …); most methods have none."""
    config = content.config_records[CONFIG]
    server_round = int(config["server-round"])  # type: ignore[arg-type]
    origin = model_from(content, setup.initial)
    parts = parts_told(config)
    known = _recall(parts, [], clients, moment_of(config, server_round + 1, folder))
    kept = _stacked(parts, known, origin)
    own: Stack = {}
    for part in parts:
        # Only what a part changes is stacked: without that, all clients test one and the same model.
        own = part.start(own, kept[part.slug])
    return own


def step_weights(steps: Tensor, local: LocalSpec, pull: float) -> Tensor:
    """Return a_i of FedNova: the sum of the factors with which gradients enter a client's update.

    Args:
        steps: K_i, shape (M,).
        local: The optimiser; of AdamW the number of steps is returned, since its steps have one size.
        pull: μ of FedProx, 0 without.

    Returns:
        Float64 (M,).
    """
    k = steps.double()
    if local.optimizer != "sgd":
        return k
    r, shrink = local.momentum, local.lr * pull
    if r:
        return (k - r * (1 - r**k) / (1 - r)) / (1 - r)
    return (1 - (1 - shrink) ** k) / shrink if shrink else k


def _local(local: LocalSpec, config: Mapping[str, Any]) -> LocalSpec:
    """Return the local training with the learning rate that an instruction names, if it names one.

    Raises:
        UserError: It is out of range.
    """
    told = config.get("lr", local.lr)
    return local if told == local.lr else LocalSpec.parse({**dict(local), "lr": told}, source="instruction")


def pull_of(parts: Sequence[Part]) -> float:
    """Return μ of FedProx among parts, 0 without."""
    return sum(float(getattr(part.settings, "mu", 0.0)) for part in parts if part.slug == "fedprox")


def _optimizer(local: LocalSpec) -> Optimizer:
    if local.optimizer == "adamw":
        return AdamW(local.lr, local.weight_decay)
    return Sgd(local.lr, local.weight_decay, local.momentum)


def _together(rules: list[LocalRule]) -> LocalRule | None:
    return rules[0] if len(rules) == 1 else Together(rules) if rules else None


def _sent(content: RecordDict, part: Part) -> Member:
    record = content.array_records.get(part.slug)
    return member_from(record) if record is not None else {}


def _recall(
    parts: Sequence[Part], further: Sequence[str], clients: Sequence[Client], moment: Moment
) -> list[dict[str, Member]]:
    """Return what each client kept, by slug of the part or name of what else."""
    slugs = [*(part.slug for part in parts if part.keeps), *further]
    return recall([client.context for client in clients], slugs, moment) if slugs else [{} for _ in clients]


def _stacked(parts: Sequence[Part], known: Sequence[dict[str, Member]], origin: Member) -> dict[str, Stack]:
    """Return what clients kept or begin with, stacked, by slug of the part."""
    stacks: dict[str, Stack] = {}
    for part in parts:
        initial = part.initial(origin) if part.keeps else {}
        stacks[part.slug] = stack([one.get(part.slug, initial) for one in known]) if initial else {}
    return stacks


def _keep(keeping: Mapping[str, Stack], clients: Sequence[Client], moment: Moment, local: bool) -> None:
    if keeping:
        kept = [
            {slug: member_of(stacked, index) for slug, stacked in keeping.items()}
            for index in range(len(clients))
        ]
        keep([client.context for client in clients], kept, moment, local=local)
