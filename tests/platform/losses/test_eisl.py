"""The edit-invariant sequence loss: the sheet's values, its special cases, and what it is blind to."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from lossworks.entries.losses.sequences.eisl import edit_invariant, ngram_scores
from lossworks.errors import UserError
from lossworks.losses import create
from lossworks.tasks.text.language_model import TrainSpec


def quiet(**settings):
    """Return the loss without noise."""
    return create("eisl", noise=False, **settings)


def problem(b=3, t=5, v=7, d=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    e = torch.randn(b, t, d, dtype=torch.float64, generator=g).requires_grad_()
    c, bias = (
        torch.randn(*size, dtype=torch.float64, generator=g).requires_grad_() for size in ((v, d), (v,))
    )
    y = torch.randint(0, v, (b, t), generator=g)
    y[0, 3:] = -100
    return e, c, y, bias


def loops(log_p, y, n, normalise=False):
    """Return L_n of one sequence without padding, written out."""
    t, total = len(y), 0.0
    for i in range(t - n + 1):
        scores = torch.stack(
            [sum(log_p[place + j, y[i + j]] for j in range(n)) for place in range(t - n + 1)]
        ) / (n if normalise else 1)
        total -= (scores.softmax(0) * scores).sum()
    return total / (t - n + 1)


def test_the_values_of_the_fact_sheet():
    """At n = T = T* it is the cross-entropy of the sequence; and never below −log of the sum over places."""
    p = torch.tensor([[[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]]], dtype=torch.float64)
    y = torch.tensor([[1, 0, 2]])
    for n, expected, bound in (
        (1, 0.9352703, 0.0510504),
        (2, 2.2405099, 1.7771743),
        (3, 4.8283137, 4.8283137),
    ):
        found = quiet(orders=[n])(p.log(), y).item()
        assert found == pytest.approx(expected, abs=1e-7)
        assert found >= bound - 1e-7
    assert quiet(orders=[3])(p.log(), y).item() == pytest.approx(
        cross_entropy(p.log()[0], y[0], reduction="sum").item()
    )
    mean = quiet(orders=[3], normalise=True)(p.log(), y).item()
    assert mean == pytest.approx(cross_entropy(p.log()[0], y[0]).item())


@pytest.mark.parametrize("normalise", [False, True])
def test_it_is_the_definition_and_padding_changes_nothing(normalise):
    """Against loops, each sequence cut to its length; orders have equal weight."""
    e, c, y, bias = problem()
    log_p = (e @ c.T + bias).log_softmax(-1)
    found = quiet(orders=[1, 3], normalise=normalise, reduction="none")(e @ c.T + bias, y)

    for row, length in enumerate((3, 5, 5)):
        expected = sum(loops(log_p[row, :length], y[row, :length], n, normalise) for n in (1, 3)) / 2
        torch.testing.assert_close(found[row], expected)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_with_and_without_logits_agree(softcap):
    """Values and gradients under a random upstream gradient, reductions, finite differences."""
    e, c, y, bias = problem()
    z = e @ c.T + bias
    z = z if softcap is None else softcap * (z / softcap).tanh()
    loss = quiet(reduction="none", cross_entropy=0.3)
    upstream = torch.randn(3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    dense, linear = loss(z, y), loss.linear(e, c, y, bias, softcap=softcap)

    torch.testing.assert_close(dense, linear)
    torch.testing.assert_close(
        *(torch.autograd.grad(x @ upstream, (e, c, bias), retain_graph=True) for x in (dense, linear))
    )
    torch.testing.assert_close(quiet(cross_entropy=0.3)(z, y), dense.mean())
    assert torch.autograd.gradcheck(lambda z: loss(z, y), (z.detach().requires_grad_(),))


def test_single_words_have_no_order():
    """n = 1 doesn't see a permutation of the target; n = 2 does."""
    e, c, y, bias = problem()
    z, y = (e @ c.T + bias)[1:], y[1:]
    shuffled = y[:, [3, 0, 4, 1, 2]]

    torch.testing.assert_close(quiet(orders=[1])(z, y), quiet(orders=[1])(z, shuffled))
    assert not torch.allclose(quiet(orders=[2])(z, y), quiet(orders=[2])(z, shuffled))


