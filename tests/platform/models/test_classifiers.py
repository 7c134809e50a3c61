"""Small classifiers: shapes, seeds, and that an example's features depend on nothing else."""

import pytest
import torch

from lossworks.errors import UserError
from lossworks.models import build_classifier
from lossworks.specs import ClassifierModelSpec

KINDS = [
    ("mlp", (13,)),
    ("mlp", (1, 8, 8)),
    ("cnn", (1, 40)),
    ("cnn", (3, 32, 32)),
    ("cnn", (1, 5, 5)),
    ("resnet", (1, 40)),
    ("resnet", (1, 8, 8)),
]


def build(kind, shape, seed=0, **sizes):
    spec = ClassifierModelSpec(kind=kind, width=16, groups=4, **sizes)
    return build_classifier(spec, shape=shape, classes=5, seed=seed)


@pytest.mark.parametrize(("kind", "shape"), KINDS)
def test_features_and_logits(kind, shape):
    """Logits are the head's of the features; alone an example has the features that it has in a batch."""
    model = build(kind, shape).eval()
    x = torch.randn(4, *shape)
    hidden, head = model.hidden(x), model.head()

    assert hidden.shape == (4, head.weight.shape[1])
    torch.testing.assert_close(model.logits(x), hidden @ head.weight.T + head.bias)
    torch.testing.assert_close(model.hidden(x[:1]), hidden[:1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["mlp", "cnn", "resnet"])
def test_a_seed_gives_the_same_parameters(kind):
    """Bit by bit, and the global stream of random numbers stays where it was."""
    state = torch.get_rng_state()
    one, same, other = (build(kind, (1, 8, 8), seed=seed).state_dict() for seed in (3, 3, 4))

    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["classifier.weight"], other["classifier.weight"])
    assert torch.equal(torch.get_rng_state(), state)


def test_every_parameter_has_a_gradient():
    """Of the deepest of them."""
    model = build("resnet", (2, 9, 9), layers=2)
    model.logits(torch.randn(3, 2, 9, 9)).square().sum().backward()

    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_what_does_not_fit_is_refused():
    """A convolution on vectors, groups that do not divide, recomputed activations."""
    with pytest.raises(UserError, match=r"model\.kind=cnn reads signals and images; examples of 13 features"):
        build("cnn", (13,))
    with pytest.raises(UserError, match=r"examples of shape \(1, 2, 3, 4\) need mlp"):
        build("resnet", (1, 2, 3, 4))
    with pytest.raises(UserError, match="width=10 must be a multiple of groups=4"):
        ClassifierModelSpec.parse({"kind": "resnet", "width": 10, "groups": 4})
    with pytest.raises(UserError, match="activation_checkpointing=true is for language models"):
        build("mlp", (13,)).checkpoint_activations()
