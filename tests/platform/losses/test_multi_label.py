"""Decoupled softmax, binary cross-entropy and soft top-k: rows of scores against sets of labels."""

import math

import pytest
import torch

from lossworks.entries.losses.multi_label.soft_top_k import log_soft_top_k, threshold
from lossworks.errors import UserError
from lossworks.losses import create

IGNORE = -100
MILD = {"temperature": 0.7}
SETTINGS = [
    ("decoupled-softmax", MILD),
    ("decoupled-softmax", {}),
    ("binary-cross-entropy", {}),
    ("binary-cross-entropy", {**MILD, "positive_weight": 3.0}),
    ("soft-top-k", {**MILD, "k": 2}),
    ("soft-top-k", {**MILD, "k": 5, "alpha": 0.5}),
    ("soft-top-k", {**MILD, "k_of_row": True}),
]
SLUGS = ["decoupled-softmax", "binary-cross-entropy", "soft-top-k"]
by_setting = pytest.mark.parametrize(("slug", "settings"), SETTINGS)
# One row with each number of positives, one of a label given twice, none, and all of them.
SETS = [[3], [0, 5], [1, 2, 4], [6, 6, 0], [], [2, 3, 4, 5, 6, 0, 1]]


def positives_of(sets, width=8):
    """Return the sets as padded lists, the padding on both sides."""
    rows = [[IGNORE] * (len(s) % 2) + s for s in sets]
    return torch.tensor([(row + [IGNORE] * width)[:width] for row in rows])


def problem(*, dtype=torch.float64, seed=0):
    """Return scores of seven labels and the sets above."""
    g = torch.Generator().manual_seed(seed)
    scores = torch.randn(len(SETS), 7, dtype=dtype, generator=g)
    return scores.requires_grad_(), positives_of(SETS)


def decoupled(s, own):
    others = sum(math.exp(value) for k, value in enumerate(s) if k not in own)
    return sum(math.log1p(others / math.exp(s[j])) for j in own) / len(own)


def soft_top_k(s, own, k, alpha):
    def chosen(t):
        return [1 / (1 + math.exp(-alpha * (value + t))) for value in s]

    low, high = -500.0, 500.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(chosen(middle)) > k else (middle, high)
    return -sum(math.log(chosen(low)[j]) for j in own) / len(own)


def binary(s, own, weight):
    return sum(
        weight * math.log1p(math.exp(-value)) if k in own else math.log1p(math.exp(value))
        for k, value in enumerate(s)
    )


def of_rows(loss, scores):
    values = []
    for row, own in zip(scores.tolist(), map(set, SETS), strict=True):
        s = [value / loss.temperature for value in row]
        if not own:
            values.append(0.0)
        elif loss.slug == "binary-cross-entropy":
            values.append(binary(s, own, loss.positive_weight))
        elif len(own) == len(s):
            values.append(0.0)
        elif loss.slug == "decoupled-softmax":
            values.append(decoupled(s, own))
        else:
            values.append(soft_top_k(s, own, len(own) if loss.k_of_row else loss.k, loss.alpha))
    return torch.tensor(values, dtype=torch.float64)


@by_setting
def test_values_are_those_of_the_paper(slug, settings):
    """In every reduction, with weights, and in unequal parts; a row without positives doesn't count."""
    none, total, mean = (create(slug, reduction=how, **settings) for how in ("none", "sum", "mean"))
    scores, positives = problem()
    if settings == {}:
        scores = (0.1 * scores).detach()
    weight = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    values = none(scores, positives, weight=weight)
    parts = [total(scores[p], positives[p], weight=weight[p]) for p in (slice(2), slice(2, 6))]

    torch.testing.assert_close(values, weight * of_rows(none, scores))
    torch.testing.assert_close(total(scores, positives, weight=weight), values.sum())
    torch.testing.assert_close(sum(parts), values.sum())
    divisor = weight.sum() - weight[4]
    torch.testing.assert_close(mean(scores, positives, weight=weight), values.sum() / divisor)
    assert none.count(positives) == 5


@by_setting
def test_gradients_are_those_of_finite_differences(slug, settings):
    """Of every reduction, under a random upstream gradient, and none where nothing counts."""
    scores, positives = problem()
    for how in ("none", "sum", "mean"):
        loss = create(slug, reduction=how, **settings)
        upstream = torch.randn(loss(scores, positives).shape, dtype=torch.float64)

        assert torch.autograd.gradcheck(lambda s: loss(s, positives) * upstream, (scores,))  # noqa: B023
    (gradient,) = torch.autograd.grad(loss(scores, positives), scores)
    assert gradient[4].abs().max() == 0


