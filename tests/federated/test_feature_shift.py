"""Clients that see the same kinds of things in ways of their own."""

import numpy as np
import pytest
import torch

from lossworks.data.examples import Examples
from lossworks.errors import UserError
from lossworks_federated.feature_shift import shifted_held_out, shifted_training
from lossworks_federated.spec_parts import SplitSpec
from lossworks_federated.splits import split_examples
from lossworks_testing.federation import setup_of, tiny

WAYS = ("none", "contrast", "noise", "blur", "resolution")


def seen(shape, clients=4, n=4000, **changes):
    """Return a split of zeros, or of what ``images`` gives, with what clients see."""
    spec = SplitSpec(kind="iid", clients=clients, **changes)
    labels = np.arange(n) % 10
    split = split_examples(labels, spec, 0)
    inputs = torch.rand(n, *shape, generator=torch.Generator().manual_seed(0))
    train = Examples(inputs, torch.from_numpy(labels))
    return split, inputs, shifted_training(train, split, spec, 0), train, spec


def test_noise_grows_from_client_to_client():
    """Client i's noise has the variance σ·i/M; the first has none, and what is given stays as it is."""
    split, inputs, shifted, train, spec = seen((3,), noise=2.0)
    before = inputs.clone()
    added = shifted.inputs - inputs

    assert torch.equal(train.inputs, before)
    variances = [float(added[torch.from_numpy(rows)].var()) for rows in split.train]
    assert variances == pytest.approx([0.0, 0.5, 1.0, 1.5], rel=0.15)
    assert torch.equal(shifted.inputs, shifted_training(train, split, spec, 0).inputs)
    assert shifted_training(train, split, SplitSpec(), 0) is train


def test_sites_see_images_in_turn():
    """Each in its way, its tests too; five ways for ten clients."""
    split, inputs, shifted, _, _ = seen((2, 8, 8), clients=10, shifts=WAYS)
    of = [torch.from_numpy(np.concatenate((a, b))) for a, b in zip(split.train, split.test, strict=True)]
    for client in range(10):
        own, raw = shifted.inputs[of[client]], inputs[of[client]]
        way = WAYS[client % 5]
        if way == "none":
            assert torch.equal(own, raw)
        elif way == "contrast":
            assert torch.allclose(own, 0.3 * raw + 0.5)
        elif way == "noise":
            assert float((own - raw).std()) == pytest.approx(1.0, rel=0.05)
            assert float((own - raw).mean()) == pytest.approx(0.0, abs=0.02)
        elif way == "blur":
            # A blur keeps what is constant, and makes neighbours more alike.
            assert float(own.diff(dim=-1).abs().mean()) < 0.5 * float(raw.diff(dim=-1).abs().mean())
            assert float(own.mean()) == pytest.approx(float(raw.mean()), abs=0.01)
        else:
            assert torch.equal(own[..., ::2, ::2], own[..., 1::2, 1::2])
            means = torch.nn.functional.avg_pool2d(raw, 2)
            assert torch.allclose(own[..., ::2, ::2], means, atol=1e-6)


def test_a_blur_of_a_point_is_a_gaussian():
    spec = SplitSpec(kind="iid", clients=1, shifts=("blur",), shift_strength=0.8, test_fraction=0.0)
    image = torch.zeros(4, 1, 9, 9)
    image[:, 0, 4, 4] = 1.0
    labels = np.arange(4) % 2
    train = Examples(image, torch.from_numpy(labels))
    found = shifted_training(train, split_examples(labels, spec, 0), spec, 0).inputs[0, 0]
    places = torch.arange(-2, 3) / 0.8
    line = torch.exp(-0.5 * places**2)
    line = line / line.sum()
    assert torch.allclose(found[2:7, 2:7], line[:, None] * line[None], atol=1e-6)


def test_held_out_images_are_seen_in_all_ways():
    setup = setup_of(tiny(split={"kind": "iid", "clients": 5, "min_size": 8, "shifts": list(WAYS)}))
    raw, shifted = setup.kind.held_out.inputs, setup.held_out.inputs

    assert torch.equal(shifted[::5], raw[::5])
    assert torch.allclose(shifted[1::5], 0.3 * raw[1::5] + 0.5)
    assert not torch.equal(shifted[3::5], raw[3::5])
    plain = tiny(split={"kind": "iid", "clients": 5})
    assert setup_of(plain).held_out is setup_of(plain).kind.held_out


def test_what_is_no_image_is_refused():
    with pytest.raises(UserError, match=r"split.shifts: is for images, .* these are \(3,\)"):
        seen((3,), shifts=("blur",))
    labels = np.arange(40) % 2
    words = Examples(torch.zeros(40, 3, dtype=torch.int64), torch.from_numpy(labels))
    spec = SplitSpec(kind="iid", clients=2, noise=1.0)
    with pytest.raises(UserError, match=r"split.noise=1: is for inputs that are numbers"):
        shifted_training(words, split_examples(labels, spec, 0), spec, 0)
    with pytest.raises(UserError, match=r"split.shifts: is for inputs that are numbers"):
        shifted_held_out(words, SplitSpec(shifts=("blur",)), 0)
