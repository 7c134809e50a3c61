"""Losses of bags: their identities, closed forms, private release, and the best size of a bag."""

import pytest
import torch

from lossworks.entries.losses.classification.aggregate import (
    bag_means,
    best_bag_size,
    linear_solution,
    release,
    shrinkage,
)
from lossworks.errors import UserError
from lossworks.losses import create

SLUG = "aggregate-interpolation"


def problem(n=12, k=3, seed=0):
    """Return predictions, responses and bags whose rows are not in order."""
    g = torch.Generator().manual_seed(seed)
    f, y = torch.randn(2, n, dtype=torch.float64, generator=g)
    return f.requires_grad_(), y, (torch.arange(n) // k)[torch.randperm(n, generator=g)]


def loops(f, y, bags, rho, loss):
    """Return the definition, written out."""
    total = 0.0
    for bag in bags.unique():
        rows = bags == bag
        mean_y, mean_f = y[rows].mean(), f[rows].mean()
        instance = sum(loss(mean_y, one) for one in f[rows])
        total += (1 - rho) * rows.sum() * loss(mean_y, mean_f) + rho * instance
    return total / len(f)


@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0])
def test_the_value_is_the_definition(rho):
    """For real and for binary responses, with bags of unequal size."""
    f, y, _ = problem()
    bags = torch.tensor([0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 0, 2])
    squared = loops(f, y, bags, rho, lambda a, b: (a - b) ** 2)
    labels = (y > 0).double()
    p = f.sigmoid()
    binary = loops(p, labels, bags, rho, lambda a, b: -(a * b.log() + (1 - a) * (1 - b).log()))

    torch.testing.assert_close(create(SLUG, rho=rho)(f, y, segments=bags), squared)
    torch.testing.assert_close(create(SLUG, rho=rho, response="binary")(f, labels, segments=bags), binary)


@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0])
def test_classes_are_compared_with_their_shares_of_a_bag(rho):
    """The definition in loops, of four classes, and its gradient."""
    bags = torch.tensor([0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 0, 2])
    g = torch.Generator().manual_seed(0)
    z = torch.randn(12, 4, dtype=torch.float64, generator=g).requires_grad_()
    y = torch.randint(0, 4, (12,), generator=g)
    expected = 0.0
    for bag in bags.unique():
        rows = bags == bag
        share, p = torch.nn.functional.one_hot(y[rows], 4).double().mean(0), z[rows].softmax(1)
        of_rows = -(p.log() @ share).sum()
        expected += (1 - rho) * rows.sum() * -(share @ p.mean(0).log()) + rho * of_rows
    loss = create(SLUG, rho=rho, response="class")

    torch.testing.assert_close(loss(z, y, segments=bags), expected / 12)
    assert torch.autograd.gradcheck(lambda z: loss(z, y, segments=bags), (z,))


def test_two_classes_are_the_binary_case():
    """Of the difference of their logits."""
    f, _, bags = problem()
    y = torch.arange(12) % 2
    z = torch.stack((torch.zeros_like(f), f), 1) + 3.0

    found = create(SLUG, rho=0.3, response="class")(z, y, segments=bags)

    torch.testing.assert_close(found, create(SLUG, rho=0.3, response="binary")(f, y.double(), segments=bags))


@pytest.mark.parametrize("response", ["real", "binary", "class"])
def test_a_row_whose_response_is_unknown_is_in_no_bag(response):
    """NaN, or -100 of classes, whatever its prediction; nothing known is 0 without a gradient."""
    f, y, bags = problem()
    y, ignored = (y.sigmoid(), torch.nan) if response != "class" else ((y > 0).long(), -100)
    f = f if response != "class" else torch.stack((f, -f), 1)
    loss = create(SLUG, rho=0.4, response=response)
    known = torch.arange(12) != 2
    spoilt, targets = f.detach().clone(), torch.where(known, y, ignored)
    spoilt[2] = torch.nan
    spoilt.requires_grad_()

    value = loss(spoilt, targets, segments=bags)
    (gradient,) = torch.autograd.grad(value, spoilt)
    nothing = loss(spoilt, torch.full_like(targets, ignored), segments=bags)

    torch.testing.assert_close(value, loss(f[known], y[known], segments=bags[known]))
    assert gradient.isfinite().all()
    assert gradient[2].abs().max() == 0
    assert nothing == 0
    assert torch.autograd.grad(nothing, spoilt)[0].abs().max() == 0
    assert loss.count(targets) == 11


