"""The BASNet hybrid: each part in plain numbers, exact values of the fact sheet, and side outputs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lossworks.entries.losses.maps.basnet_hybrid import gaussian_window, ssim_maps
from lossworks.errors import UserError
from lossworks.losses import create
from lossworks.models.interface import Head, Outputs

ALONE = {name: {"bce": 0.0, "ssim": 0.0, "iou": 0.0, name: 1.0} for name in ("bce", "ssim", "iou")}


def problem(classes=2, size=16, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(2, classes, size, size, dtype=torch.float64, generator=g)
    return z, torch.randint(0, classes, (2, size, size), generator=g)


def plain_ssim(p, t, radius=5, sigma=1.5):
    """Return the SSIM map by its definition, pixel by pixel, with zeros around."""
    places = np.arange(-radius, radius + 1)
    line = np.exp(-(places**2) / (2 * sigma**2))
    weight = np.outer(line, line) / line.sum() ** 2
    p, t = (np.pad(x, radius) for x in (p, t))
    found = np.empty(np.array(p.shape) - 2 * radius)
    for i, j in np.ndindex(*found.shape):
        x, y = (one[i : i + 2 * radius + 1, j : j + 2 * radius + 1] for one in (p, t))
        mx, my = (weight * x).sum(), (weight * y).sum()
        vx, vy = (weight * (x - mx) ** 2).sum(), (weight * (y - my) ** 2).sum()
        cov = (weight * (x - mx) * (y - my)).sum()
        found[i, j] = (2 * mx * my + 1e-4) * (2 * cov + 9e-4)
        found[i, j] /= (mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4)
    return found


def test_ssim_is_that_of_its_definition():
    """With zeros around the maps, and within them; of a map and itself it is 1."""
    p, t = torch.rand(2, 13, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    window = gaussian_window(5, 1.5, p)

    found = ssim_maps(p[None], t[None], window)[0]

    np.testing.assert_allclose(found.numpy(), plain_ssim(p.numpy(), t.numpy()))
    torch.testing.assert_close(ssim_maps(p[None], t[None], window, valid=True)[0], found[5:-5, 5:-5])
    torch.testing.assert_close(ssim_maps(p[None], p[None], window), torch.ones(1, 13, 14).double())


def test_ssim_is_that_of_scikit_image_in_the_interior():
    """Which reflects at the borders."""
    metrics = pytest.importorskip("skimage.metrics")
    p, t = torch.rand(2, 20, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    found = ssim_maps(p[None], t[None], gaussian_window(5, 1.5, p))[0].numpy()
    _, expected = metrics.structural_similarity(
        p.numpy(),
        t.numpy(),
        data_range=1.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        full=True,
    )

    np.testing.assert_allclose(found[5:-5, 5:-5], expected[5:-5, 5:-5])


@pytest.mark.parametrize("classes", [2, 4])
def test_the_parts_in_plain_numbers(classes):
    """Of each class of the foreground against all others, image by image."""
    z, y = problem(classes)
    p = z.softmax(1).numpy()
    found = {name: create("basnet-hybrid", reduction="none", **alone)(z, y) for name, alone in ALONE.items()}
    whole = create("basnet-hybrid", reduction="none", bce=0.5, ssim=2.0, iou=1.5)(z, y)

    for image in range(2):
        own = {name: [] for name in ALONE}
        for k in range(1, classes):
            a, t = p[image, k], (y[image] == k).double().numpy()
            own["bce"].append(-(t * np.log(a) + (1 - t) * np.log(1 - a)).mean())
            own["ssim"].append(1 - plain_ssim(a, t).mean())
            own["iou"].append(1 - (a * t).sum() / (a + t - a * t).sum())
        for name, values in own.items():
            assert found[name][image].item() == pytest.approx(np.mean(values), rel=1e-6)
    torch.testing.assert_close(whole, 0.5 * found["bce"] + 2 * found["ssim"] + 1.5 * found["iou"])


def test_of_two_classes_it_is_that_of_the_difference_of_logits():
    """The foreground's logit is z1 - z0."""
    z, y = problem()
    own = create("basnet-hybrid", **ALONE["bce"])(z, y)

    torch.testing.assert_close(own, F.binary_cross_entropy_with_logits(z[:, 1] - z[:, 0], y.double()))


