"""Entropies of attention: a penalty on heads that leave their band, and a look at all heads."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lossworks.catalogue.declaration import Paper, number
from lossworks.data.batch import Batch
from lossworks.errors import UserError
from lossworks.losses.interface import Loss
from lossworks.losses.problems import Problem, of_sequences
from lossworks.losses.rows import wide
from lossworks.models.interface import HeadedModel, LanguageModel, Outputs
from lossworks.specs import RunSpec
from lossworks.tasks.analyses import Analysis, Curve, Finding, Probe
from lossworks.tasks.interface import Mode, Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PAPER = Paper("Entropy-Guided Attention for Private LLMs", "Jha, Reagen", 2025, "algorithm 1")
_FIGURES = ("uniform_heads", "mean_deviation", "mean_entropy")
_UNIFORM = 0.75  # of the maximum, above which a head reads almost everything alike


def mean_entropies(entropies: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return each head's mean entropy over the queries of a sequence that count, and the largest there is.

    Args:
        entropies: In nats, (…, M, H, L) of M layers, H heads and L queries.
        valid: Which queries count, (…, L) bool; what is in others may be anything.

    Returns:
        Means (…, M, H), 0 where no query counts; and log T (…), T the tokens up to the last query that
        counts, which filling behind it does not change.
    """
    counted = valid[..., None, None, :]
    means = torch.where(counted, entropies, 0).sum(-1) / counted.sum(-1).clamp(min=1)
    places = torch.arange(1, valid.shape[-1] + 1, device=valid.device)
    length = (places * valid).amax(-1).clamp(min=1)
    return means, length.to(means.dtype).log()


def entropy_penalty(means: Tensor, largest: Tensor, thresholds: Tensor | float, margin: float) -> Tensor:
    """Return the penalties δ²·1[|δ| > γ·E_max] of heads, δ = E − θ·E_max, in nats²; (…, M, H).

    Args:
        means: E, (…, M, H), in nats.
        largest: E_max, (…), in nats.
        thresholds: θ, (M, H) or one number.
        margin: γ.
    """
    top = largest[..., None, None]
    delta = means - thresholds * top
    return torch.where(delta.abs() > margin * top, delta.square(), 0)


class AttentionEntropy(Loss):
    """A penalty on attention heads whose entropy leaves a band that is learnt for each.

    It keeps the heads of decoders with few nonlinearities from reading everything alike, and others from
    reading one token alone. A term beside another loss: `loss: [{name: cross-entropy}, {name:
    attention-entropy, weight: 1e-5}]`; the paper's weights are 1e-5 and 5e-5, a search looks from 1e-6 to
    1e-3, and small models take more. The entropies of a sequence are averaged over its queries first, then
    come penalty and mean over heads, layers and sequences, as the paper has it; its released code sums over
    queries and sequences, so that its weight grows with both. A query counts if its target does.

    Use it where models without norms or activations are trained (``model.norm=none model.activation=none``).
    Don't where heads are well: inside the band it has no gradient, at its border it jumps by (γ·log T)², and
    causal heads can't reach log T at all, and a head that reads all alike hardly feels it, for that is where
    entropy is largest and flat: in our study of a small decoder the thresholds went to the heads, and not the
    heads to the thresholds. It costs a further product of queries and keys a layer, and L × L numbers a head.
    """

    slug = "attention-entropy"
    kind: ClassVar[str] = "attention"
    formula = "mean over layers and heads of d² where |d| > γ·log T, d = E - θ·log T, E the mean entropy"
    paper = _PAPER
    without_logits = True
    flags = ("beside",)
    example: ClassVar[str] = (
        "lossworks train jobs/specs/demo.yaml "
        "'loss=[{name: cross-entropy}, {name: attention-entropy, weight: 1e-5}]'"
    )

    margin: float = number(0.2, "γ: half width of the band, in shares of log T", ge=0, lt=1, search=(0, 0.3))
    threshold: float = number(
        0.5, "θ at the start: middle of the band, in shares of log T; learnt for each head", ge=0, le=1
    )

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self.thresholds: nn.Parameter | None = None  # (M, H), once it has seen the model

    def fit_to(self, model: HeadedModel) -> None:
        """See :meth:`Loss.fit_to`; the model gives its entropies from now on.

        Raises:
            UserError: It is no language model, or can't give them.
        """
        if not isinstance(model, LanguageModel):
            raise UserError(f"{self.slug}: needs a language model")
        model.observe_attention()
        self.thresholds = nn.Parameter(torch.full(model.attention_shape(), self.threshold))

    def prediction(self, outputs: Outputs) -> Tensor:
        """Return the entropies of the model's attention."""
        return outputs.attention_entropies

    def forward(self, entropies: Tensor, targets: Tensor, **given: Tensor | None) -> Tensor:
        """Return the loss.

        Args:
            entropies: In nats, (…, M, H, L).
            targets: (…, L) int64; a query counts unless its target is ``ignore_index``.
            given: ``weight``, of each sequence (…).

        Returns:
            A scalar, or (…) for ``reduction="none"``; float32 at least.
        """
        context = self.context(given)
        valid = self.valid_rows(self.counting(targets, context))
        means, largest = mean_entropies(wide(entropies), valid)
        thresholds = self.threshold if self.thresholds is None else self.thresholds
        values = entropy_penalty(means, largest, thresholds, self.margin).mean((-2, -1))
        return self.reduce_elements(values, valid.any(-1), context)

    def count(self, targets: Tensor) -> Tensor:
        """Return the number of sequences that count."""
        return self.valid_rows(targets).any(-1).sum()

    def problem(self, rows: int, generator: torch.Generator) -> Problem:
        """See :meth:`Loss.problem`: entropies (rows, 2, 2, 3) from 0 to log 3, and a class for each query."""
        targets = of_sequences(rows, generator).target
        drawn = torch.rand(rows, 2, 2, targets.shape[1], dtype=torch.float64, generator=generator)
        return Problem(math.log(targets.shape[1]) * drawn, targets)