def test_the_two_differ_by_the_variance_within_bags():
    """The identity of squared errors; and bag loss is at most instance loss."""
    f, y, bags = problem()
    bag, instance = (create(SLUG, rho=rho)(f, y, segments=bags) for rho in (0.0, 1.0))

    torch.testing.assert_close(instance - bag, (f - bag_means(f, bags)).square().mean(), atol=1e-12, rtol=0)
    assert bag <= instance


@pytest.mark.parametrize("response", ["real", "binary"])
def test_gradients_and_reductions(response):
    """Finite differences; sums of parts of whole bags; rows of weight 0 are in no bag."""
    f, y, bags = problem()
    y = y.sigmoid()
    order = bags.argsort()
    f, y, bags = f.detach()[order].requires_grad_(), y[order], bags[order]
    none, total = (create(SLUG, rho=0.4, response=response, reduction=how) for how in ("none", "sum"))

    assert torch.autograd.gradcheck(lambda f: none(f, y, segments=bags), (f,))
    whole = total(f, y, segments=bags)
    parts = sum(total(f[rows], y[rows], segments=bags[rows]) for rows in (slice(3), slice(3, None)))
    torch.testing.assert_close(whole, parts)
    torch.testing.assert_close(none(f, y, segments=bags).sum(), whole)
    weight = torch.ones(12, dtype=torch.float64)
    weight[1] = 0
    without = [x[weight > 0] for x in (f, y)]
    torch.testing.assert_close(
        total(f, y, segments=bags, weight=weight), total(*without, segments=bags[weight > 0])
    )
    assert total(f, y, segments=bags, weight=torch.zeros(12)) == 0


def test_extremes_and_half_precision():
    """Logits of ±1e4 and bfloat16 give finite float32 losses and gradients."""
    for dtype in (torch.float32, torch.bfloat16):
        f = torch.tensor([1e4, -1e4, 1e4, 1e4], dtype=dtype, requires_grad=True)
        y, bags = torch.tensor([0.0, 1.0, 0.0, 0.0]), torch.tensor([0, 0, 1, 1])
        value = create(SLUG, response="binary")(f, y, segments=bags)

        assert value.dtype == torch.float32
        assert value.isfinite()
        assert torch.autograd.grad(value, f)[0].isfinite().all()


def test_confident_mistakes_have_a_gradient():
    """As in cross-entropy of logits, where a probability has long rounded to 0 or 1."""
    f = torch.tensor([-40.0, -60.0, 50.0], requires_grad=True)
    y, bags = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0, 0, 1])
    for rho, expected in ((0.0, [-2.0, 0.0, 1.0]), (1.0, [-1.0, -1.0, 1.0])):
        loss = create(SLUG, response="binary", rho=rho, reduction="sum")
        (gradient,) = torch.autograd.grad(loss(f, y, segments=bags), f)
        torch.testing.assert_close(gradient, torch.tensor(expected))


def test_bags_have_any_names():
    """Negative and huge ones, as hashes are; only integers."""
    f, y, bags = problem()
    loss = create(SLUG, rho=0.4)

    torch.testing.assert_close(loss(f, y, segments=bags * 10**15 - 7), loss(f, y, segments=bags))
    with pytest.raises(UserError, match=r"bags are torch\.float64"):
        loss(f, y, segments=bags.double())
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    named = [
        release(y, b, clip=1.0, epsilon=1.0, generator=g)
        for b, g in zip((bags, bags - 5), generators, strict=True)
    ]
    assert torch.equal(*named)
    with pytest.raises(UserError, match="a response is NaN"):
        release(y * torch.nan, bags, clip=1.0, epsilon=1.0, generator=generators[0])


