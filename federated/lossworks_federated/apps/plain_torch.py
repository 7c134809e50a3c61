"""A strategy's part in clients for an ordinary training loop of PyTorch.

In the training function of any ClientApp::

    with local_rule(message, model, optimizer, context) as rule:
        for inputs, labels in batches:
            optimizer.zero_grad()
            logits = model(inputs)
            loss = criterion(logits, labels) + rule.penalty(logits, inputs=inputs)
            loss.backward()
            optimizer.step()
    return rule.reply({"train_loss": total / count, "num-examples": count})

Gradients and steps are changed where ``optimizer.step()`` is called; what a strategy adds to the loss comes
from ``rule.penalty``. Whatever the strategy, the loop is the same, and without a part it is what it was.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from torch import Tensor, nn
from torch.func import functional_call

from lossworks.cohort import Batches, LocalRule, Member, Seen, Stack, member_of, repeat
from lossworks.errors import RunError
from lossworks.models import Outputs
from lossworks_federated.client.client_memory import Moment, keep, moment_of, recall
from lossworks_federated.client.client_work import pull_of, step_weights
from lossworks_federated.client.local_rules import StackedFeatures, Together
from lossworks_federated.records import (
    CONFIG,
    METRICS,
    MODEL,
    array_record,
    member_from,
    model_from,
    part_mark,
)
from lossworks_federated.spec_parts import LocalSpec
from lossworks_federated.strategies.catalogue import parts_in
from lossworks_federated.strategies.parts import Cohort, Part

ReadFeatures = Callable[[Any, Tensor], Tensor]
"""Takes a model and inputs (B, …), and returns the features (B, D) that its head reads."""


def local_rule(
    message: Message,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    context: Context | None = None,
    *,
    features: ReadFeatures | None = None,
) -> "PlainRule":
    """Return what does a strategy's part in clients around a training loop; a context manager.

    Args:
        message: The instruction to train.
        model: What is trained. On entering, it gets the instruction's parameters and buffers; where a
            strategy leaves some of them to clients, it gets the client's own.
        optimizer: Of the model's parameters.
        context: The client's, where parts that keep something find it; those that keep nothing need none.
        features: How to read the features of the model, where a strategy compares them with those of other
            parameters, as MOON does: ``lambda model, inputs: model.hidden(inputs)``.

    Raises:
        RunError: The instruction's model is another one, or a part needs what is not given.
    """
    return PlainRule(message, model, optimizer, context, features)


def load_model(message: Message, model: nn.Module, context: Context | None = None) -> None:
    """Give a model the parameters and buffers that a client tests.

    They are the instruction's, but for those that a strategy leaves to clients, as FedBN does.

    Args:
        message: The instruction to evaluate.
        model: What is tested; written to.
        context: The client's.

    Raises:
        RunError: The instruction's model is another one.
    """
    told = _Told(message, model, context, after=True)
    model.load_state_dict(told.start())


class PlainRule:
    """Does the parts of an instruction while a loop of one client trains; see :func:`local_rule`."""

    def __init__(
        self,
        message: Message,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        context: Context | None,
        features: ReadFeatures | None,
    ) -> None:
        self._told = _Told(message, model, context)
        self._message, self._model, self._optimizer, self._features = message, model, optimizer, features
        self._names = {id(value): name for name, value in model.named_parameters()}
        self._before: dict[str, Tensor] = {}
        self._steps, self._rates, self._asked = 0, 0.0, False
        self._content: RecordDict | None = None
        for part in self._told.parts:
            _require_fit(part, optimizer, context)

    def __enter__(self) -> Self:
        """Load the model and begin to change gradients and steps."""
        self._model.load_state_dict(self._told.start())
        self._rules = [
            rule for part in self._told.parts if (rule := part.rule(self._cohort(part))) is not None
        ]
        self._penalties = [rule for rule in self._rules if type(rule).penalty is not LocalRule.penalty]
        self._together = Together(self._rules)
        changes = any(type(rule).update is not LocalRule.update for rule in self._rules)
        self._handles = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]
        self._changes_steps = changes
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop changing steps; keep and make ready to send what the parts have.

        Raises:
            RunError: No step was taken.
        """
        for handle in self._handles:
            handle.remove()
        if kind is None:
            self._content = self._finished()

    def penalty(
        self, logits: Tensor, *, inputs: Tensor | None = None, features: Tensor | None = None
    ) -> Tensor:
        """Return what the strategy adds to the loss of a batch, a scalar; 0 where it adds nothing.

        Args:
            logits: Of the model, shape (B, K).
            inputs: Of the batch, shape (B, …), which MOON needs.
            features: Of the model, shape (B, D), which MOON needs.

        Raises:
            RunError: A part needs what is not given.
        """
        self._asked = True
        given = {"logits": logits, "inputs": inputs, "features": features}
        total = logits.new_zeros(())
        outputs = Outputs(_stacked(features), None, dense=logits[None])
        targets = torch.zeros(1, len(logits), dtype=torch.int64, device=logits.device)  # all count
        seen = Seen(_stacked(inputs), outputs, targets)
        for rule in self._penalties:
            missing = [name for name in rule.reads if given[name] is None]
            if missing:
                raise RunError(
                    f"{self._told.slugs}: rule.penalty needs {missing[0]}: call it as "
                    "rule.penalty(logits, inputs=inputs, features=features)"
                )
            extra = rule.penalty(seen)
            total = total if extra is None else total + extra[0]
        return total

    def reply(self, metrics: Mapping[str, int | float | list[int] | list[float]]) -> Message:
        """Return the reply: parameters and buffers, what the parts send, and metrics.

        Args:
            metrics: With ``num-examples``.

        Raises:
            RunError: The training has not ended, or ``num-examples`` is missing.
        """
        if self._content is None:
            raise RunError(
                "rule.reply is called after the block of local_rule, which has then ended its part"
            )
        if "num-examples" not in metrics:
            raise RunError("rule.reply needs num-examples among the metrics, on which clients are weighted")
        content = RecordDict(dict(self._content))
        content[METRICS] = MetricRecord({**metrics, **self._reported})
        return Message(content, reply_to=self._message)

    def _cohort(self, part: Part, lr: float | None = None) -> Cohort:
        """Return the client about to train, or having trained at a mean rate, as a cohort of one."""
        return self._told.cohort(part, self._forward, _local(self._optimizer, lr))

    @torch.no_grad()
    def _forward(self, params: Stack, inputs: Tensor) -> Tensor:
        """Return the features of other parameters of the model, (1, B, D)."""
        if self._features is None:
            raise RunError(f"{self._told.slugs}: give local_rule the argument features")
        training = self._model.training
        self._model.eval()  # what is kept of batches stays as it is
        named = {f"model.{name}": value for name, value in member_of(params, 0).items()}
        found: Tensor = functional_call(_FeaturesOnly(self._model, self._features), named, (inputs[0],))
        self._model.train(training)
        return found[None]

    def _trained(self) -> list[tuple[str, Tensor]]:
        """Return the parameters that the optimiser is about to move, by name."""
        return [
            (self._names[id(value)], value)
            for group in self._optimizer.param_groups
            for value in group["params"]
            if value.grad is not None and id(value) in self._names
        ]

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, given: tuple[Any, ...], named: Any) -> None:
        if given[1:] or named.get("closure") is not None:  # the first is the optimiser itself
            raise RunError("local_rule takes optimizer.step() without a closure, which would run after it")
        if self._penalties and not self._asked:
            raise RunError(
                f"{self._told.slugs}: add rule.penalty(logits) to the loss in each step, which is its part"
            )
        self._asked = False
        self._steps += 1
        self._rates += float(optimizer.param_groups[0]["lr"])
        for name, value in self._trained():
            gradient = value.grad
            if gradient is not None:
                gradient.copy_(self._together.gradient(name, gradient[None], value[None])[0])
            if self._changes_steps:
                self._before[name] = value.clone()

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, given: Any, named: Any) -> None:
        del optimizer, given, named
        for name, value in self._trained() if self._changes_steps else []:
            before = self._before.pop(name)
            value.copy_(before + self._together.update(name, (value - before)[None])[0])

    def _finished(self) -> RecordDict:
        """Return what is sent besides metrics, and keep what the parts keep."""
        if not self._steps:
            raise RunError("no optimizer.step() within local_rule: train within it, with its optimizer")
        told, lr = self._told, self._rates / self._steps
        state = {name: value.detach() for name, value in self._model.state_dict().items()}
        returned = ended = repeat(state, 1)
        steps = torch.tensor([self._steps])
        content, kept = RecordDict(), {}
        for part in told.parts:
            outcome = part.finish(self._cohort(part, lr), ended, steps)
            if part.keeps:
                kept[part.slug] = member_of(outcome.kept, 0)
            if outcome.sent:
                content[part.slug] = array_record(member_of(outcome.sent, 0))
            returned = part.returned(told.origin, returned)
        content[MODEL] = array_record(member_of(returned, 0))
        if told.context is not None and kept:
            keep([told.context], [kept], told.moment, local=False)
        weight = step_weights(steps, _local(self._optimizer, lr), pull_of(told.parts))
        self._reported = {
            "steps": self._steps,
            "step-weight": float(weight),
            **{part_mark(part.slug): 1 for part in told.parts},
        }
        return content