class HeadEntropies(Analysis):
    """How much each attention head reads at once: its entropy, as a share of the largest there is.

    A head near 1 reads everything alike, one near 0 a single token. ``uniform_heads`` is the share of heads
    above three quarters; ``mean_deviation`` the mean of |E − θ·log T| in nats: with each evaluation of a run
    that trains `attention-entropy`, of the θ that it has learnt by then, and elsewhere, `lossworks analyse`
    among it, of ``threshold``. Causal heads that read all before them alike have log(T!)/(T·log T), not 1:
    0.80 at 128 tokens.
    """

    slug = "head-entropies"
    formula = "E/log T of each layer and head, E the mean entropy of its queries"
    paper = _PAPER
    example = "lossworks train jobs/specs/demo.yaml analyses=[{slug}]"
    yardsticks: ClassVar[Mapping[str, Mode]] = {"eval/uniform_heads": "min", "eval/mean_deviation": "min"}

    threshold: float = number(0.5, "θ where no loss has learnt any, in shares of log T", ge=0, le=1)

    def check(self, task: type[Task], spec: RunSpec) -> None:
        """Refuse all but language models.

        Raises:
            UserError: Naming the task.
        """
        del spec
        if AttentionEntropy.kind not in task.kinds:
            raise UserError(f"analyses: {self.slug} looks at attention, which task={task.slug} has none of")

    def measure(self, probe: Probe) -> Finding:
        """See :meth:`Analysis.measure`.

        Raises:
            UserError: The model doesn't say what it reads.
        """
        learnt = [loss for loss in probe.task.objective.terms if isinstance(loss, AttentionEntropy)]
        shape: list[int] = []

        def sums(outputs: Outputs, batch: Batch) -> Tensor:
            entropies = outputs.attention_entropies
            shape[:] = entropies.shape[-3:-1]
            valid = probe.task.objective.terms[0].valid_rows(batch["targets"])
            means, largest = mean_entropies(entropies.double(), valid)
            # Inside the forward, where sharded thresholds are whole.
            own = learnt[0].thresholds if learnt else None
            middle = self.threshold if own is None else own.detach().double()
            top = largest[..., None, None]
            deviation = (means - middle * top).abs()
            share = torch.where(top > 0, means / top, 0)
            counted = valid.any(-1)
            found = torch.stack((share, deviation))[:, counted].sum(1)
            return torch.cat((counted.sum().double()[None], found.flatten()))

        count, *rest = probe.over(sums, probe.task.held_out, probe.held_out).tolist()
        share, deviation = torch.tensor(rest).reshape(2, *shape) / max(count, 1.0)
        found = ((share > _UNIFORM).double(), deviation, share)
        figures = {name: float(values.mean()) for name, values in zip(_FIGURES, found, strict=True)}
        return Finding(figures, {"share": share.tolist()})

    def draw(self, pictured: Mapping[str, Any], curves: Mapping[str, Curve]) -> "Figure | None":
        """Return a map of heads, and what became of them over the steps; see :meth:`Analysis.draw`."""
        return draw_heads(pictured["share"], {name: curves[name] for name in _FIGURES if name in curves})


def draw_heads(share: Sequence[Sequence[float]], curves: Mapping[str, Curve]) -> "Figure":
    """Return a picture of the heads' entropies, as shares of the largest, layers downwards.

    Args:
        share: Of M layers and H heads.
        curves: Steps and values of figures over a training, by name; drawn beside where given.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from lossworks.reporting.picture_style import STYLE, step_axis

    with mpl.rc_context(STYLE):
        columns = 2 if curves else 1
        figure = Figure(figsize=(5.5 * columns, 4), dpi=110, layout="constrained")
        axes = figure.add_subplot(1, columns, 1)
        image = axes.imshow(share, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        axes.set(title="Entropy of attention", xlabel="head", ylabel="layer")
        axes.grid(visible=False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, ax=axes, label="share of log T")
        if curves:
            beside = figure.add_subplot(1, columns, 2)
            for name, (steps, values) in curves.items():
                unit = " (nats)" if name == "mean_deviation" else ""
                beside.plot(steps, values, marker="o", markersize=3, label=name.replace("_", " ") + unit)
            beside.set_title("Over the training")
            beside.set_ylim(bottom=0)
            step_axis(beside)
            beside.legend()
    return figure
