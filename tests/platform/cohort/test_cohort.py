"""Members trained at once end where each would end on its own in a plain torch loop."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lossworks.cohort import (
    AdamW,
    LocalRule,
    Sgd,
    StackedLearner,
    StackedModel,
    all_finite,
    member_of,
    plan_batches,
    repeat,
    stack,
)
from lossworks.data.examples import Examples
from lossworks.errors import UserError
from lossworks.losses import create
from lossworks.models import Classifier, build_classifier
from lossworks.specs import ClassifierModelSpec

SIZES = (7, 23, 1, 16, 8)
BATCH, EPOCHS, CLASSES = 8, 3, 4


def model_of(shape=(6,), seed=0, **changes):
    spec = ClassifierModelSpec.parse({"width": 8, "groups": 2, **changes})
    # In float64: Adam makes steps of full size from gradients that are nothing but rounding.
    return build_classifier(spec, shape=shape, classes=CLASSES, seed=seed).double()


def problem(shape=(6,), seed=0):
    """Return examples and which of them each member has."""
    g = torch.Generator().manual_seed(seed)
    n = sum(SIZES)
    inputs = torch.randn(n, *shape, generator=g, dtype=torch.float64)
    labels = torch.randint(0, CLASSES, (n,), generator=g)
    ends = np.cumsum(SIZES)
    shuffled = np.random.default_rng(seed).permutation(n)
    return (inputs, labels), [shuffled[end - size : end] for end, size in zip(ends, SIZES, strict=True)]


def planned(rows):
    return plan_batches(rows, batch_size=BATCH, epochs=EPOCHS, seeds=[(5, i) for i in range(len(rows))])


def alone(model, examples, batches, place, optimizer, loss):
    """Train one member as anybody would, with its batches; return its parameters and its mean loss."""
    inputs, labels = examples
    total = seen = 0.0
    for step in range(int(batches.steps[place])):
        rows = batches.rows[step, place, : int(batches.counts[step, place])]
        value = loss(model.logits(inputs[rows]), labels[rows])
        optimizer.zero_grad()
        value.mean().backward()
        optimizer.step()
        total, seen = total + float(value.detach().sum()), seen + len(rows)
    return {name: p.detach() for name, p in model.named_parameters()}, total / seen


def train_stacked(model, params, examples, batches, loss, optimizer, rule=None):
    learner = StackedLearner(model, Examples(*examples), loss)
    return learner.train(params, batches, optimizer, rule)


def start(model):
    return repeat(dict(model.named_parameters()), len(SIZES))


@pytest.mark.parametrize(
    ("shape", "changes"),
    [((6,), {}), ((2, 12), {"kind": "cnn"}), ((1, 8, 8), {"kind": "resnet", "layers": 1})],
)
@pytest.mark.parametrize(("kind", "slug"), [("sgd", "cross-entropy"), ("adam", "ldr")])
def test_it_equals_one_by_one(shape, changes, kind, slug):
    """Unequal sizes, a short last batch, a member with one example; rows, signals and images."""
    examples, rows = problem(shape)
    batches, loss = planned(rows), create(slug, reduction="none")
    ours = (
        Sgd(lr=0.05, momentum=0.5, weight_decay=0.01)
        if kind == "sgd"
        else AdamW(lr=0.01, weight_decay=0.1, betas=(0.8, 0.9))
    )
    trained = train_stacked(
        StackedModel(model_of(shape, **changes)),
        start(model_of(shape, **changes)),
        examples,
        batches,
        loss,
        ours,
    )

    assert trained.finite.all()
    for place, index in enumerate(batches.members.tolist()):
        model = model_of(shape, **changes)
        parameters = list(model.parameters())
        theirs = (
            torch.optim.SGD(parameters, lr=0.05, momentum=0.5, weight_decay=0.01)
            if kind == "sgd"
            else torch.optim.AdamW(
                [
                    {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
                    {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
                ],
                lr=0.01,
                betas=(0.8, 0.9),
            )
        )
        expected, mean = alone(model, examples, batches, place, theirs, loss)
        for name, value in expected.items():
            assert torch.allclose(trained.params[name][index], value, rtol=1e-9, atol=1e-11), name
        assert trained.steps[index] == EPOCHS * -(-SIZES[index] // BATCH)
        assert float(trained.losses[index]) == pytest.approx(mean, rel=1e-4)


def test_what_a_member_becomes_does_not_depend_on_the_others():
    """Alone in its cohort and among others."""
    examples, rows = problem()
    loss, model = create("cross-entropy", reduction="none"), StackedModel(model_of())
    whole = train_stacked(model, start(model_of()), examples, planned(rows), loss, Sgd(0.1))
    for index in (0, 3):
        batches = plan_batches([rows[index]], batch_size=BATCH, epochs=EPOCHS, seeds=[(5, index)])
        single = train_stacked(
            model, repeat(dict(model_of().named_parameters()), 1), examples, batches, loss, Sgd(0.1)
        )
        for name, value in single.params.items():
            assert torch.allclose(whole.params[name][index], value[0], atol=1e-11)


def test_members_may_have_starts_and_rates_of_their_own():
    """Given in the order of the members; what was given stays as it was."""
    examples, rows = problem()
    batches, loss = planned(rows), create("cross-entropy", reduction="none")
    models = [model_of(seed=i) for i in range(len(SIZES))]
    params = stack([dict(m.named_parameters()) for m in models])
    before = {name: value.detach().clone() for name, value in params.items()}
    rates = torch.tensor([0.01, 0.02, 0.3, 0.1, 0.05])
    optimizer = Sgd(lr=rates[batches.members], weight_decay=(rates / 10)[batches.members])
    trained = train_stacked(StackedModel(models[0]), params, examples, batches, loss, optimizer)

    for place, index in enumerate(batches.members.tolist()):
        rate = float(rates[index])
        theirs = torch.optim.SGD(models[index].parameters(), lr=rate, weight_decay=rate / 10)
        expected, _ = alone(models[index], examples, batches, place, theirs, loss)
        for name, value in expected.items():
            assert torch.allclose(trained.params[name][index], value, atol=1e-11)
    assert all(torch.equal(params[name], value) for name, value in before.items())


def test_what_vmap_cannot_take_is_called_one_by_one():
    """And says why; with dropout at training the random numbers are the members' own."""
    dropping = model_of(dropout=0.5)
    assert StackedModel(model_of()).reason is None
    assert StackedModel(dropping).reason == "dropout drops features at random"
    batchnorm = model_of()
    batchnorm.layers.append(nn.BatchNorm1d(8))
    assert "statistics" in (StackedModel(batchnorm).reason or "")

    one_by_one = StackedModel(model_of())
    one_by_one.reason = "for the test"
    examples, rows = problem()
    loss = create("cross-entropy", reduction="none")
    results = [
        train_stacked(model, start(model_of()), examples, planned(rows), loss, Sgd(0.1))
        for model in (StackedModel(model_of()), one_by_one)
    ]
    for name, value in results[0].params.items():
        assert torch.allclose(results[1].params[name], value, atol=1e-11)