@by_setting
def test_orders_and_shifts_change_nothing(slug, settings):
    """Of rows, of positives, of labels, and of a row's scores."""
    loss = create(slug, reduction="none", **settings)
    scores, positives = problem()
    values, order = loss(scores, positives), torch.tensor([3, 1, 5, 0, 2, 4, 6])
    back = order.argsort()
    moved = torch.where(positives >= 0, back[positives.clamp(min=0)], IGNORE)

    torch.testing.assert_close(
        loss(scores[order[order < 6]], positives[order[order < 6]]), values[order[order < 6]]
    )
    torch.testing.assert_close(loss(scores, positives.flip(1)), values)
    torch.testing.assert_close(loss(scores[:, order], moved), values)
    shifted = torch.allclose(loss(scores + 3.0, positives), values)
    assert shifted == ("shift" in loss.invariances)


@pytest.mark.parametrize("slug", SLUGS)
def test_rows_without_positives_may_hold_anything(slug):
    """Nothing else is 0 without a gradient."""
    scores, positives = problem()
    spoilt = scores.detach().clone()
    spoilt[4] = math.nan
    spoilt.requires_grad_()
    loss = create(slug)

    value = loss(spoilt, positives)
    (gradient,) = torch.autograd.grad(value, spoilt)
    nothing = loss(scores, torch.full_like(positives, IGNORE))

    torch.testing.assert_close(value, loss(scores, positives))
    assert gradient.isfinite().all()
    assert gradient[4].abs().max() == 0
    assert nothing == 0
    assert torch.autograd.grad(nothing, scores)[0].abs().max() == 0