class _Told:
    """What an instruction says, with what a client kept for it, on the devices of a model.

    Args:
        message: The instruction.
        model: Of the client.
        context: Of the client, if it is known.
        after: Whether the client has trained in the instruction's round already.
    """

    def __init__(
        self, message: Message, model: nn.Module, context: Context | None, *, after: bool = False
    ) -> None:
        config: Any = message.content.config_records.get(CONFIG, {})
        self.context = context
        self.parts = parts_in(config)
        self.slugs = " and ".join(part.slug for part in self.parts)
        self._like = model.state_dict()
        self._received = {name: member_from(r) for name, r in message.content.array_records.items()}
        self.origin = self._placed(model_from(message.content, self._like))
        named = context.node_config.get("state-folder") if context is not None else None
        server_round = int(config.get("server-round", 0)) + after
        self.moment: Moment = moment_of(config, server_round, Path(str(named)) if named else None)
        self._kept = self._recalled()

    def start(self) -> Member:
        """Return the parameters and buffers that the client begins with."""
        params = repeat(self.origin, 1)
        for part in self.parts:
            params = part.start(params, self._kept[part.slug])
        return member_of(params, 0)

    def cohort(self, part: Part, features: StackedFeatures, local: LocalSpec) -> Cohort:
        """Return the client as a cohort of one, with what gives its features and its optimiser."""
        none = torch.zeros(0, 1, 1, dtype=torch.int64)
        batches = Batches(torch.zeros(1, dtype=torch.int64), none, none[..., 0], torch.zeros(1).long())
        received = self._placed(self._received.get(part.slug, {}))
        return Cohort(features, self.origin, batches, local, received, self._kept[part.slug])

    def _recalled(self) -> dict[str, Stack]:
        keeping = [part for part in self.parts if part.keeps]
        found: dict[str, Member] = {}
        if self.context is not None and keeping:
            (found,) = recall([self.context], [part.slug for part in keeping], self.moment)
        stacks: dict[str, Stack] = {part.slug: {} for part in self.parts}
        for part in keeping:
            own = self._placed(found.get(part.slug) or part.initial(self.origin))
            stacks[part.slug] = {name: value[None] for name, value in own.items()}
        return stacks

    def _placed(self, member: Member) -> Member:
        """Return arrays named like the model's on the devices of those."""
        return {name: value.to(self._like[name].device) for name, value in member.items()}


