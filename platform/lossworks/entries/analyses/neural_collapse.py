"""Neural collapse: what the last layer's features and the classifier become, predicted and measured.

Symbols: K classes of n_k examples, N in all; D features; W (K, D) the classifier, the product of M matrices;
M̄ (K, D) the class means of the features.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lossworks.catalogue.declaration import Paper, integer, number
from lossworks.data.batch import IGNORE_INDEX, Batch
from lossworks.errors import UserError
from lossworks.models import Head, Outputs
from lossworks.specs import RunSpec
from lossworks.tasks.analyses import Analysis, Curve, Finding, Probe
from lossworks.tasks.interface import Mode, Task, as_sums

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _exact(values: Tensor) -> Tensor:
    """Return a float64 copy on the CPU, where every device's sums meet the theory's figures."""
    return values.detach().cpu().double()


MATRICES = ("classifier", "features", "aligned")
_LARGEST = 100  # classes whose Gram matrices are kept for the picture


def _head(outputs: Outputs) -> Head:
    if outputs.head is None:
        raise ValueError("neural collapse is measured of models with a head")
    return outputs.head


@dataclass(frozen=True, eq=False)
class Grams:
    """Gram matrices of classifier and class means, measured or predicted, (K, K) float64 each.

    Attributes:
        classifier: W·Wᵀ.
        features: M̄·M̄ᵀ of the class means.
        aligned: W·M̄ᵀ.
        objective: Value of the regularised loss there; NaN where that is not known.
    """

    classifier: Tensor
    features: Tensor
    aligned: Tensor
    objective: float = math.nan

    @classmethod
    def of(cls, weight: Tensor, means: Tensor) -> "Grams":
        """Return those of W (K, D) and M̄ (K, D)."""
        return cls(weight @ weight.t(), means @ means.t(), weight @ means.t())

    @classmethod
    def simplex(cls, classes: int) -> "Grams":
        """Return those of the balanced optimum up to a factor: I − 11ᵀ/K."""
        one = torch.eye(classes, dtype=torch.float64) - 1 / classes
        return cls(one, one, one)


@dataclass(frozen=True, eq=False)
class ClassMoments:
    """Sums over examples that the measures are made of; those of parts, ranks or clients are added.

    Attributes:
        counts: n_k, (K,) float64.
        sums: Σ h by class, (K, D) float64.
        second: Σ h·hᵀ over all examples, (D, D) float64.
    """

    counts: Tensor
    sums: Tensor
    second: Tensor

    @classmethod
    def of(cls, features: Tensor, labels: Tensor, classes: int) -> "ClassMoments":
        """Return the sums of features (N, D) with labels (N,) in [0, classes), on the CPU.

        Raises:
            UserError: A label is out of range.
        """
        h, labels = _exact(features), labels.cpu()
        if bool(((labels < 0) | (labels >= classes)).any()):
            raise UserError(f"neural-collapse: labels must be in [0, {classes})")
        counts = torch.bincount(labels, minlength=classes).double()
        sums = h.new_zeros(classes, h.shape[1]).index_add(0, labels, h)
        return cls(counts, sums, h.t() @ h)

    @classmethod
    def unpacked(cls, numbers: Tensor, classes: int) -> "ClassMoments":
        """Return the sums that lie one behind the other in (K + K·D + D·D,)."""
        # K + K·D + D² = n
        width = round((-classes + math.sqrt(classes**2 + 4 * (len(numbers) - classes))) / 2)
        counts, sums, second = numbers.split([classes, classes * width, width * width])
        return cls(counts, sums.reshape(classes, width), second.reshape(width, width))

    def __add__(self, other: "ClassMoments") -> "ClassMoments":
        return ClassMoments(self.counts + other.counts, self.sums + other.sums, self.second + other.second)

    @property
    def means(self) -> Tensor:
        """Return the class means M̄, shape (K, D).

        Raises:
            UserError: A class has no example.
        """
        if bool((self.counts == 0).any()):
            raise UserError(f"neural-collapse: class {int(self.counts.argmin())} has no example")
        return self.sums / self.counts[:, None]


def predict_squared(
    counts: Sequence[int], decay_w: float, decay_h: float, depth: int, width: int | None = None
) -> Grams:
    """Return the optimum of (1/2N)‖W H − Y‖² + Σ_m (λ_W/2)‖W_m‖² + (λ_H/2)‖H‖² without a bias.

    A general orthogonal frame: class k's row has the squared length w_k² = N·λ_H·x_k^M, where x_k minimises
    1/(1+x^M) + b_k x over x ≥ 0 with b_k = M (N/n_k)(N·λ_W^M·λ_H)^{1/M}, and vanishes where x_k = 0. (The
    authors' code doesn't compare with x = 0, and so keeps classes that a large decay has made collapse.)

    Args:
        counts: n_k of every class.
        decay_w: λ_W of each of the M matrices.
        decay_h: λ_H.
        depth: M ≥ 1.
        width: The narrowest width; where it is below K only so many of the largest classes survive.

    Raises:
        UserError: A class has no example, or there is none.
    """
    if not counts or min(counts) < 1:
        raise UserError(f"neural-collapse: counts={list(counts)} must be at least 1 for every class")
    n = torch.tensor(counts, dtype=torch.float64)
    total = float(n.sum())
    scale = depth * (total * decay_w**depth * decay_h) ** (1 / depth)
    roots = torch.tensor([_smallest(scale * total / float(one), depth) for one in n], dtype=torch.float64)
    if width is not None and width < len(n):
        roots[n.argsort(descending=True, stable=True)[width:]] = 0.0
    losses = 1 / (1 + roots**depth) + scale * total / n * roots
    rows = total * decay_h * roots**depth
    denominator = rows + total * decay_h
    return Grams(
        torch.diag(rows),
        torch.diag(rows / denominator.square()),
        torch.diag(rows / denominator),
        float((n / (2 * total) * losses).sum()),
    )


def _smallest(b: float, depth: int) -> float:
    """Return the x ≥ 0 at which 1/(1+x^M) + b·x is least."""
    if depth == 1:
        return max(0.0, 1 / math.sqrt(b) - 1)

    def slope(x: float) -> float:
        return depth * x ** (depth - 1) / (1 + x**depth) ** 2 - b

    peak = ((depth - 1) / (depth + 1)) ** (1 / depth)
    if slope(peak) <= 0:
        return 0.0
    from scipy.optimize import brentq

    root = float(brentq(slope, peak, 1 + (depth / b) ** (1 / (depth + 1)), xtol=1e-15, rtol=1e-14))
    return root if 1 / (1 + root**depth) + b * root < 1 else 0.0


def predict_cross_entropy(classes: int, per_class: int, decay_w: float, decay_h: float) -> Grams:
    """Return the optimum of cross-entropy with (λ_W/2)‖W‖² + (λ_H/2)‖H‖², balanced, one matrix.

    A simplex: all Gram matrices are multiples of I − 11ᵀ/K, and the label's logit leads by
    t = log((K−1)(1−q)/q) with q = (K−1)√(n·λ_W·λ_H), or 0 where q ≥ (K−1)/K. (For deeper heads the simplex is
    not the optimum in general, so there is no prediction.)

    Args:
        classes: K ≥ 2.
        per_class: n, examples of each class.
        decay_w: λ_W.
        decay_h: λ_H.
    """
    q = (classes - 1) * math.sqrt(per_class * decay_w * decay_h)
    gap = math.log((classes - 1) * (1 - q) / q) if q < (classes - 1) / classes else 0.0
    simplex = torch.eye(classes, dtype=torch.float64) - 1 / classes
    ratio = math.sqrt(per_class * decay_h / decay_w)  # of the lengths of W's rows and the features
    objective = math.log1p((classes - 1) * math.exp(-gap)) + q * gap
    return Grams(gap * ratio * simplex, gap / ratio * simplex, gap * simplex, objective)


def within_over_between(moments: ClassMoments) -> float:
    """Return NC1 = tr(Σ_W·Σ_B⁺)/K, the variation within classes over that between them."""
    means, counts = moments.means, moments.counts
    total = counts.sum()
    within = (moments.second - (means * counts[:, None]).t() @ means) / total
    centred = means - moments.sums.sum(0) / total
    between = centred.t() @ centred / len(means)
    # Of rank K − 1, so a pseudo-inverse, which must not take rounding for rank.
    inverse = torch.linalg.pinv(between, rtol=1e-10, hermitian=True)
    return float((within * inverse).sum()) / len(means)


def misfit(found: Tensor, predicted: Tensor) -> float:
    """Return ‖A/‖A‖ − T/‖T‖‖ in the Frobenius norm: 0 for multiples of each other; NaN for a zero matrix."""
    return float((found / found.norm() - predicted / predicted.norm()).norm())


class NeuralCollapse(Analysis):
    """Neural collapse: features and classifier of a trained model beside the theory's optimum.

    NC1 is the variation within classes over that between; NC2 and NC3 are how far the Gram matrices of
    classifier and class means, and of the two together, are from the predicted ones up to a factor; NC4 is
    the share of examples that the classifier and the nearest class mean put into different classes.
    """

    slug = "neural-collapse"
    example = "lossworks train jobs/specs/digits.yaml analyses=[{slug}]"
    formula = (
        "NC1 = tr(Σ_W Σ_B⁺)/K; NC2, NC3 = ‖A/‖A‖ - T/‖T‖‖ for A = WWᵀ, M̄M̄ᵀ, WM̄ᵀ; NC4 = share of disagreement"
    )
    paper = Paper(
        "Neural Collapse in Deep Linear Networks: From Balanced to Imbalanced Data",
        "Dang et al.",
        2023,
        "ICML",
    )

    yardsticks: ClassVar[Mapping[str, Mode]] = {
        "eval/nc1": "min",
        "eval/nc2_classifier": "min",
        "eval/nc2_features": "min",
        "eval/nc3": "min",
        "eval/nc4": "min",
    }

    depth: int = integer(1, "M: linear layers after the free features", ge=1, le=99, search=(1, 9))
    decay_w: float = number(
        5e-4, "λ_W: decay of each linear layer, in (λ/2)‖W‖²", gt=0, search=(1e-5, 1e-2), log=True
    )
    decay_h: float = number(
        5e-4, "λ_H: decay of the features, in (λ/2)‖H‖²", gt=0, search=(1e-5, 1e-2), log=True
    )

    def check(self, task: type[Task], spec: RunSpec) -> None:
        """Refuse tasks without classes.

        Raises:
            UserError: Naming the task.
        """
        del spec
        task.require_classifier(f"analyses: {self.slug} looks at")

    def measure(self, probe: Probe) -> Finding:
        """Return NC1 to NC4 on the training examples, over all ranks.

        Gram matrices, for the picture, are kept of at most 100 classes.

        Raises:
            UserError: A class has no example.
        """
        data, names = probe.task.train, probe.task.class_names()
        rows = np.arange(len(data))
        weights: list[Tensor] = []

        def moments_of(outputs: Outputs, batch: Batch) -> Tensor:
            # Inside the forward, where a sharded head is whole.
            weights[:] = [_head(outputs).weight.detach().clone()]
            valid = batch["targets"] != IGNORE_INDEX
            found = ClassMoments.of(outputs.hidden[valid], batch["targets"][valid], len(names))
            return torch.cat((found.counts, found.sums.flatten(), found.second.flatten()))

        moments = ClassMoments.unpacked(probe.over(moments_of, data, rows), len(names))

        def disagreements(outputs: Outputs, batch: Batch) -> Tensor:
            valid = outputs.hidden[batch["targets"] != IGNORE_INDEX]
            head = _head(outputs)
            share = self.disagreement(valid, moments, head.weight, head.bias) if len(valid) else 0.0
            return as_sums(share * len(valid), like=outputs.hidden)

        expected = self.expect(moments.counts)
        figures = self.compare_grams(moments, weights[0], expected)
        figures["nc4"] = float(probe.over(disagreements, data, rows)) / len(data)
        if len(names) > _LARGEST:
            return Finding(figures)
        pair = dict(zip(("found", "predicted"), self.grams(moments, weights[0], expected), strict=True))
        return Finding(
            figures,
            {
                f"{which} {name}": getattr(grams, name).tolist()
                for which, grams in pair.items()
                for name in MATRICES
            },
        )

    def predict(self, counts: Sequence[int]) -> Grams:
        """Return the optimum under squared error; see :func:`predict_squared`."""
        return predict_squared(counts, self.decay_w, self.decay_h, self.depth)

    def expect(self, counts: Tensor) -> Grams | None:
        """Return what to compare a classifier trained on classes of ``counts`` (K,) with.

        None, which stands for the simplex, where the largest class is at most 1.2 times the smallest; else
        the optimum under squared error, whose rows grow with their classes.
        """
        balanced = float(counts.max()) <= 1.2 * float(counts.min())
        return None if balanced else self.predict([int(count) for count in counts])

    def compare_grams(
        self, moments: ClassMoments, weight: Tensor, predicted: Grams | None = None
    ) -> dict[str, float]:
        """Return NC1, NC2 of classifier and features, and NC3.

        Args:
            moments: Of the training examples' features.
            weight: W, (K, D).
            predicted: What to compare with; None for the simplex, for which the means are centred.
        """
        found, predicted = self.grams(moments, weight, predicted)
        return {
            "nc1": within_over_between(moments),
            "nc2_classifier": misfit(found.classifier, predicted.classifier),
            "nc2_features": misfit(found.features, predicted.features),
            "nc3": misfit(found.aligned, predicted.aligned),
        }

    def grams(
        self, moments: ClassMoments, weight: Tensor, predicted: Grams | None = None
    ) -> tuple[Grams, Grams]:
        """Return what was found and what is predicted; arguments as for :meth:`compare_grams`."""
        w, means = _exact(weight), moments.means
        if predicted is not None:
            return Grams.of(w, means), predicted
        centre = moments.sums.sum(0) / moments.counts.sum()
        return Grams.of(w - w.mean(0), means - centre), Grams.simplex(len(w))

    def disagreement(
        self, features: Tensor, moments: ClassMoments, weight: Tensor, bias: Tensor | None = None
    ) -> float:
        """Return NC4 of features (N, D): how often the classifier isn't the nearest class mean."""
        h = _exact(features)
        scores = h @ _exact(weight).t()
        scores = scores if bias is None else scores + _exact(bias)
        nearest = torch.cdist(h, moments.means).argmin(1)
        return float((scores.argmax(1) != nearest).double().mean())

    def draw(self, pictured: Mapping[str, Any], curves: Mapping[str, Curve]) -> "Figure | None":
        """Return a picture of the measured Gram matrices above the predicted ones; see :meth:`Analysis.draw`.

        The measures over a training are drawn below, where there are any.
        """
        found, predicted = (
            Grams(*(torch.tensor(pictured[f"{which} {name}"]) for name in MATRICES))  # type: ignore[arg-type]
            for which in ("found", "predicted")
        )
        return self.draw_grams(found, predicted, curves)

    @staticmethod
    def draw_grams(found: Grams, predicted: Grams, curves: Mapping[str, Curve] | None = None) -> "Figure":
        """Return a picture of the measured Gram matrices above the predicted ones, each of unit norm.

        Args:
            found: Measured.
            predicted: What to compare with.
            curves: Steps and values of measures over a training, by name; drawn below where given.
        """
        from matplotlib.figure import Figure

        titles = {
            "classifier": "classifier, W·Wᵀ",
            "features": "class means, M̄·M̄ᵀ",
            "aligned": "together, W·M̄ᵀ",
        }
        lines = 3 if curves else 2
        figure = Figure(figsize=(10, 3.3 * lines), dpi=110, layout="constrained")
        grid = figure.add_gridspec(lines, 3)
        for column, (name, title) in enumerate(titles.items()):
            unit = [matrix / matrix.norm() for matrix in (getattr(found, name), getattr(predicted, name))]
            reach = max(float(matrix.abs().max()) for matrix in unit)
            both = [figure.add_subplot(grid[line, column]) for line in range(2)]
            for axes, matrix, whose in zip(both, unit, ("measured", "predicted"), strict=True):
                image = axes.imshow(matrix.numpy(), cmap="RdBu_r", vmin=-reach, vmax=reach)
                axes.set_title(f"{whose}: {title}", fontsize=10)
                axes.set(xticks=[], yticks=[])
            figure.colorbar(image, ax=both, shrink=0.6)
        if curves:
            axes = figure.add_subplot(grid[2, :])
            for name, (steps, values) in curves.items():
                axes.plot(steps, values, marker="o", markersize=3, label=name)
            axes.set(xlabel="step", title="Measures: all 0 at full collapse")
            axes.set_yscale("symlog", linthresh=1e-2)
            axes.grid(color="#e4e7eb")
            axes.legend(ncols=5, fontsize=9)
        figure.suptitle("Neural collapse: Gram matrices of unit norm, classes in order")
        return figure