def test_the_linear_solution_is_the_minimiser_and_shrinks_as_predicted():
    """Gradient zero; the factors 0.625 and 1/3 of the sheet at k = 3 on many bags."""
    g = torch.Generator().manual_seed(0)
    theta = torch.tensor([1.0, -0.5], dtype=torch.float64)
    x = torch.randn(300_000, 2, dtype=torch.float64, generator=g)
    y = x @ theta + 0.1 * torch.randn(300_000, dtype=torch.float64, generator=g)
    for rho, factor in ((0.3, 0.625), (1.0, 1 / 3)):
        found = linear_solution(x, y, 3, rho)
        assert shrinkage(rho, 3) == pytest.approx(factor)
        torch.testing.assert_close(found, factor * theta, atol=0.01, rtol=0)
    small = x[:30]
    solution = linear_solution(small, y[:30], 3, 0.3).requires_grad_()
    loss = create(SLUG, rho=0.3)(small @ solution, y[:30], segments=torch.arange(30) // 3)
    assert torch.autograd.grad(loss, solution)[0].abs().max() < 1e-12


def test_the_release_hides_a_label_in_laplace_noise():
    """Noise of the right scale on clipped means, one number a bag, the same for the same seed."""
    bags = torch.arange(40_000) // 4
    y = torch.where(torch.arange(40_000) % 4 == 0, 100.0, 0.0).double()

    def released(seed):
        return release(y, bags, clip=2.0, epsilon=0.5, generator=torch.Generator().manual_seed(seed))

    means = released(0).reshape(-1, 4)
    noise = means[:, 0] - 0.5  # 100 is clipped to 2, and a quarter of that

    assert (means == means[:, :1]).all()
    assert torch.equal(released(0), released(0))
    assert noise.abs().mean() == pytest.approx(2 * 2.0 / (4 * 0.5), rel=0.03)  # Laplace: E|x| is its scale
    assert noise.mean().abs() < 0.1
    with pytest.raises(UserError, match=r"epsilon=0\.0 must be positive"):
        release(y, bags, clip=1.0, epsilon=0.0, generator=torch.Generator())


def test_more_privacy_asks_for_larger_bags():
    """The best size does not fall as ε falls; it is 1 without noise, and an interior ρ wins at size 5."""
    setting = {"rows": 1000, "features": 25, "clip": 3.0, "draws": 4}
    best = [best_bag_size((1, 2, 5, 8), epsilon=epsilon, **setting) for epsilon in (None, 1.0, 0.3)]

    sizes = [size for size, _, _ in best]
    assert sizes == sorted(sizes)
    assert sizes[0] == 1
    assert sizes[-1] >= 5
    assert 0 < best_bag_size((5,), epsilon=None, **setting)[1] < 1


def test_what_does_not_fit_is_refused():
    """Segments that are missing or of another shape, responses of another shape."""
    f, y, bags = problem()
    with pytest.raises(UserError, match="needs the input segments"):
        create(SLUG)(f, y)
    with pytest.raises(UserError, match="segments must be shaped like responses"):
        create(SLUG)(f, y, segments=bags[:3])
    with pytest.raises(UserError, match=r"responses \(3,\) must be \(12,\)"):
        create(SLUG)(f, y[:3], segments=bags)
    classes = create(SLUG, response="class")
    with pytest.raises(UserError, match=r"predictions \(12,\) must be \(N, K\) with response=class"):
        classes(f, y.long(), segments=bags)
    with pytest.raises(UserError, match=r"classes must be torch\.int64"):
        classes(f[:, None].expand(-1, 3), y, segments=bags)
    with pytest.raises(UserError, match="targets hold 3"):
        classes(f[:, None].expand(-1, 3), torch.full((12,), 3), segments=bags)
