"""The theory of neural collapse against optimisation of the free-features problem, and its measures."""

import math

import pytest
import torch

from lossworks.entries.analyses.neural_collapse import (
    ClassMoments,
    misfit,
    predict_cross_entropy,
    predict_squared,
)
from lossworks.errors import UserError
from lossworks.losses import create

COUNTS = (20, 10, 5, 5)
DECAY_W, DECAY_H = 5e-3, 5e-4


def descended(counts, depth, loss, features, seed):
    """Minimise the regularised loss over free features and ``depth`` matrices from one start."""
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    g = torch.Generator().manual_seed(seed)
    sizes = [(features, len(labels)), *[(features, features)] * (depth - 1), (len(counts), features)]
    h, *matrices = (
        (0.3 * torch.randn(*size, dtype=torch.float64, generator=g)).requires_grad_() for size in sizes
    )
    limits = {"max_iter": 4000, "tolerance_grad": 1e-11, "tolerance_change": 1e-16}
    optimizer = torch.optim.LBFGS([h, *matrices], line_search_fn="strong_wolfe", **limits)

    def objective():
        product = matrices[0]
        for matrix in matrices[1:]:
            product = matrix @ product
        decay = DECAY_W / 2 * sum(matrix.square().sum() for matrix in matrices)
        return loss(product @ h, labels) + decay + DECAY_H / 2 * h.square().sum(), product

    def closure():
        optimizer.zero_grad()
        value = objective()[0]
        value.backward()
        return value

    optimizer.step(closure)
    value, product = objective()
    return value.detach(), product.detach(), h.detach().t(), labels


def optimum(counts, depth, loss, *, features=8, seeds=3):
    """Return the best of some starts: objective, W, features (N, D), labels."""
    return min(
        (descended(counts, depth, loss, features, seed) for seed in range(seeds)), key=lambda found: found[0]
    )


def squared(z, labels):
    return (z - torch.eye(len(z), dtype=z.dtype)[:, labels]).square().sum() / (2 * len(labels))


@pytest.mark.parametrize(
    ("depth", "rows"),
    [
        (1, (1.394214, 0.98, 0.687107, 0.687107)),
        (2, (1.56068, 0.97324, 0.60315, 0.60315)),
        (3, (1.6517, 0.96985, 0.56434, 0.56434)),
    ],
)
def test_the_predicted_optimum_is_the_one_that_is_found(depth, rows):
    """For unequal classes, and every depth: objective, Gram matrices, and the sheet's row lengths."""
    predicted = predict_squared(COUNTS, DECAY_W, DECAY_H, depth)
    value, weight, features, labels = optimum(COUNTS, depth, squared)
    moments = ClassMoments.of(features, labels, len(COUNTS))
    found = create("neural-collapse").compare_grams(moments, weight, predicted)

    assert predicted.classifier.diag().tolist() == pytest.approx(rows, abs=6e-6)
    assert value.item() == pytest.approx(predicted.objective, abs=1e-9)
    torch.testing.assert_close(weight @ weight.T, predicted.classifier, atol=1e-3, rtol=0)
    assert max(found.values()) < 1e-3
    assert create("neural-collapse").disagreement(features, moments, weight) == 0
    if depth == 1:
        assert predicted.objective == pytest.approx(0.0189421356, abs=1e-10)


def test_cross_entropy_of_balanced_classes_gives_the_simplex():
    """The sheet's gap and objective, and the optimum that is found."""
    predicted = predict_cross_entropy(4, 5, DECAY_W, DECAY_H)

    def loss(z, labels):
        return torch.nn.functional.cross_entropy(z.t(), labels)

    value, weight, features, labels = optimum((5, 5, 5, 5), 1, loss, seeds=1)
    moments = ClassMoments.of(features, labels, 4)

    assert predicted.objective == pytest.approx(0.0704233, abs=1e-7)
    assert predicted.aligned[0, 0] - predicted.aligned[0, 1] == pytest.approx(5.63423, abs=1e-5)
    assert value.item() == pytest.approx(predicted.objective, abs=1e-8)
    torch.testing.assert_close(weight @ moments.means.T, predicted.aligned, atol=1e-3, rtol=0)
    assert max(create("neural-collapse").compare_grams(moments, weight).values()) < 1e-3


def test_small_classes_vanish_under_a_large_decay():
    """Where zero is lower than the best root, which the authors' code overlooks; and for want of width."""
    collapsed = predict_squared((100, 10), 0.05, 0.05, 2).classifier.diag()
    narrow = predict_squared((20, 10, 5), DECAY_W, DECAY_H, 1, width=2).classifier.diag()

    assert collapsed[1] == 0
    assert (narrow > 0).tolist() == [True, True, False]
    assert predict_squared((3, 3), 10.0, 10.0, 1).objective == pytest.approx(0.5)
    assert predict_cross_entropy(3, 50, 1.0, 1.0).objective == pytest.approx(math.log(3))


def test_moments_add_up():
    """Those of parts are those of the whole; a class without an example is named."""
    g = torch.Generator().manual_seed(0)
    h, y = torch.randn(30, 5, generator=g), torch.arange(30) % 3
    whole = ClassMoments.of(h, y, 3)
    parts = ClassMoments.of(h[:7], y[:7], 3) + ClassMoments.of(h[7:], y[7:], 3)

    for name in ("counts", "sums", "second"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))
    with pytest.raises(UserError, match="class 3 has no example"):
        ClassMoments.of(h, y, 4).means  # noqa: B018
    for labels in (y - 1, y + 1):
        with pytest.raises(UserError, match=r"labels must be in \[0, 3\)"):
            ClassMoments.of(h, labels, 3)
    for counts in ((), (5, 0)):
        with pytest.raises(UserError, match="at least 1 for every class"):
            create("neural-collapse").predict(counts)


def test_variation_within_classes_is_measured_by_its_definition():
    """Against the covariances written out; and a multiple of the prediction fits it."""
    g = torch.Generator().manual_seed(1)
    h, y = torch.randn(40, 3, dtype=torch.float64, generator=g), torch.arange(40) % 4
    means = torch.stack([h[y == k].mean(0) for k in range(4)])
    within = sum(torch.outer(row - means[k], row - means[k]) for row, k in zip(h, y, strict=True)) / 40
    between = sum(torch.outer(mean - h.mean(0), mean - h.mean(0)) for mean in means) / 4
    found = create("neural-collapse").compare_grams(ClassMoments.of(h, y, 4), torch.randn(4, 3))

    assert found["nc1"] == pytest.approx(torch.trace(within @ torch.linalg.inv(between)).item() / 4)
    assert misfit(3 * means, means) == pytest.approx(0, abs=1e-12)


def test_the_picture_is_drawn(tmp_path):
    """Measured above, predicted below."""
    g = torch.Generator().manual_seed(2)
    moments = ClassMoments.of(torch.randn(40, 6, generator=g), torch.arange(40) % 4, 4)
    entry = create("neural-collapse", decay_w=DECAY_W)

    figure = entry.draw_grams(*entry.grams(moments, torch.randn(4, 6, generator=g), entry.predict(COUNTS)))
    figure.savefig(tmp_path / "a.png")

    assert len([axes for axes in figure.axes if axes.images]) == 6
