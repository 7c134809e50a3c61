"""One graph under ``torch.compile`` and ``torch.export``, and tensors that have a shape alone."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lossworks import linear_cross_entropy, linear_row_loss, linear_row_statistics
from lossworks.head import (
    Divergence,
    Gathered,
    LinearCrossEntropy,
    LogSumExp,
    LowRankClassifier,
    TeacherExpectedLogit,
    TopKDivergence,
    linear_log_probabilities,
    linear_top_k,
)

TARGETS = [0, 1, -100, 3, 4, 10]
NAMES = ("target", "logsumexp", "mean", "sum-of-squares", "variance", "expected")


def focal(target, lse):
    return (1 - (target - lse).exp()) ** 2 * (lse - target)


def every_option(e, c, b, y):
    more = {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0, "temperature": 0.7}
    weights = {"class_weight": c.new_ones(len(c)), "token_weight": e.new_ones(len(e))}
    loss, lse = linear_cross_entropy(e, c, y, b, return_lse=True, **more, **weights)
    return loss + lse.sum()


def every_statistic(e, c, b, y):
    asked = [*NAMES, LogSumExp(2.0), Gathered(y.clamp(min=0)[:, None])]
    found = linear_row_statistics(e, c, y, b, statistics=asked, target_offset=0.1 * e[:, 0].detach())
    return sum(value.sum() for value in found)


def predicted(found):
    return found[0] + found[1].sum()


def of_a_teacher(e, c, b, y):
    teacher = TeacherExpectedLogit(e[:, :4].detach(), c[:, :4].detach(), temperature=2.0)
    return linear_row_statistics(e, c, y, b, statistics=[teacher])[0].sum()


def divergences(e, c, b, y):
    stored, classes = e[:, :2].detach().sigmoid() / 2, torch.stack([y.clamp(0, 9), y.clamp(0, 9) + 1], 1)
    best = TopKDivergence("reverse-kl", stored.log(), classes)
    teacher = Divergence("jensen-shannon", e[:, :4].detach(), c[:, :4].detach(), temperature=2.0)
    found = linear_row_statistics(e, c, y, b, statistics=[teacher, best, "predicted"])
    return sum(value.sum() for value in found)


def low_rank(e, c, b, y):
    low = LowRankClassifier(c.detach(), c[:2], c[:, :2], 0.5)
    return linear_cross_entropy(e, low, y, b) + linear_row_statistics(e, low, y, statistics=["mean"])[0].sum()


FUNCTIONS = {
    "cross-entropy": lambda e, c, b, y: linear_cross_entropy(e, c, y, b),
    "of each row": lambda e, c, b, y: linear_cross_entropy(e, c, y, b, reduction="none").square().sum(),
    "every option": every_option,
    "predicted": lambda e, c, b, y: predicted(linear_cross_entropy(e, c, y, b, return_predicted=True)),
    "batch-invariant": lambda e, c, b, y: linear_cross_entropy(e, c, y, b, batch_invariant=True),
    "filtered": lambda e, c, b, y: linear_cross_entropy(e, c, y, b, filter_eps=1e-3, return_mass=True)[0],
    "row loss": lambda e, c, b, y: linear_row_loss(e, c, y, focal, b, token_weight=e.new_ones(len(e))),
    "every statistic": every_statistic,
    "teacher": of_a_teacher,
    "divergences": divergences,
    "log-probabilities": lambda e, c, b, y: linear_log_probabilities(e, c, y.clamp(min=0)[:, None], b).sum(),
    "low rank": low_rank,
    "top k": lambda e, c, b, y: linear_top_k(e, c, 3, b).log_probabilities.sum() + 0 * (e.sum() + c.sum()),
}
each = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())


def problem():
    g = torch.Generator().manual_seed(0)
    e, c, b = (torch.randn(shape, generator=g) for shape in ((6, 8), (11, 8), (11,)))
    return [x.requires_grad_() for x in (e, c, b)], torch.tensor(TARGETS)


def gradients(value, leaves):
    return torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)


@each
def test_one_graph(function):
    """``fullgraph=True`` refuses every break; value and gradients are those of eager code."""
    leaves, y = problem()
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*leaves, y)
    eager = function(*leaves, y)

    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(gradients(compiled, leaves), gradients(eager, leaves), rtol=1e-5, atol=1e-6)


@each
def test_exported_programs_give_the_same(function):
    """They are called with other numbers than those they were made with."""

    class Module(torch.nn.Module):
        def forward(self, e, c, b, y):
            return function(e, c, b, y)

    leaves, y = problem()
    plain = [x.detach() for x in leaves]
    program = torch.export.export(Module(), (*(x + 1 for x in plain), y.flip(0))).module()

    torch.testing.assert_close(program(*plain, y), function(*plain, y))


@each
@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_tensors_of_shapes_alone(function, kind):
    """They give results and gradients of the right shapes and dtypes, and nothing is computed."""
    leaves, y = problem()
    mode = FakeTensorMode()
    with mode if kind == "fake" else torch.device("meta"):
        shaped = [mode.from_tensor(x) if kind == "fake" else x.detach().to("meta") for x in (*leaves, y)]
        blank = [x.detach().requires_grad_() for x in shaped[:3]]
        value = function(*blank, shaped[3])
        found = gradients(value, blank)

    assert (value.shape, value.dtype) == (torch.Size([]), torch.float32)
    assert [(g.shape, g.dtype) for g in found] == [(x.shape, x.dtype) for x in leaves]


def test_the_module_is_one_graph_in_half_precision():
    """Gradients come in the parameters' dtype."""
    torch.manual_seed(0)
    head = LinearCrossEntropy(8, 11, bias=True, dtype=torch.bfloat16)
    e = torch.randn(6, 8, dtype=torch.bfloat16)
    torch.compiler.reset()
    loss = torch.compile(head, fullgraph=True, backend="aot_eager")(e, torch.tensor(TARGETS))
    loss.backward()

    torch.testing.assert_close(loss, head(e, torch.tensor(TARGETS)))
    assert head.weight.grad.dtype == torch.bfloat16


def test_a_target_out_of_range_is_refused_inside_a_graph():
    """As outside: the check is inside the operator."""
    leaves, _ = problem()
    torch.compiler.reset()
    compiled = torch.compile(FUNCTIONS["cross-entropy"], fullgraph=True, backend="aot_eager")

    with pytest.raises(Exception, match="targets hold 11, first in row 2 of 6"):
        compiled(*leaves, torch.tensor([0, 1, 11, 3, 4, 10]))
