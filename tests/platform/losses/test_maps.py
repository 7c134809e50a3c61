"""Losses of whole maps: their values pixel by pixel, what counts, soft targets, and their peers'."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lossworks.adapters.torch_private import assumed_tensors
from lossworks.errors import UserError
from lossworks.losses import create, declarations
from lossworks.models.interface import Head, Outputs

MAPS = [slug for slug, entry in declarations("losses").items() if entry.kind == "map"]
IGNORE = -100
of_all = pytest.mark.parametrize("slug", MAPS)


def problem(images=4, classes=3, height=6, width=7, seed=0):
    """Return logits, targets with ignored pixels and an image that has none but those, and soft targets."""
    g = torch.Generator().manual_seed(seed)
    z = 2 * torch.randn(images, classes, height, width, dtype=torch.float64, generator=g)
    y = torch.randint(0, classes, (images, height, width), generator=g)
    y[0, :2, 3:] = IGNORE
    y[-1] = IGNORE
    soft = torch.randn(z.shape, dtype=torch.float64, generator=g).softmax(1)
    return z.requires_grad_(), y, soft


def pixels_of(z, y):
    """Return p and one-hot y of the pixels of an image that count, (K, N) each, in numpy."""
    z, y = z.detach().numpy(), y.numpy()
    shifted = np.exp(z - z.max(0))
    p = (shifted / shifted.sum(0))[:, y != IGNORE]
    return p, np.eye(len(z))[:, y[y != IGNORE]]


def ratios(p, y, e, first, alpha=0.5, beta=0.5):
    """Return the Tversky losses of the classes from ``first`` on; with halves that of Dice of 2e."""
    tp = (p * y).sum(1)[first:]
    false, missed = (p * (1 - y)).sum(1)[first:], ((1 - p) * y).sum(1)[first:]
    return 1 - (tp + e) / (tp + alpha * false + beta * missed + e)


def generalised(p, y, e):
    """Return the loss where every class is there."""
    w = y.sum(1) ** -2.0
    return 1 - (2 * (w * (p * y).sum(1)).sum() + e) / ((w * (p.sum(1) + y.sum(1))).sum() + e)


def nats(p, y):
    return -(y * np.log(p)).sum(0).mean()


FORMULAS = {
    "map-dice": [
        ({}, lambda p, y: ratios(p, y, 5e-6, 0).mean()),
        ({"smoothing": 0.5, "background": False}, lambda p, y: ratios(p, y, 0.25, 1).mean()),
    ],
    "generalised-dice": [({"smoothing": 0.1}, lambda p, y: generalised(p, y, 0.1))],
    "map-tversky": [
        ({"alpha": 0.3, "beta": 0.9, "smoothing": 0.2}, lambda p, y: ratios(p, y, 0.2, 0, 0.3, 0.9).mean())
    ],
    "ce-dice": [
        ({}, lambda p, y: nats(p, y) + ratios(p, y, 5e-6, 0).mean()),
        ({"dice_weight": 0.0}, nats),
    ],
    "map-focal": [
        ({}, lambda p, y: -(y * (1 - p) ** 2 * np.log(p)).sum(0).mean()),
        ({"gamma": 0.0}, nats),
        ({"gamma": 0.5}, lambda p, y: -(y * (1 - p) ** 0.5 * np.log(p)).sum(0).mean()),
    ],
}


@pytest.mark.parametrize(
    ("slug", "settings", "formula"), [(slug, *one) for slug, cases in FORMULAS.items() for one in cases]
)
def test_values_are_those_of_the_papers(slug, settings, formula):
    """Image by image in plain numpy, of the pixels that count; where none does, 0."""
    z, y, _ = problem()

    found = create(slug, reduction="none", **settings)(z, y)

    expected = [formula(*pixels_of(*image)) for image in zip(z[:-1], y[:-1], strict=True)]
    np.testing.assert_allclose(found.detach().numpy(), [*expected, 0.0], rtol=1e-9)


@of_all
def test_the_element_is_an_image(slug):
    """Sums of parts, the mean and weights; an image in which no pixel counts is not counted."""
    z, y, _ = problem()
    weight = torch.tensor([0.5, 2.0, 0.0, 3.0], dtype=torch.float64)
    none, total, mean = (create(slug, reduction=how) for how in ("none", "sum", "mean"))

    values = none(z, y)

    assert values.shape == (4,)
    assert values[3] == 0
    assert (values[:3] != 0).all()
    assert total.count(y) == 3
    torch.testing.assert_close(total(z[:1], y[:1]) + total(z[1:], y[1:]), values.sum())
    torch.testing.assert_close(mean(z, y), values.sum() / 3)
    torch.testing.assert_close(total(z, y, weight=weight), 0.5 * values[0] + 2 * values[1])
    (slope,) = torch.autograd.grad(total(z, y, weight=weight), z)
    assert slope[2:].abs().max() == 0
    assert slope[:2].abs().max() > 0


@of_all
def test_ignored_pixels_may_hold_anything(slug):
    """NaN in logits and in soft targets; they get no gradient."""
    z, y, soft = problem()
    blank = (y == IGNORE)[:, None]
    loss = create(slug, reduction="none")
    for given in ({}, {"soft_targets": soft}):
        spoilt = {name: value.masked_fill(blank, torch.nan) for name, value in given.items()}
        values = loss(z.masked_fill(blank, torch.nan), y, **spoilt)
        (slope,) = torch.autograd.grad(values.sum(), z)

        assert torch.equal(values, loss(z.masked_fill(blank, 0.0), y, **given))
        assert slope.isfinite().all()
        assert slope.masked_select(blank.expand_as(slope)).abs().max() == 0


@of_all
def test_soft_targets_take_the_place_of_hard_ones(slug):
    """One-hot ones change nothing, others do; their gradients are those of finite differences."""
    z, y, soft = problem(images=2, height=4, width=4)
    y[0, 0, 0] = 1
    loss = create(slug, reduction="none")
    hard = torch.nn.functional.one_hot(y.clamp(min=0), 3).movedim(-1, 1).double()

    torch.testing.assert_close(loss(z, y, soft_targets=hard), loss(z, y))
    reads_none = "label-free" in loss.flags
    assert torch.allclose(loss(z, y, soft_targets=soft)[0], loss(z, y)[0]) == reads_none
    assert torch.autograd.gradcheck(lambda z: loss(z, y, soft_targets=soft), (z,), fast_mode=True)
    assert torch.autograd.gradcheck(lambda z: loss(z, y), (z,), fast_mode=True)


@of_all
def test_from_a_model_s_outputs_and_under_autocast(slug):
    """Features and a head; bfloat16 logits are read in float32."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2, 6, 7, 4, generator=g), torch.randn(3, 4, generator=g)
    batch = {"targets": problem()[1][:2], "soft_targets": problem()[2][:2]}
    loss = create(slug, reduction="sum")
    z = (hidden @ weight.T).movedim(-1, 1)

    found = loss.of(Outputs(hidden, Head(weight)), batch)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = loss(z.bfloat16(), batch["targets"])

    torch.testing.assert_close(found, loss(z, batch["targets"], soft_targets=batch["soft_targets"]))
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, loss(z.bfloat16().double(), batch["targets"]).float())