class _FeaturesOnly(nn.Module):
    """A model whose forward returns its features, as functional calls need it."""

    def __init__(self, model: nn.Module, features: ReadFeatures) -> None:
        super().__init__()
        self.model, self._features = model, features

    def forward(self, inputs: Tensor) -> Tensor:
        return self._features(self.model, inputs)


def _stacked(given: Tensor | None) -> Tensor:
    return torch.zeros(1, 0) if given is None else given[None]


def _local(optimizer: torch.optim.Optimizer, lr: float | None = None) -> LocalSpec:
    """Return an optimiser in the words of a spec; one that is no SGD counts as AdamW."""
    group = optimizer.param_groups[0]
    plain = isinstance(optimizer, torch.optim.SGD)
    return LocalSpec.model_construct(
        optimizer="sgd" if plain else "adamw",
        lr=float(group["lr"]) if lr is None else lr,
        momentum=float(group["momentum"]) if plain else 0.0,
    )


def _require_fit(part: Part, optimizer: torch.optim.Optimizer, context: Context | None) -> None:
    """Refuse an optimiser that a part can't have, and a client without memory for what a part keeps."""
    if part.keeps and context is None:
        raise RunError(
            f"{part.slug} keeps something between rounds: local_rule(message, model, optimizer, context)"
        )
    groups = optimizer.param_groups
    plain = isinstance(optimizer, torch.optim.SGD) and not any(group["momentum"] for group in groups)
    if part.plain_sgd and (not plain or len({float(group["lr"]) for group in groups}) > 1):
        raise RunError(f"{part.slug} needs torch.optim.SGD without momentum, and one learning rate")