def test_a_member_that_diverges_disturbs_no_other():
    """Its own rate is absurd; it is reported and the others are what they were."""
    examples, rows = problem()
    batches, loss = planned(rows), create("cross-entropy", reduction="none")
    rates = torch.full((len(SIZES),), 0.1)
    calm = train_stacked(
        StackedModel(model_of()), start(model_of()), examples, batches, loss, Sgd(rates[batches.members])
    )
    rates[1] = 1e30
    wild = train_stacked(
        StackedModel(model_of()), start(model_of()), examples, batches, loss, Sgd(rates[batches.members])
    )

    assert wild.finite.tolist() == [True, False, True, True, True]
    for index in (0, 2, 3, 4):
        for name, value in member_of(calm.params, index).items():
            assert torch.equal(member_of(wild.params, index)[name], value)


def test_one_number_makes_a_member_not_finite():
    for shape in ((), (1,), (5,), (3, 70)):
        for wrong in (float("nan"), float("inf"), -float("inf")):
            values = torch.full((4, *shape), 3e38)
            values[2].view(-1)[-1] = wrong
            assert all_finite(values).tolist() == [True, True, False, True]


def test_the_hooks_of_a_rule():
    """Decay by hand is the optimiser's, a penalty shrinks the logits, and an update of 0 is no training."""
    examples, rows = problem()
    batches, loss, model = planned(rows), create("cross-entropy", reduction="none"), StackedModel(model_of())
    origin = {name: p.detach() for name, p in model_of().named_parameters()}

    class Penalty(LocalRule):
        def penalty(self, seen):
            hidden, logits = seen.outputs.hidden, seen.outputs.logits
            assert hidden.shape[:2] == logits.shape[:2] == seen.valid.shape == seen.inputs.shape[:2]
            return logits.square().sum((1, 2)) + hidden.square().sum((1, 2))

    class Decay(LocalRule):
        def gradient(self, name, gradient, param):  # noqa: ARG002
            return gradient + 0.1 * param

    class Frozen(LocalRule):
        def update(self, name, step):  # noqa: ARG002
            return torch.zeros_like(step)

    ended = [
        train_stacked(model, start(model_of()), examples, batches, loss, optimizer, rule).params
        for optimizer, rule in (
            (Sgd(0.1), Decay()),
            (Sgd(0.1, 0.1), LocalRule()),
            (Sgd(0.1), Frozen()),
            (Sgd(0.1), LocalRule()),
            (Sgd(0.1), Penalty()),
        )
    ]
    for name, value in origin.items():
        assert torch.allclose(ended[0][name], ended[1][name], atol=1e-11)
        assert torch.equal(ended[2][name], value.expand_as(ended[2][name]))
    plain, shrunk = (
        model(params, examples[0].expand(len(SIZES), *examples[0].shape))[1] for params in ended[3:]
    )
    assert shrunk.norm() < plain.norm() / 2


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ((6,), {"layers": 1}),
        ((6,), {"layers": 3}),
        ((6,), {"layers": 0}),
        ((1, 40), {"kind": "cnn", "layers": 2}),
        ((3, 11), {"kind": "cnn", "layers": 3}),
        ((2, 5), {"kind": "cnn", "layers": 1}),
        ((1, 9, 8), {"kind": "cnn", "layers": 1}),
        ((2, 17, 9), {"kind": "cnn", "layers": 3}),
    ],
)
@pytest.mark.parametrize("looks_at", ["logits", "both"])
def test_gradients_by_hand_are_autograds(shape, changes, looks_at):
    """For what a loss and a rule make of logits and features; strides of one and two, odd sides."""
    network = model_of(shape, **changes)
    by_hand, by_autograd = StackedModel(network), StackedModel(network)
    assert by_hand._layers is not None
    by_autograd._layers = None
    params = {name: value + 0.1 * torch.randn_like(value) for name, value in start(network).items()}
    inputs = torch.randn(len(SIZES), 9, *shape, dtype=torch.float64)
    before = inputs.clone()

    def objective(hidden, logits):
        of_features = hidden.pow(3).sum((1, 2)) if looks_at == "both" else 0.0
        return logits.logsumexp(-1).sum(1) + of_features

    pairs = zip(*(m.gradients(params, inputs, objective) for m in (by_hand, by_autograd)), strict=True)
    assert all(torch.allclose(ours, theirs, atol=1e-12) for ours, theirs in pairs)
    called = zip(*(m(params, inputs) for m in (by_hand, by_autograd)), strict=True)
    assert all(torch.allclose(ours, theirs, atol=1e-12) for ours, theirs in called)
    assert torch.equal(inputs, before)


