"""Local rules equal their formulas; where a method's strength is 0 it is FedAvg."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lossworks.cohort import (
    LocalRule,
    Seen,
    Sgd,
    StackedLearner,
    StackedModel,
    plan_batches,
    repeat,
)
from lossworks.data.batch import IGNORE_INDEX
from lossworks.data.examples import Examples
from lossworks.losses import create
from lossworks.models import Outputs, build_classifier
from lossworks.specs import ClassifierModelSpec
from lossworks_federated.client.local_rules import (
    Contrast,
    ControlVariates,
    Dynamic,
    Guided,
    Margin,
    Proximal,
    Together,
)

SIZES, CLASSES, LR = (9, 20, 5), 4, 0.1


def model_of(seed=0):
    spec = ClassifierModelSpec(width=8)
    return build_classifier(spec, shape=(6,), classes=CLASSES, seed=seed).double()


def member(seed=0):
    return {name: value.detach() for name, value in model_of(seed).named_parameters()}


def learner_of():
    return StackedLearner(StackedModel(model_of()), Examples(torch.zeros(0), torch.zeros(0)), None)


def seen(inputs, hidden, logits, valid):
    targets = torch.where(valid, 0, IGNORE_INDEX)
    return Seen(inputs, Outputs(hidden, None, dense=logits), targets)


def trained(rule, epochs=2, batch_size=4):
    """Return the members after training under a rule, in order, with the batches."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(sum(SIZES), 6, generator=g, dtype=torch.float64)
    y = torch.randint(0, CLASSES, (sum(SIZES),), generator=g)
    ends = np.cumsum(SIZES)
    rows = [np.arange(end - size, end) for end, size in zip(ends, SIZES, strict=True)]
    batches = plan_batches(rows, batch_size=batch_size, epochs=epochs, seeds=[(0, i) for i in range(3)])
    loss = create("cross-entropy", reduction="none")
    model = StackedModel(model_of())
    learner = StackedLearner(model, Examples(x, y), loss)
    return learner.train(repeat(member(), 3), batches, Sgd(LR), rule), batches


def stacked(seed):
    """Return something to keep for each client."""
    g = torch.Generator().manual_seed(seed)
    return {n: 0.1 * torch.randn(3, *v.shape, generator=g, dtype=v.dtype) for n, v in member().items()}


def assert_same(left, right):
    for name, value in left.params.items():
        assert torch.allclose(right.params[name], value, atol=1e-12), name


def zeros():
    return {name: torch.zeros_like(value) for name, value in member().items()}