@of_all
def test_odd_maps_have_finite_losses(slug):
    """One pixel, one line, one class only, and a class that no pixel has."""
    for shape in ((1, 2, 1, 1), (2, 2, 1, 9), (1, 3, 6, 6)):
        for label in (0, 1):
            for scale in (0.0, 1.0, 1e4):
                z = scale * torch.randn(shape, generator=torch.Generator().manual_seed(0))
                z.requires_grad_()
                y = torch.full((shape[0], *shape[2:]), label)

                value = create(slug)(z, y)
                (slope,) = torch.autograd.grad(value, z)

                assert value.isfinite(), (shape, label, scale)
                assert slope.isfinite().all(), (shape, label, scale)


@of_all
@pytest.mark.parametrize(
    ("logits", "targets", "given", "message"),
    [
        ((2, 1, 3, 3), torch.zeros(2, 3, 3, dtype=torch.int64), {}, "must be .B, K, H, W. of two classes"),
        ((2, 3, 3), torch.zeros(2, 3, 3, dtype=torch.int64), {}, r"logits .2, 3, 3. must be"),
        ((2, 2, 3, 3), torch.zeros(2, 3, 4, dtype=torch.int64), {}, r"targets .2, 3, 4. must be .2, 3, 3."),
        ((2, 2, 3, 3), torch.zeros(2, 3, 3), {}, r"targets are torch.float32; they must be torch.int64"),
        ((2, 2, 3, 3), torch.full((2, 3, 3), 2), {}, r"targets hold 2.*a class is in .0, 2.,"),
        (
            (2, 2, 3, 3),
            torch.zeros(2, 3, 3, dtype=torch.int64),
            {"weight": torch.ones(2, 3, 3)},
            r"weight .2, 3, 3. must be .2,.",
        ),
        (
            (2, 2, 3, 3),
            torch.zeros(2, 3, 3, dtype=torch.int64),
            {"soft_targets": torch.ones(2, 3, 3)},
            r"soft_targets .2, 3, 3. must be .2, 2, 3, 3.",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(slug, logits, targets, given, message):
    """With its shape or value, and what it must be."""
    with pytest.raises(UserError, match=message):
        create(slug)(torch.zeros(logits), targets, **given)


def test_a_class_that_is_nowhere_costs_nothing_in_dice():
    """And the generalised form gives it the weight of the rarest that is there."""
    z = (
        torch.tensor([[8.0, -8.0, -60.0], [-8.0, 8.0, -60.0]]).double().T[None, :, None]
    )  # one sure class each
    y = torch.tensor([[[0, 1]]])
    p, hot = pixels_of(z[0], y[0])

    assert create("map-dice")(z, y) < 1e-6
    absent = create("generalised-dice")(torch.zeros(1, 3, 1, 2, dtype=torch.float64), y)
    third = 1 / 3
    assert absent.item() == pytest.approx(1 - (4 * third + 1e-5) / (2 + 2 + 1e-5))
    assert generalised(p[:2], hot[:2], 1e-5) == pytest.approx(
        create("generalised-dice")(z, y).item(), abs=1e-6
    )


def test_the_peers_values():
    """MONAI's losses of each image, and those of segmentation-models-pytorch, which sums over a batch."""
    monai = pytest.importorskip("monai.losses")
    z, y, _ = problem()
    z, y = z[1:3].float(), y[1:3]  # every class is there
    one_hot = {"to_onehot_y": True, "softmax": True}
    smooth = {"smooth_nr": 1e-5, "smooth_dr": 1e-5}
    pairs = [
        (create("map-dice"), monai.DiceLoss(**one_hot, **smooth)),
        (create("map-dice", background=False), monai.DiceLoss(**one_hot, **smooth, include_background=False)),
        (create("generalised-dice"), monai.GeneralizedDiceLoss(**one_hot, **smooth)),
        (
            create("map-tversky", alpha=0.3, beta=0.7),
            monai.TverskyLoss(**one_hot, **smooth, alpha=0.3, beta=0.7),
        ),
        (create("ce-dice"), monai.DiceCELoss(**one_hot, **smooth)),
    ]
    for own, peer in pairs:
        torch.testing.assert_close(own(z, y), peer(z, y[:, None]), rtol=1e-5, atol=1e-6)
    focal = monai.FocalLoss(to_onehot_y=True, use_softmax=True, gamma=2.0)
    torch.testing.assert_close(create("map-focal")(z, y), 3 * focal(z, y[:, None]))


def test_the_values_of_segmentation_models():
    """Of one image, since it sums over the batch."""
    smp = pytest.importorskip("segmentation_models_pytorch.losses")
    z, y, _ = problem()
    z, y = z[1:2].float(), y[1:2]
    pairs = [
        (create("map-dice"), smp.DiceLoss("multiclass", smooth=1e-5)),
        (
            create("map-tversky", alpha=0.3, beta=0.7),
            smp.TverskyLoss("multiclass", smooth=1e-5, alpha=0.3, beta=0.7),
        ),
    ]
    for own, peer in pairs:
        torch.testing.assert_close(own(z, y), peer(z, y), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("slug", ["skeleton-recall", "betti-matching"])
def test_what_looks_at_values_is_not_compiled(slug, monkeypatch):
    """It would be traced without them, and so have another value."""
    z, y, _ = problem(images=2)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)

    with pytest.raises(UserError, match="looks at values on the CPU: compile the model without it"):
        create(slug)(z, y)


@of_all
@pytest.mark.parametrize("assumed", [False, True])
def test_shapes_alone_are_enough_to_plan_with(slug, assumed):
    """As a run is planned before it starts: no values are looked at, or they are assumed."""
    with FakeTensorMode(), assumed_tensors() if assumed else nullcontext():
        z = torch.zeros(2, 3, 8, 8, requires_grad=True)
        value = create(slug)(z, torch.zeros(2, 8, 8, dtype=torch.int64))
        (slope,) = torch.autograd.grad(value, z)

    assert slope.shape == z.shape
