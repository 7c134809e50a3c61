"""What the papers of the dense losses claim, at a size where it can be seen in half a minute.

Every comparison is paired by seed; a direction holds if the mean difference is twice its standard error.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lossworks.losses import create

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def one_thread():
    """Small layers lose by a second one, much so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def digits():
    """Return images (1797, 64) in [0, 1] and their classes."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)


def mlp(inputs, width, outputs, *, seed, hidden=2):
    torch.manual_seed(seed)
    layers = [nn.Linear(inputs, width), nn.ReLU()]
    for _ in range(hidden - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def descend(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def is_beyond_noise(better, worse):
    """Whether ``better`` is larger, paired element by element."""
    difference = torch.tensor(better) - torch.tensor(worse)
    return difference.mean() > 2 * difference.std() / len(difference) ** 0.5


def rare_eights(loss, seed, *, warm=100, steps=400):
    """Return F1 and recall of class 8, of which 20 are trained on, after cross-entropy and then ``loss``."""
    x, y = digits()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:900], order[900:]
    train = torch.cat((train[y[train] == 8][:20], train[y[train] != 8]))
    x_train, y_train = x[train], (y[train] == 8).long()
    model = mlp(64, 64, 1, seed=seed, hidden=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(warm + steps):
        f = model(x_train).squeeze(1)
        plain = step < warm or loss is None
        descend(
            optimizer,
            F.binary_cross_entropy_with_logits(f, y_train.float()) if plain else loss(f, y_train),
        )
    predicted, actual = model(x[test]).squeeze(1) > 0, y[test] == 8
    true = (predicted & actual).sum().item()
    return 2 * true / max(1, (predicted.sum() + actual.sum()).item()), true / actual.sum().item()


def test_batch_dice_after_a_warm_start_has_a_higher_f1_than_cross_entropy():
    """Of a rare class; and the weight of missed positives raises recall."""
    seeds = range(10)
    plain = [rare_eights(None, seed)[0] for seed in seeds]
    adjusted = [rare_eights(create("batch-self-adjusting-dice"), seed)[0] for seed in seeds]
    lenient, strict = (
        [rare_eights(create("batch-tversky", alpha=1 - beta, beta=beta), seed)[1] for seed in seeds]
        for beta in (0.8, 0.2)
    )

    assert is_beyond_noise(adjusted, plain)
    assert is_beyond_noise(lenient, strict)


def test_dice_of_examples_from_scratch_collapses():
    """To predicting next to no positive: why the catalogue tells to warm up."""
    loss = create("dice", classes="but-first")

    def of_one_logit(f, y):
        return loss(torch.stack((torch.zeros_like(f), f), -1), y)

    assert max(rare_eights(of_one_logit, seed, warm=0)[0] for seed in range(5)) < 0.2


def drifting_regression(slug, seed, *, rows=256, steps=500):
    """Return mean squared errors at the end of stages whose targets sin(1e5·⟨u, x⟩) + b move by 8."""
    generator = torch.Generator().manual_seed(seed)
    x = digits()[0][torch.randperm(1797, generator=generator)[:rows]]
    wave = torch.sin(1e5 * (x @ torch.randn(64, generator=generator)))
    loss = create(slug, bins=101, v_min=-40.0, v_max=40.0) if slug else None
    model = mlp(64, 128, 101 if loss else 1, seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    errors = []
    for offset in (0, 8, 16):
        y = wave + offset
        for _ in range(steps):
            out = model(x)
            descend(optimizer, loss(out, y) if loss else F.mse_loss(out.squeeze(1), y))
        decoded = loss.decode(model(x)) if loss else model(x).squeeze(1)
        errors.append(F.mse_loss(decoded, y).item())
    return errors


def test_histograms_follow_a_moving_target_that_squares_lose():
    """From the second stage on their error is at most a third of least squares'."""
    squares, two_hot, gauss = (
        torch.tensor([drifting_regression(slug, seed) for seed in range(3)]).mean(0)
        for slug in (None, "two-hot", "hl-gauss")
    )

    assert (3 * two_hot[1:] < squares[1:]).all()
    assert (3 * gauss[1:] < squares[1:]).all()


def shifted_pair(pair, seed, *, copies=3, noise=0.3, train=150):
    """Return training and test images of two digits at random places of 12×12 noisy pixels."""
    x, y = digits()
    generator = torch.Generator().manual_seed(seed)
    rows = ((y == pair[0]) | (y == pair[1])).nonzero().squeeze(1)
    rows = rows[torch.randperm(len(rows), generator=generator)]

    def drawn(part):
        part = part.repeat(copies)
        images = noise * torch.randn(len(part), 12, 12, generator=generator)
        for image, row, (i, j) in zip(
            images, part, torch.randint(0, 5, (len(part), 2), generator=generator).tolist(), strict=True
        ):
            image[i : i + 8, j : j + 8] += x[row].view(8, 8)
        return images.flatten(1), (y[part] == pair[1]).long()

    return drawn(rows[:train]), drawn(rows[train:])


def pair_accuracy(pair, seed, loss, *, epochs=150):
    (x, y), (x_test, y_test) = shifted_pair(pair, seed)
    model = mlp(144, 128, 1, seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(128):
            f = model(x[batch]).squeeze(1)
            descend(
                optimizer,
                loss(f, y[batch]) if loss else F.binary_cross_entropy_with_logits(f, y[batch].float()),
            )
        schedule.step()
    return ((model(x_test).squeeze(1) > 0) == (y_test == 1)).float().mean().item()


def test_ensloss_beats_the_logistic_loss_where_a_network_overfits():
    """Mean over four pairs of shifted, noisy digits."""
    runs = [(pair, seed) for pair in ((3, 8), (4, 9), (1, 7), (3, 5)) for seed in range(3)]
    plain = [pair_accuracy(pair, seed, None) for pair, seed in runs]
    ensemble = [pair_accuracy(pair, seed, create("ensloss", seed=seed)) for pair, seed in runs]

    assert is_beyond_noise(ensemble, plain)


def probability_of_the_certain(loss, seed, *, queries=32, labels=100, steps=400):
    """Return the softmax probability of a label that is always positive, beside four random ones."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.zeros(queries, labels, requires_grad=True)
    optimizer = torch.optim.Adam([scores], lr=0.1)
    for _ in range(steps):
        others = torch.rand(queries, labels - 1, generator=generator).topk(4).indices + 1
        descend(optimizer, loss(scores, torch.cat((others.new_zeros(queries, 1), others), 1)))
    return scores.softmax(1)[:, 0].mean().item()


def test_decoupled_softmax_lets_a_certain_label_be_certain():
    """Cross-entropy, averaged over the positives, holds it at 1/|P|."""

    def coupled(scores, positives):
        return -scores.log_softmax(1).gather(1, positives).mean()

    for seed in range(3):
        assert probability_of_the_certain(coupled, seed) == pytest.approx(0.2, abs=0.01)
        assert probability_of_the_certain(create("decoupled-softmax", temperature=1.0), seed) > 0.8