@pytest.mark.parametrize(
    "rule",
    [
        Proximal(member(), 0.0),
        ControlVariates(zeros(), repeat(zeros(), 3)),
        Dynamic(member(), repeat(zeros(), 3), 0.0),
        Contrast(learner_of().features, member(), repeat(member(1), 3), mu=0.0),
        Margin(0.0),
        Margin(0.0, "softmax", "batch"),
        Guided({name: torch.ones_like(value) for name, value in member().items()}),
        Guided({name: torch.ones_like(value) for name, value in member().items()}, "gradient"),
        Together([]),
        Together([Proximal(member(), 0.0), Margin(0.0)]),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_without_strength_it_is_plain_training(rule):
    """Each method's special case is FedAvg."""
    assert_same(trained(LocalRule())[0], trained(rule)[0])


class Penalty(LocalRule):
    """Adds the derivative of a penalty on parameters, as autograd finds it."""

    def __init__(self, of):
        self._of = of

    def gradient(self, name, gradient, param):
        leaf = param.detach().requires_grad_()
        with torch.enable_grad():
            return gradient + torch.autograd.grad(self._of(name, leaf), leaf)[0]


def test_a_proximal_term_is_its_penalty():
    """The gradient hook is the derivative of (μ/2)‖w − w⁰‖²."""
    penalty = Penalty(lambda name, p: 0.35 * (p - member()[name]).square().sum())

    assert_same(trained(penalty)[0], trained(Proximal(member(), 0.7))[0])


def test_dynamic_regularisation_is_its_penalty():
    """(α/2)‖w − w⁰‖² − ⟨h, w⟩; afterwards h falls by α(w − w⁰)."""
    own, alpha = stacked(1), 0.3
    batches = trained(LocalRule())[1]
    ordered = {name: value[batches.members] for name, value in own.items()}

    def penalty(name, p):
        return (0.5 * alpha * (p - member()[name]).square() - ordered[name][: len(p)] * p).sum()

    result = trained(Dynamic(member(), ordered, alpha))[0]
    assert_same(trained(Penalty(penalty))[0], result)
    renewed = Dynamic.renewed(own, member(), result.params, alpha)
    for name, value in renewed.items():
        assert torch.allclose(value, own[name] - alpha * (result.params[name] - member()[name]))


def test_control_variates_correct_and_renew():
    """One step: w⁰ − η(g − c_i + c); the renewed variate is then the client's gradient itself."""
    plain, batches = trained(LocalRule(), epochs=1, batch_size=100)
    own, everyone = stacked(2), {name: value[0] for name, value in stacked(3).items()}
    ordered = {name: value[batches.members] for name, value in own.items()}
    result, _ = trained(ControlVariates(everyone, ordered), epochs=1, batch_size=100)
    renewed = ControlVariates.renewed(own, everyone, member(), result.params, result.steps, LR)

    for name, value in member().items():
        gradient = (value - plain.params[name]) / LR
        expected = value - LR * (gradient - own[name] + everyone[name])
        assert torch.allclose(result.params[name], expected, atol=1e-12)
        assert torch.allclose(renewed[name], gradient, atol=1e-10)


def outputs(seed=0, m=2, b=5):
    g = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(m, b, CLASSES, generator=g, dtype=torch.float64)
    valid = torch.ones(m, b, dtype=torch.bool)
    valid[1, 3:] = False
    return logits, valid


def test_margin_control_in_both_forms():
    """λ·log(1 + ‖o‖²) by example, or one logarithm of the batch's softmax; what doesn't count is left out."""
    logits, valid = outputs()
    sample = Margin(0.3).penalty(seen(logits, logits, logits, valid))
    batch = Margin(0.3, "softmax", "batch").penalty(seen(logits, logits, logits, valid))

    for client in range(2):
        z = logits[client][valid[client]]
        assert float(sample[client]) == pytest.approx(0.3 * float(z.square().sum(1).log1p().mean()))
        assert float(batch[client]) == pytest.approx(0.3 * float(z.softmax(1).square().sum().log1p()))


def test_contrast_has_its_closed_form():
    """−log softmax of the two cosines over T, by hand for each client."""
    model, g = StackedModel(model_of()), torch.Generator().manual_seed(0)
    inputs = torch.randn(2, 5, 6, generator=g, dtype=torch.float64)
    valid = outputs()[1]
    params = repeat(member(2), 2)
    hidden, logits = model(params, inputs)
    rule = Contrast(learner_of().features, member(), repeat(member(1), 3), mu=2.0, temperature=0.7)
    found = rule.penalty(seen(inputs, hidden, logits, valid))

    for client in range(2):
        x = inputs[client][valid[client]]
        z, glob, prev = (model_of(seed).hidden(x) for seed in (2, 0, 1))
        pair = torch.stack((F.cosine_similarity(z, glob), F.cosine_similarity(z, prev)), 1) / 0.7
        expected = 2 * -pair.log_softmax(1)[:, 0].mean()
        assert float(found[client]) == pytest.approx(expected.item())


def test_guidance_freezes_what_it_is_told_to():
    """0 keeps a parameter, one half halves its step; on plain gradients it is the same."""
    guidance = {name: torch.full_like(value, 0.5) for name, value in member().items()}
    guidance["classifier.bias"].zero_()
    steps, gradients = (trained(Guided(guidance, on), epochs=1)[0] for on in ("update", "gradient"))

    assert_same(steps, gradients)
    assert torch.equal(steps.params["classifier.bias"], member()["classifier.bias"].expand(3, CLASSES))
    once, plain = (trained(rule, epochs=1, batch_size=100)[0] for rule in (Guided(guidance), LocalRule()))
    origin = member()["classifier.weight"]
    assert torch.allclose(
        once.params["classifier.weight"] - origin, (plain.params["classifier.weight"] - origin) / 2
    )


def test_rules_together_are_the_sum_of_their_parts():
    """A pull and a margin."""
    rules = [Proximal(member(), 0.5), Margin(0.2)]

    class Sum(LocalRule):
        def penalty(self, seen):
            return rules[1].penalty(seen)

        def gradient(self, name, gradient, param):
            return rules[0].gradient(name, gradient, param)

    assert_same(trained(Sum())[0], trained(Together(rules))[0])