def test_targets_may_have_another_length():
    """Four outputs for two tokens; with cross-entropy that is refused."""
    z, y = torch.randn(2, 4, 6), torch.tensor([[1, 2], [3, -100]])
    found = quiet(reduction="none")(z, y)

    assert found.shape == (2,)
    assert found.isfinite().all()
    with pytest.raises(UserError, match="needs as many outputs as targets, not 4 and 2"):
        quiet(cross_entropy=0.5)(z, y)


def test_nothing_to_compare_is_zero_and_extremes_are_finite():
    """All ignored, sequences shorter than the n-gram, logits of ±1e4, half precision."""
    z = torch.randn(2, 3, 5, requires_grad=True)
    nothing = torch.full((2, 3), -100)
    for loss, y in ((quiet(), nothing), (quiet(orders=[4]), torch.zeros(2, 3, dtype=torch.int64))):
        value = loss(z, y)
        assert value == 0
        assert torch.autograd.grad(value, z, allow_unused=True, materialize_grads=True)[0].abs().max() == 0
    for dtype in (torch.float32, torch.bfloat16):
        extreme = torch.tensor([[[1e4, -1e4], [-1e4, 1e4]]], dtype=dtype, requires_grad=True)
        value = quiet(orders=[1, 2])(extreme, torch.tensor([[1, 1]]))
        assert value.isfinite()
        assert torch.autograd.grad(value, extreme)[0].isfinite().all()


@pytest.mark.parametrize("ignore_index", [-100, 9])
def test_outputs_beside_ignored_targets_may_be_anything(ignore_index):
    """NaN there reaches neither value nor gradients, with and without logits."""
    e, c, y, bias = problem()
    y = torch.where(y == -100, ignore_index, y)
    loss = quiet(ignore_index=ignore_index)
    expected = loss.linear(e, c, y, bias)
    spoiled = e.detach().clone()
    spoiled[0, 3:] = torch.nan
    spoiled.requires_grad_()

    for found in (loss.linear(spoiled, c, y, bias), loss(spoiled @ c.detach().T + bias.detach(), y)):
        torch.testing.assert_close(found, expected)
        assert torch.autograd.grad(found, spoiled, retain_graph=True)[0][:, :3].isfinite().all()
    (of_c,) = torch.autograd.grad(loss.linear(spoiled, c, y, bias), c)
    torch.testing.assert_close(of_c, torch.autograd.grad(expected, c)[0])


@pytest.mark.parametrize("wrong", [-1, 7])
def test_a_target_out_of_range_is_refused(wrong):
    """With and without logits; -1 is no other way to say class 0."""
    e, c, y, bias = problem()
    y[1, 2] = wrong
    for call in (lambda: quiet()(e @ c.T, y), lambda: quiet().linear(e, c, y, bias)):
        with pytest.raises(UserError, match=f"targets hold {wrong}"):
            call()
    with pytest.raises(UserError, match=r"must be torch\.int64"):
        quiet()(e @ c.T, y.double())


def test_noise_is_its_own_and_resumes():
    """The same seed draws the same, the state goes on, and eval() draws nothing."""
    e, c, y, bias = problem()
    z = (e @ c.T + bias).detach()
    loss, same = create("eisl", seed=3), create("eisl", seed=3)
    first = loss(z, y)

    assert torch.equal(first, same(z, y))
    assert not torch.equal(first, loss(z, y))
    other = create("eisl", seed=3)
    other.load_state_dict(loss.state_dict())
    assert {name: value.dtype for name, value in loss.state_dict().items()} == {"stream.draws": torch.int64}
    assert torch.equal(other(z, y), loss(z, y))
    torch.testing.assert_close(loss.eval()(z, y), quiet()(z, y))


def test_scores_are_sums_along_diagonals():
    """And too long n-grams are none."""
    costs = torch.arange(12.0).reshape(1, 3, 4)

    assert ngram_scores(costs, 2).tolist() == [[[5.0, 7.0, 9.0], [13.0, 15.0, 17.0]]]
    valid, places = torch.ones(1, 4, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool)
    assert edit_invariant(costs, valid, places, 4, temperature=1.0).tolist() == [0.0]


def test_what_does_not_fit_is_refused():
    """Orders that are no whole numbers, shapes, and training with teacher forcing."""
    with pytest.raises(UserError, match=r"loss\.name=eisl can't train task=language-model"):
        TrainSpec().override(["loss=eisl"])
    with pytest.raises(UserError, match=r"orders=\(1\.5,\) must be whole numbers"):
        create("eisl", orders=[1.5])
    with pytest.raises(UserError, match="must be"):
        quiet()(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int64))