def test_other_convolutions_are_not_taken_for_plain_ones():
    """Groups, dilation, padding that reflects, and layers of other kinds, go through vmap."""
    convolutions = [
        nn.Conv1d(2, 8, 3, groups=2),
        nn.Conv1d(2, 8, 3, dilation=2),
        nn.Conv1d(2, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv1d(2, 8, 3, padding="same"),
        nn.Conv1d(2, 8, 3, bias=False),
    ]
    others = [nn.Sequential(layer, nn.ReLU()) for layer in convolutions]
    others += [nn.Sequential(nn.Conv1d(2, 8, 3), nn.GELU()), nn.Conv1d(2, 8, 3)]
    for block in others:
        network = Classifier([block], 8, CLASSES, 0.0)
        assert StackedModel(network)._layers is None
        params, inputs = start(network), torch.randn(len(SIZES), 3, 2, 12)
        _, logits = StackedModel(network)(params, inputs)
        assert torch.allclose(logits[1], network.logits(inputs[1]), atol=1e-5)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    batch_size=st.integers(1, 17),
    epochs=st.integers(1, 3),
)
def test_batches_visit_every_example_once_an_epoch(sizes, batch_size, epochs):
    """Whatever the sizes; members are ordered by their steps, and counts fit."""
    starts = np.cumsum([0, *sizes])
    rows = [np.arange(a, b) for a, b in itertools.pairwise(starts)]
    batches = plan_batches(
        rows, batch_size=batch_size, epochs=epochs, seeds=[(1, i) for i in range(len(rows))]
    )

    assert sorted(batches.members.tolist()) == list(range(len(sizes)))
    assert (batches.steps.diff() <= 0).all()
    for place, index in enumerate(batches.members.tolist()):
        each = -(-sizes[index] // batch_size)
        assert batches.steps[place] == each * epochs
        for epoch in range(epochs):
            seen = [
                row
                for step in range(epoch * each, (epoch + 1) * each)
                for row in batches.rows[step, place, : batches.counts[step, place]].tolist()
            ]
            assert sorted(seen) == rows[index].tolist()
        assert (batches.counts[int(batches.steps[place]) :, place] == 0).all()
        assert batches.at_work(int(batches.steps[place]) - 1) > place


def test_wrong_calls_are_refused_by_name():
    """Members are numbered from 0."""
    with pytest.raises(UserError, match="member 1: has no examples"):
        plan_batches([np.arange(3), np.arange(0)], batch_size=2, epochs=1, seeds=[(0,), (1,)])
    with pytest.raises(UserError, match="batch_size=0: must be at least 1"):
        plan_batches([np.arange(3)], batch_size=0, epochs=1, seeds=[(0,)])
    with pytest.raises(UserError, match="at least one member"):
        stack([])
    with pytest.raises(UserError, match="member 1: its parameters differ"):
        stack([dict(model_of().named_parameters()), dict(model_of(width=4).named_parameters())])
