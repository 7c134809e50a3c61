"""Background adaptation with residual modelling (BARM): classes arrive in steps, without old images.

Shapes: B images of sides H, W; K_t classes of step t. Classes are numbered as in the data: 0 is the
background, then those of step 0, of step 1, and so on.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lossworks.adapters.torch_private import shapes_alone
from lossworks.catalogue.declaration import Paper, number, numbers, switch
from lossworks.data.batch import IGNORE_INDEX, Batch
from lossworks.errors import UserError
from lossworks.losses.objective import Objective
from lossworks.models import HeadedModel, Outputs
from lossworks.models.segmentation.incremental import IncrementalUNet, StepOutputs
from lossworks.specs import RunSpec
from lossworks.tasks.analyses import Finding
from lossworks.tasks.interface import Mode, Task
from lossworks.tasks.methods import Method, Trained


def residual_cross_entropy(residual: Tensor, new: Tensor) -> Tensor:
    """Return Σ softplus(δ)·pos / (Σ pos + 1e-8): the residual is pushed down where new classes are.

    Args:
        residual: δ_T, any shape.
        new: pos, 1 on pixels of new classes, shaped alike.
    """
    return (functional.softplus(residual) * new).sum() / (new.sum() + 1e-8)


def residual_triplet(residual: Tensor, background: Tensor) -> Tensor:
    """Return Σ max(0, (σ(δ) − 1)² − σ(δ)²)·neg / (Σ neg + 1e-8): the residual must not fall elsewhere.

    It equals the mean of max(0, 1 − 2σ(δ)), which is 0 where δ ≥ 0.

    Args:
        residual: δ_T, any shape.
        background: neg, 1 on pixels labelled as background, shaped alike.
    """
    sure = residual.sigmoid()
    violated = ((sure - 1) ** 2 - sure**2).clamp(min=0)
    return (violated * background).sum() / (background.sum() + 1e-8)


def pixelwise(logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """Return the binary cross-entropies of all channels, summed, as a mean over the pixels that count.

    Args:
        logits: Of each class by itself, (B, H, W, K).
        targets: In [0, 1], shaped alike.
        valid: Which pixels count, bool, (B, H, W).
    """
    values = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(-1)
    return torch.where(valid, values, 0).sum() / valid.sum().clamp(min=1)


def with_pseudo_labels(targets: Tensor, previous: Tensor, threshold: float) -> Tensor:
    """Return targets (B, H, W) in which the background holds what a previous model is sure of.

    Args:
        targets: Classes or -100, int64.
        previous: Its logits of background and classes, each by a sigmoid of its own, (B, H, W, 1 + K).
        threshold: Least probability of a class that is taken.
    """
    p, label = previous.sigmoid().max(-1)
    return torch.where((targets == 0) & (label > 0) & (p >= threshold), label, targets)


class Barm(Method):
    """BARM: each step of class-incremental segmentation learns a residual of the background's logit.

    Needs ``model.kind=incremental-unet``, whose heads are those of the steps. In each step the classes of all
    other steps are labelled as background: this is the field's overlapped setting, in which no image is kept
    but a new image may show old things. In step T the terms are, with δ the residual of T:

    - binary cross-entropy of background and classes, of which only δ and the new classes learn; where the
      label is background, the previous model's answer is taken if it is sure enough;
    - softplus(δ) on pixels of new classes, and max(0, 1 − 2σ(δ)) on the background's;
    - of old heads, binary cross-entropy against what the previous model said;
    - of old heads' features on background, the squared distance to the previous model's.

    Their means are over the pixels of a micro-batch. In training δ is not cut at 0 and at the end it is, as
    in the released code; ``clamp_residual`` cuts it always. The released triplet term is 0/0 where a crop has
    no background. With ``residual``, ``detach_old`` and ``distil`` off it is plain fine-tuning.

    Use it where old images may not be kept and the old classes are well learnt: on drawn shapes fine-tuning
    forgot all of them, while BARM kept an IoU of 0.97 in one seed and of 0.22 to 0.29 in four, and found the
    new class 0.15 worse.
    """

    slug = "barm"
    formula = "bg = sg(b_0 + Σ_{0<t<T} min(δ_t, 0)) + δ_T"
    paper = Paper(
        "Background Adaptation with Residual Modeling for Exemplar-Free Class-Incremental Semantic "
        "Segmentation",
        "Zhang, Gao",
        2024,
    )
    example = "lossworks train jobs/specs/steps.yaml"
    yardsticks: ClassVar[Mapping[str, Mode]] = {
        "barm/old_iou": "max",
        "barm/new_iou": "max",
        "barm/background_iou": "max",
    }
    newest: ClassVar[bool] = True

    starts: tuple[float, ...] = numbers((100.0,), "optimiser step after which each later step begins", ge=1)
    threshold: float = number(0.7, "least probability of a pseudo label", ge=0, le=1, search=(0.5, 0.9))
    triplet: float = number(5.0, "weight of max(0, 1 − 2σ(δ)) on background", ge=0, search=(1, 10))
    adaptation: float = number(1.0, "weight of softplus(δ) on new classes", ge=0, search=(0.1, 10), log=True)
    features: float = number(4.0, "weight of the old heads' features", ge=0, search=(1, 8))
    heads: float = number(1.0, "weight of the old heads' answers", ge=0, search=(0.1, 10), log=True)
    old_rate: float = number(
        0.1,
        "factor of the updates of all that is older than the step",
        ge=0,
        le=1,
        search=(0.01, 1),
        log=True,
    )
    residual: bool = switch(True, "learn δ; off, the background's first logit goes on learning")
    detach_old: bool = switch(True, "cross-entropy teaches δ and new classes alone")
    distil: bool = switch(True, "the terms of old heads, and pseudo labels")
    clamp_residual: bool = switch(False, "cut δ at 0 in training, too")

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self._model: IncrementalUNet | None = None
        self._previous: IncrementalUNet | None = None
        self._kept: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}

    def check(self, task: type[Task], spec: RunSpec) -> None:
        """See :meth:`Method.check`."""
        super().check(task, spec)
        steps = getattr(getattr(spec, "model", None), "steps", ())
        if not steps:
            raise UserError(f"methods: {self.slug} needs model.kind=incremental-unet with model.steps")
        if len(self.starts) != len(steps) - 1 or list(self.starts) != sorted(set(self.starts)):
            raise UserError(
                f"methods: {self.slug}.starts={list(self.starts)} must be {len(steps) - 1} rising numbers, "
                f"one for each of model.steps={list(steps)} but the first"
            )
        if self.starts and self.starts[-1] >= spec.steps:
            raise UserError(
                f"methods: {self.slug}.starts={list(self.starts)}: the last step must begin before "
                f"steps={spec.steps}"
            )
        if spec.sharding.kind == "fsdp":
            raise UserError(f"methods: {self.slug} needs whole parameters: sharding=ddp or none, not fsdp")

    def fit_to(self, task: Task, model: HeadedModel) -> None:
        """See :meth:`Method.fit_to`."""
        del task
        cast("IncrementalUNet", model).step.fill_(0)
        self._kept = {name: value.detach().clone() for name, value in model.state_dict().items()}

    def start(self, task: Task, model: nn.Module) -> None:
        """See :meth:`Method.start`."""
        del task
        self._model = cast("IncrementalUNet", getattr(model, "module", model))
        if int(self._model.step):  # it goes on in a later step
            self._previous = self._companion(self._kept)

    def _companion(self, state: Mapping[str, Tensor]) -> IncrementalUNet:
        """Return a frozen model with a state."""
        found = deepcopy(self._own())
        found.load_state_dict(state)
        return found.requires_grad_(False).eval()

    def _own(self) -> IncrementalUNet:
        if self._model is None:
            raise ValueError(f"{self.slug} has not been started")
        return self._model

    def batch(self, batch: Batch, step: int) -> Batch:
        """See :meth:`Method.batch`; classes of other steps are labelled as background."""
        model, now = self._own(), sum(step > begin for begin in self.starts)
        if now != int(model.step):
            self._advance(model, now)
        counts = [head.out_features - 1 for head in model.linear]
        first = 1 + sum(counts[:now])
        targets = batch["targets"]
        kept = ((targets >= first) & (targets < first + counts[now])) | (targets == IGNORE_INDEX)
        return {**batch, "targets": torch.where(kept, targets, 0)}

    @torch.no_grad()
    def _advance(self, model: IncrementalUNet, now: int) -> None:
        """Keep the model as the previous one, and begin a step whose features start as the first head's."""
        self._kept = {name: value.clone() for name, value in model.state_dict().items()}
        self._previous = self._companion(self._kept)
        model.ears[now].load_state_dict(model.ears[0].state_dict())
        model.step.fill_(now)

    def loss(self, outputs: Outputs, batch: Batch, objective: Objective) -> Tensor:
        """See :meth:`Method.loss`; a mean over the pixels of the micro-batch, times their number."""
        del objective
        valid = batch["targets"] != IGNORE_INDEX
        found = StepOutputs.of(outputs)
        if len(found.heads) == 1:
            value = pixelwise(found.heads[0], one_hot(batch["targets"], found.heads[0]), valid)
        else:
            value = self._later(found, batch, valid)
        return (value * valid.sum()).reshape(1)

    def _later(self, found: StepOutputs, batch: Batch, valid: Tensor) -> Tensor:
        """Return the weighted terms of a later step."""
        targets, delta = batch["targets"], found.heads[-1][..., 0]
        before = self._earlier(found, batch)
        background, new = ((targets == 0).to(delta), (valid & (targets > 0)).to(delta))
        total = self._cross_entropy(found, before, targets, valid)
        if self.residual:
            total = total + self.triplet * residual_triplet(delta, background)
            total = total + self.adaptation * residual_cross_entropy(delta, new)
        if self.distil:
            pairs = zip(found.heads, before.heads, strict=False)  # the newest has no counterpart
            told = [pixelwise(own, old.sigmoid(), torch.ones_like(valid)) for own, old in pairs]
            total = total + self.heads * torch.stack(told).sum()
            total = total + self.features * feature_distance(found.ears, before.ears, background)
        return total

    @torch.no_grad()
    def _earlier(self, found: StepOutputs, batch: Batch) -> StepOutputs:
        """Return what the previous model says; in a plan, which starts no method, tensors of its shapes."""
        if shapes_alone():
            ears, heads = ([one.detach() for one in part[:-1]] for part in (found.ears, found.heads))
            return StepOutputs(ears, heads)
        return StepOutputs.of(cast("IncrementalUNet", self._previous).read(batch["inputs"]))

    def _cross_entropy(
        self, found: StepOutputs, before: StepOutputs, targets: Tensor, valid: Tensor
    ) -> Tensor:
        logits = torch.cat((self._background(found)[..., None], self._classes(found)), -1)
        if self.distil:
            previous = torch.cat((before.background(len(before.heads))[..., None], before.classes()), -1)
            targets = with_pseudo_labels(targets, previous, self.threshold)
        return pixelwise(logits, one_hot(targets, logits), valid)

    def _background(self, found: StepOutputs) -> Tensor:
        """Return the background's logit, of which only the newest residual learns."""
        if not self.residual:
            return found.heads[0][..., 0]
        older = StepOutputs(found.ears[:-1], found.heads[:-1])
        delta = found.heads[-1][..., 0]
        return older.background(len(older.heads)).detach() + (
            delta.clamp(max=0) if self.clamp_residual else delta
        )

    def _classes(self, found: StepOutputs) -> Tensor:
        """Return the logits of the classes, of which only the newest learn unless the old ones shall, too."""
        own = [head[..., 1:] for head in found.heads]
        return torch.cat([*(head.detach() if self.detach_old else head for head in own[:-1]), own[-1]], -1)

    def gradients(self, model: nn.Module, step: int) -> None:
        """See :meth:`Method.gradients`."""
        del model, step
        own = self._own()
        if self._previous is not None and self.old_rate < 1:
            newest = f".{int(own.step)}."
            self._before = {
                name: value.detach().clone()
                for name, value in own.named_parameters()
                if not (name.startswith(("ears", "heads")) and newest in name)
            }

    @torch.no_grad()
    def after_step(self, model: nn.Module, step: int) -> None:
        """See :meth:`Method.after_step`; a shorter update is a smaller rate, whatever the optimiser."""
        del model, step
        parameters = dict(self._own().named_parameters())
        for name, value in self._before.items():
            parameters[name].copy_(value + self.old_rate * (parameters[name] - value))
        self._before = {}

    def finish(self, trained: Trained) -> Finding:
        """Return the mean IoU of the classes before the last step, of its own, and of background."""
        rows = np.arange(len(trained.task.held_out))
        sums = trained.collect(_overlaps, trained.task.held_out, rows).sum(0).reshape(3, -1)
        both, answers, own = sums
        iou = both / (answers + own - both).clamp(min=1)
        last = self._own().linear[-1].out_features - 1
        present = own > 0
        figures = {
            "background": iou[:1],
            "old": iou[1:-last][present[1:-last]],
            "new": iou[-last:][present[-last:]],
        }
        return Finding({f"barm/{name}_iou": float(v.mean()) for name, v in figures.items() if len(v)})

    def state(self) -> dict[str, Tensor]:
        """See :meth:`Method.state`; the previous model."""
        return {name: value.clone() for name, value in self._kept.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """See :meth:`Method.load_state`."""
        self._kept = {name: value.clone() for name, value in state.items()}


def one_hot(targets: Tensor, logits: Tensor) -> Tensor:
    """Return classes (B, H, W) as one-hot targets shaped and typed like logits (B, H, W, K); 0 for -100."""
    return (targets[..., None] == torch.arange(logits.shape[-1], device=logits.device)).to(logits)


def feature_distance(ears: Sequence[Tensor], previous: Sequence[Tensor], background: Tensor) -> Tensor:
    """Return Σ_i of the mean squared distance of features on background, over all elements.

    Args:
        ears: Of all heads, (B, D, H, W) each.
        previous: Of the previous model's, one fewer.
        background: 1 on pixels labelled as background, (B, H, W).
    """
    on = background[:, None]
    pairs = zip(ears, previous, strict=False)
    return torch.stack([functional.mse_loss(own * on, old * on) for own, old in pairs]).sum()


def _overlaps(outputs: Outputs, batch: Batch) -> Tensor:
    """Return pixels of each class that are right, answered and there, of each image, (B, 3·K)."""
    targets, answers = batch["targets"], outputs.logits.argmax(-1)
    valid = (targets != IGNORE_INDEX)[..., None]
    own, said = (one_hot(labels, outputs.logits) * valid for labels in (targets, answers))
    return torch.cat([part.flatten(1, 2).sum(1) for part in (own * said, said, own)], -1)