@pytest.mark.parametrize("slug", SLUGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_scores_stay_finite(slug, dtype):
    """±1e4 on and off the positives, and equal ones; losses are float32."""
    scores = 1e4 * torch.tensor([[1, -1, 0, 0, -1], [-1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], dtype=dtype)
    scores.requires_grad_()
    for settings in ({}, {"temperature": 1.0}):
        loss = create(slug, reduction="none", **settings, **({"k": 2} if slug == "soft-top-k" else {}))
        for own in ([[0, 1], [0, 1], [3, 4]], [[1, IGNORE], [2, 3], [0, IGNORE]]):
            values = loss(scores, torch.tensor(own))

            assert values.dtype == torch.float32
            assert values.isfinite().all()
            assert torch.autograd.grad(values.sum(), scores)[0].isfinite().all()


@pytest.mark.parametrize("slug", SLUGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_as_good_as_its_inputs(slug, dtype):
    """Against float64 of the same rounded scores, at the paper's sharp temperature."""
    scores, positives = problem()
    rounded = scores.detach().to(dtype)
    loss = create(slug, reduction="none")

    found, true = loss(rounded, positives).double(), loss(rounded.double(), positives)

    assert ((found - true).abs() / true.clamp(min=1)).max() < 1e-5


def test_the_values_of_the_fact_sheet():
    """Row (2, 0, −1, 0.5) with positives 0 and 3."""
    scores = torch.tensor([[2.0, 0.0, -1.0, 0.5]], dtype=torch.float64)
    both, k = torch.tensor([[0, 3]]), torch.tensor([[2]])

    assert create("decoupled-softmax", temperature=1.0)(scores, both).item() == pytest.approx(
        0.3869883, abs=1e-7
    )
    assert create("soft-top-k", temperature=1.0, k=2)(scores, both).item() == pytest.approx(
        0.2690585, abs=1e-7
    )
    chosen = torch.tensor([[0.9682599, 0.3584541, 0.0703007, 0.6029854]], dtype=torch.float64)
    torch.testing.assert_close(log_soft_top_k(scores, k, 2.0).exp(), chosen, atol=1e-7, rtol=0)
    assert threshold(scores, k, 2.0).item() == pytest.approx(-0.2910401, abs=1e-7)


def test_one_positive_is_cross_entropy():
    """Decoupled softmax, at any temperature."""
    scores, _ = problem()
    y = torch.arange(6)

    found = create("decoupled-softmax", temperature=0.3)(scores, y[:, None])

    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(scores / 0.3, y))


def test_binary_cross_entropy_is_that_of_a_label_matrix():
    """Torch's, summed over labels, with rows of no positives among them if they are to count."""
    scores, positives = problem()
    matrix = torch.zeros(len(SETS), 7, dtype=torch.float64)
    for row, own in enumerate(SETS):
        matrix[row, own] = 1.0
    expected = torch.nn.functional.binary_cross_entropy_with_logits(scores, matrix, reduction="none").sum(1)

    loss = create("binary-cross-entropy", empty_rows=True, reduction="none")

    torch.testing.assert_close(loss(scores, positives), expected)
    assert loss.count(positives) == len(SETS)


def test_no_positive_is_ever_pushed_down():
    """Decoupled softmax's gradient of positives is never positive; cross-entropy's mean over them is."""
    scores = torch.tensor([[9.0, 0.0, -1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    decoupled = create("decoupled-softmax", temperature=1.0)(scores, torch.tensor([[0, 3]]))
    coupled = -scores.log_softmax(1)[0, [0, 3]].mean()

    assert (torch.autograd.grad(decoupled, scores)[0][0, [0, 3]] <= 0).all()
    assert torch.autograd.grad(coupled, scores)[0][0, 0] > 0


@pytest.mark.parametrize("alpha", [0.5, 2.0, 20.0])
def test_the_soft_choice_sums_to_k(alpha):
    """And its log-Jacobian's rows to 0, since a shift changes nothing."""
    scores = torch.randn(3, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    k = torch.tensor([[1], [5], [29]])

    torch.testing.assert_close(log_soft_top_k(scores, k, alpha).exp().sum(1), k[:, 0].double())
    jacobian = torch.autograd.functional.jacobian(lambda s: log_soft_top_k(s, k, alpha), scores)
    torch.testing.assert_close(jacobian.sum((2, 3)), torch.zeros(3, 30, dtype=torch.float64))


def test_a_sharp_choice_is_the_hard_one_and_its_threshold_halfway():
    """In float32 too, where the sum is k to the last digit for any threshold between."""
    scores = torch.tensor([[3.0, 1.0, -1.0, -2.0]])
    k = torch.tensor([[2]])

    torch.testing.assert_close(threshold(scores, k, 1e3), torch.tensor([[0.0]]), atol=1e-3, rtol=0)
    torch.testing.assert_close(log_soft_top_k(scores, k, 1e3).exp(), torch.tensor([[1.0, 1.0, 0.0, 0.0]]))


def test_the_threshold_is_found_among_many_labels():
    """Thirty thousand, where a bracket of 10/α around the scores holds no solution."""
    scores = torch.randn(1, 30_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-3
    k = torch.tensor([[1]])

    assert threshold(scores, k, 2.0) < -scores.max() - 10 / 2.0
    assert log_soft_top_k(scores, k, 2.0).exp().sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("slug", "scores", "positives", "message"),
    [
        (
            "soft-top-k",
            torch.zeros(2, 5),
            torch.zeros(2, 1).long(),
            "k=5 must be below the number of labels, 5",
        ),
        ("decoupled-softmax", torch.zeros(5), torch.zeros(2, 1).long(), r"scores \(5,\) must be \(N, L\)"),
        (
            "decoupled-softmax",
            torch.zeros(2, 5),
            torch.zeros(3, 1).long(),
            r"must be \(2, P\) of torch.int64",
        ),
        ("decoupled-softmax", torch.zeros(2, 5), torch.zeros(2, 1), r"of torch.float32 must be \(2, P\)"),
        ("decoupled-softmax", torch.zeros(2, 5), torch.full((2, 1), 5), "a class is in"),
    ],
)
def test_what_does_not_fit_is_refused(slug, scores, positives, message):
    """By name."""
    with pytest.raises(UserError, match=message):
        create(slug)(scores, positives)


def coupled(scores, positives):
    """Cross-entropy averaged over the positives, which lets them compete."""
    return -scores.log_softmax(1).gather(1, positives).mean()


@pytest.mark.parametrize(
    ("loss", "certain"),
    [(coupled, 0.2), (create("decoupled-softmax", temperature=1.0), 0.99)],
    ids=["coupled", "decoupled"],
)
def test_a_certain_label_may_be_certain(loss, certain):
    """Beside four labels that change, coupled cross-entropy holds the one that stays at 1/|P| = 0.2."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.zeros(32, 100, requires_grad=True)
    optimizer = torch.optim.Adam([scores], lr=0.1)
    for _ in range(400):
        others = torch.rand(32, 99, generator=generator).topk(4).indices + 1
        optimizer.zero_grad()
        loss(scores, torch.cat((others.new_zeros(32, 1), others), 1)).backward()
        optimizer.step()

    assert scores.softmax(1)[:, 0].mean().item() == pytest.approx(certain, abs=0.01)