def test_a_right_map_costs_nothing_and_a_constant_one_what_it_must():
    """p = t gives 0; c = 0.5 on a mask of a quarter has the IoU loss 1 - 0.125/0.625 = 0.8."""
    _, y = problem()
    sure = torch.stack((torch.zeros(2, 16, 16), 2e4 * y - 1e4), 1).double()
    quarter = torch.zeros(1, 8, 8, dtype=torch.int64)
    quarter[:, :4, :4] = 1

    assert create("basnet-hybrid")(sure, y).item() == pytest.approx(0, abs=1e-9)
    constant = create("basnet-hybrid", **ALONE["iou"])(torch.zeros(1, 2, 8, 8).double(), quarter)
    assert constant.item() == pytest.approx(0.8, abs=1e-6)


def test_an_empty_mask_rightly_predicted_costs_nothing():
    """Where the released code gives 0/0."""
    sure = torch.stack((torch.full((1, 8, 8), 1e4), torch.full((1, 8, 8), -1e4)), 1).requires_grad_()

    value = create("basnet-hybrid")(sure, torch.zeros(1, 8, 8, dtype=torch.int64))
    (slope,) = torch.autograd.grad(value, sure)

    assert value.item() == pytest.approx(0, abs=1e-6)
    assert slope.isfinite().all()


@pytest.mark.parametrize("sides", [0, 1, 7])
def test_equal_maps_add_up(sides):
    """S of them have S times the loss of one; with a weight of the sides that of the main map and theirs."""
    z, y = problem(3)
    hidden, head = z.movedim(1, -1), Head(torch.eye(3, dtype=torch.float64))
    one = Outputs(hidden, head)
    outputs = Outputs(hidden, head, sides=[one] * sides)
    batch = {"targets": y, "weight": torch.tensor([1.0, 0.5]).double()}
    single = create("basnet-hybrid", reduction="sum").of(one, batch)

    whole = create("basnet-hybrid", reduction="sum").of(outputs, batch)
    lighter = create("basnet-hybrid", reduction="sum", side_weight=0.25).of(outputs, batch)

    torch.testing.assert_close(whole, (1 + sides) * single)
    torch.testing.assert_close(lighter, (1 + sides / 4) * single)


def test_coarser_side_outputs_are_made_as_large_as_the_mask():
    """Bilinearly, with heads and widths of their own; their gradients reach them."""
    z, y = problem(3)
    coarse = torch.randn(2, 4, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 5, dtype=torch.float64)
    main = Outputs(z.movedim(1, -1), Head(torch.eye(3, dtype=torch.float64)))
    outputs = Outputs(main.hidden, main.head, sides=[Outputs(coarse, Head(weight))])
    loss = create("basnet-hybrid", reduction="none")
    large = F.interpolate((coarse @ weight.T).movedim(-1, 1), (16, 16), mode="bilinear")

    found = loss.of(outputs, {"targets": y})

    torch.testing.assert_close(found, loss(z, y) + loss(large, y))
    (slope,) = torch.autograd.grad(found.sum(), coarse)
    assert slope.abs().min() > 0


def test_ignored_pixels_are_like_what_lies_around():
    """A map with an ignored margin has the sums of the map without it."""
    z, y = problem()
    wide = F.pad(z, (6, 6, 6, 6), value=3.0)
    margin = F.pad(y, (6, 6, 6, 6), value=-100)

    torch.testing.assert_close(create("basnet-hybrid")(wide, margin), create("basnet-hybrid")(z, y))


def test_windows_within_the_map():
    """The mean over the inner pixels; maps that are too small are refused."""
    z, y = problem()
    found = create("basnet-hybrid", padding="valid", radius=3, **ALONE["ssim"])(z, y)
    p, t = z.softmax(1)[:, 1], (y == 1).double()

    expected = 1 - ssim_maps(p, t, gaussian_window(3, 1.5, p))[:, 3:-3, 3:-3].mean()
    torch.testing.assert_close(found, expected)
    with pytest.raises(UserError, match="radius=5 needs maps of 11 pixels a side at least, not 10 by 16"):
        create("basnet-hybrid", padding="valid")(z[:, :, :10], y[:, :10])
