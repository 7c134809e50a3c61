"""Gradient alignment: what further losses do to a model's features never runs against the first one."""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lossworks.catalogue.declaration import Paper
from lossworks.catalogue.registry import entry_class
from lossworks.data.batch import Batch
from lossworks.errors import UserError
from lossworks.losses.objective import Objective
from lossworks.models import HeadedModel, Outputs
from lossworks.specs import RunSpec
from lossworks.tasks.analyses import Finding
from lossworks.tasks.interface import Task
from lossworks.tasks.methods import Method, Trained


class GradientAlignment(Method):
    """Gradient alignment: of further losses' gradient, what opposes the first loss's is taken out.

    On the parameters of the model without its head, with g_c the gradient of the first term of the sum over
    the whole batch and g_b that of all others with their weights: where ⟨g_b, g_c⟩ < 0, g_b loses its part
    along g_c, and the update is made of g_c + g_b. The head's gradient and g_c are never changed. It costs a
    backward pass more for each further term.

    Made for ``dual-head-distillation`` beside cross-entropy; on small data the two hardly ever conflict, and
    it then changes nothing. The released code projects by the norm of all parameters, head included, which
    leaves a part of the conflict; this follows the paper.
    """

    slug = "gradient-alignment"
    formula = "g_b ← g_b − min(0, ⟨g_b, g_c⟩) g_c / ‖g_c‖²"
    paper = Paper(
        "Dual-Head Knowledge Distillation: Enhancing Logits Utilization with an Auxiliary Head",
        "Yang et al.",
        2025,
    )
    example = (
        'lossworks train jobs/specs/digits.yaml loss="[cross-entropy, dual-head-distillation]" '
        "roles.teacher=RUN methods=[{slug}]"
    )

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self._parameters: list[nn.Parameter] = []
        self._sums: list[list[Tensor]] = []  # of each further term, of each parameter
        self._counts = torch.zeros(0, dtype=torch.float64)
        self._weights: tuple[float, ...] = ()
        self._seen = torch.zeros(2, dtype=torch.float64)  # steps, and those with a conflict

    def check(self, task: type[Task], spec: RunSpec) -> None:
        """See :meth:`Method.check`."""
        super().check(task, spec)
        if len(spec.loss.terms) < 2:
            raise UserError(f"methods: {self.slug} needs a sum of losses: loss=[cross-entropy, …]")
        if spec.sharding.kind == "fsdp":
            raise UserError(
                f"methods: {self.slug} needs whole parameters on each worker: sharding=ddp or none, not fsdp"
            )
        for name in ("compile", "activation_checkpointing"):
            if getattr(spec, name):
                raise UserError(f"methods: {self.slug} can't be combined with {name}=true")
        for term in spec.loss.terms:
            if entry_class(term.name).adds != "elements":  # type: ignore[attr-defined]
                raise UserError(f"methods: {self.slug} needs losses of single elements, unlike {term.name}")

    def start(self, task: Task, model: nn.Module) -> None:
        """See :meth:`Method.start`."""
        own = cast("HeadedModel", getattr(model, "module", model))
        head = own.head()
        others = {id(p) for p in (*task.objective.parameters(), head.weight, head.bias)}
        self._parameters = [p for p in own.parameters() if p.requires_grad and id(p) not in others]
        self._clear()

    def loss(self, outputs: Outputs, batch: Batch, objective: Objective) -> Tensor:
        """See :meth:`Method.loss`; the terms are taken one by one, so that each has a gradient of its own."""
        impl = objective.spec.impl
        parts = [loss.sums(outputs, batch, impl=impl) for loss in objective.terms]
        objective.sizes, self._weights = [len(part) for part in parts], objective.weights
        counts = torch.tensor(objective.counts(batch), dtype=torch.float64)
        self._counts = counts + (self._counts if len(self._counts) else 0)
        found = [
            torch.autograd.grad(
                *(part.sum(), self._parameters), retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for part in parts[1:]
        ]
        before = self._sums or [[torch.zeros_like(p) for p in self._parameters] for _ in found]
        self._sums = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(before, found, strict=True)]
        return torch.cat(parts)

    def gradients(self, model: nn.Module, step: int) -> None:
        """See :meth:`Method.gradients`."""
        del model, step
        further = self._further()
        slopes = [cast("Tensor", p.grad) for p in self._parameters]
        first = [total - others for total, others in zip(slopes, further, strict=True)]
        product = _product(further, first)
        self._seen += torch.tensor([1.0, float(product < 0)], dtype=torch.float64)
        if product < 0:
            share = product / _product(first, first)
            for slope, own in zip(slopes, first, strict=True):
                slope.sub_((share * own.double()).to(slope.dtype))
        self._clear()

    def _further(self) -> list[Tensor]:
        """Return the gradient of all terms but the first, weighted, of the whole batch over all ranks."""
        counts = self._counts
        if dist.is_initialized() and dist.get_world_size() > 1:
            counts = counts.to(self._parameters[0].device)
            for tensor in (counts, *(g for term in self._sums for g in term)):
                dist.all_reduce(tensor)
        factors = [w / c if c else 0.0 for w, c in zip(self._weights, counts.tolist(), strict=True)][1:]
        return [
            torch.stack([f * g for f, g in zip(factors, of, strict=True)]).sum(0)
            for of in zip(*self._sums, strict=True)
        ]

    def _clear(self) -> None:
        self._sums, self._counts = [], torch.zeros(0, dtype=torch.float64)

    def finish(self, trained: Trained) -> Finding:
        """Return the share of steps at which the gradients conflicted."""
        del trained
        steps, conflicts = self._seen.tolist()
        return Finding({"alignment/conflicts": conflicts / steps if steps else 0.0})

    def state(self) -> dict[str, Tensor]:
        """See :meth:`Method.state`."""
        return {"seen": self._seen.clone()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """See :meth:`Method.load_state`."""
        self._seen = state["seen"].clone() if state else torch.zeros(2, dtype=torch.float64)


def _product(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Return ⟨a, b⟩ of tensors that belong together, a float64 scalar."""
    return torch.stack([(x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)]).sum()
