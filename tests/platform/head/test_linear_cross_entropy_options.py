"""Every option of the head against the dense formula, and the edges that users of such functions meet."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lossworks.errors import UserError
from lossworks.head import LinearCrossEntropy, linear_cross_entropy, linear_row_loss
from lossworks.head.core import filtering
from lossworks.head.core.problem import LinearProblem
from lossworks.head.cpu import backend as cpu
from lossworks.head.cpu.tile_sizes import TileSizes

IGNORE = -100


def problem(n=11, d=5, v=7, *, dtype=torch.float64, ignored=0.3, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    e, c = ((torch.randn(size, d, generator=g) * scale).to(dtype).requires_grad_() for size in (n, v))
    b = torch.randn(v, generator=g).to(dtype).requires_grad_()
    y = torch.randint(0, v, (n,), generator=g)
    y[torch.rand(n, generator=g) < ignored] = IGNORE
    return e, c, y, b


@pytest.fixture(params=[True, False], ids=["kept", "twice"])
def tiny_tiles(request, monkeypatch):
    """Run in tiles of three rows and two classes, in either order."""
    plan = lambda *_, keep, filtered: TileSizes(3, 2, keep and request.param)  # noqa: E731
    monkeypatch.setattr(cpu, "choose_tile_sizes", plan)


def dense(e, c, y, b, *, smoothing, weight, z_loss, temperature, softcap, token_weight):
    """Return torch's loss of each row on dense logits, with the log-Z term, and the mean's divisor."""
    z = e @ c.T + b
    z = z if softcap is None else softcap * (z / softcap).tanh()
    u = z / temperature
    options = {"weight": weight, "label_smoothing": smoothing}
    losses = F.cross_entropy(u, y, reduction="none", **options) + z_loss * u.logsumexp(1) ** 2 * (y != IGNORE)
    own = 1.0 if weight is None else weight[y.clamp(min=0)]
    divisor = (token_weight * own * (y != IGNORE)).sum()
    return losses * token_weight, divisor


@settings(max_examples=60, deadline=None)
@given(
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    weighted=st.booleans(),
    z_loss=st.sampled_from([0.0, 0.3]),
    temperature=st.sampled_from([1.0, 0.5, 3.0]),
    softcap=st.sampled_from([None, 2.0]),
    tokens=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    impl=st.sampled_from(["cpu", "reference"]),
    keep=st.booleans(),
    seed=st.integers(0, 99),
)
def test_all_options_together(
    smoothing, weighted, z_loss, temperature, softcap, tokens, reduction, impl, keep, seed
):
    """Any combination gives torch's value and gradients under a random upstream gradient."""
    e, c, y, b = problem(seed=seed)
    g = torch.Generator().manual_seed(seed)
    weight = torch.rand(7, dtype=torch.float64, generator=g) if weighted else None
    token_weight = torch.rand(11, dtype=torch.float64, generator=g) if tokens else None
    losses, divisor = dense(
        e,
        c,
        y,
        b,
        smoothing=smoothing,
        weight=weight,
        z_loss=z_loss,
        temperature=temperature,
        softcap=softcap,
        token_weight=torch.ones(11) if token_weight is None else token_weight,
    )
    expected = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / divisor.clamp(min=1e-30)}[
        reduction
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            cpu, "choose_tile_sizes", lambda *_, keep, filtered, k=keep: TileSizes(3, 2, keep and k)
        )
        actual = linear_cross_entropy(
            e,
            c,
            y,
            b,
            softcap=softcap,
            reduction=reduction,
            label_smoothing=smoothing,
            class_weight=weight,
            token_weight=token_weight,
            z_loss=z_loss,
            temperature=temperature,
            impl=impl,
        )
        upstream = torch.randn(actual.shape, dtype=torch.float64, generator=g)
        gradients = torch.autograd.grad(actual, (e, c, b), upstream)

    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (e, c, b), upstream))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_soft_targets(tiny_tiles, smoothing, weighted, reduction, impl):
    """Probabilities as targets give what torch gives for them."""
    e, c, _, b = problem()
    q = torch.rand(11, 7, dtype=torch.float64).softmax(1)
    weight = torch.rand(7, dtype=torch.float64) if weighted else None
    options = {"label_smoothing": smoothing, "reduction": reduction}
    expected = F.cross_entropy(e @ c.T + b, q, weight=weight, **options)
    actual = linear_cross_entropy(e, c, q, b, class_weight=weight, impl=impl, **options)
    upstream = torch.randn(actual.shape, dtype=torch.float64)

    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, (e, c, b), upstream), torch.autograd.grad(expected, (e, c, b), upstream)
    )


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_the_logsumexp_is_returned_and_differentiable(tiny_tiles, impl):
    """A loss on the logsumexps, too, has the right gradient; ignored rows have 0 and none."""
    e, c, y, b = problem()
    loss, lse = linear_cross_entropy(e, c, y, b, return_lse=True, impl=impl)
    z = e @ c.T + b
    dense_lse = torch.where(y == IGNORE, 0, z.logsumexp(1))
    dense_loss = F.cross_entropy(z, y)

    torch.testing.assert_close(lse, dense_lse)
    torch.testing.assert_close(
        torch.autograd.grad(loss + (lse**3).sum(), (e, c, b)),
        torch.autograd.grad(dense_loss + (dense_lse**3).sum(), (e, c, b)),
    )


def test_folding_a_loss_equals_its_formula(tiny_tiles):
    """A focal loss folded into the pass has the value and gradients of the dense one."""
    e, c, y, b = problem()

    def focal(z, lse):
        return (1 - (z - lse).exp()) ** 2 * (lse - z)

    keep = y != IGNORE
    z = (e @ c.T + b)[keep]
    expected = focal(z.gather(1, y[keep, None]).squeeze(1), z.logsumexp(1)).sum()
    actual = linear_row_loss(e, c, y, focal, b)

    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(3 * actual, (e, c, b)), torch.autograd.grad(3 * expected, (e, c, b))
    )


def test_the_gradient_of_a_gradient_is_refused():
    """Double backward would need the softmax's derivative; it is an error and not a wrong number."""
    e, c, y, b = problem()
    for reduction in ("sum", "none"):
        loss = linear_cross_entropy(e, c, y, b, reduction=reduction).sum()
        (first,) = torch.autograd.grad(loss, e, create_graph=True)
        with pytest.raises(RuntimeError, match="can't be differentiated again"):
            torch.autograd.grad(loss + first.square().sum(), c)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "none"},
        {"softcap": 2.0, "temperature": 0.5},
        {"return_lse": True, "reduction": "sum"},
        {"filter_eps": 0.1, "return_mass": True},
    ],
)
def test_the_most_likely_class_comes_from_the_same_pass(tiny_tiles, options, impl):
    """It is the largest logit's, −1 in ignored rows, and changes neither loss nor gradients."""
    if impl == "reference" and "return_mass" in options:
        pytest.skip("there is no filter in the reference")
    e, c, y, b = problem()
    *found, predicted = linear_cross_entropy(e, c, y, b, return_predicted=True, impl=impl, **options)
    plain = linear_cross_entropy(e, c, y, b, impl=impl, **options)

    assert predicted.tolist() == torch.where(y == IGNORE, -1, (e @ c.T + b).argmax(1)).tolist()
    for ours, theirs in zip(found, plain if isinstance(plain, tuple) else [plain], strict=True):
        assert ours.equal(theirs)


@pytest.mark.parametrize("options", [{}, {"reduction": "none"}, {"label_smoothing": 0.1, "return_lse": True}])
def test_compiles_as_one_graph(options):
    """torch.compile(fullgraph=True) sees registered operators, ignored rows or not."""
    e, c, y, b = problem()

    def total(e, c, y, b):
        result = linear_cross_entropy(e, c, y, b, **options)
        return sum(part.sum() for part in result) if isinstance(result, tuple) else result.sum()

    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")(e, c, y, b)

    torch.testing.assert_close(compiled, total(e, c, y, b))
    torch.testing.assert_close(
        torch.autograd.grad(compiled, (e, c, b)), torch.autograd.grad(total(e, c, y, b), (e, c, b))
    )


def test_operators_are_registered_soundly():
    """The fake implementations give the shapes and dtypes of the real ones."""
    from lossworks.head.autograd.fused_cross_entropy import fused_cross_entropy
    from lossworks.head.autograd.linear_row_sums import linear_row_sums

    e, c, y, b = (x.detach() for x in problem(dtype=torch.float32))
    tail = (None, 1.0, IGNORE, None, True, 0.05, torch.float32, [True] * 3, "cpu", "fp32", None, True, True)
    tail = (*tail, None, None, False)  # nothing frozen
    fused = (e, c, y, b, None, None, torch.ones(11), None, None, None, None, *tail)
    sums = (e, c, y, b, None, None, torch.ones(()), *(None,) * 5, IGNORE, True, True, True, 0.05)
    checks = ("test_schema", "test_faketensor")

    torch.library.opcheck(fused_cross_entropy, fused, test_utils=checks)
    torch.library.opcheck(linear_row_sums, (*sums, torch.float32, "cpu", None, False), test_utils=checks)


def test_a_row_that_is_sure_keeps_its_gradient_in_bfloat16():
    """p − 1 is formed before anything is rounded: at p = 0.999 it is not off by a factor."""
    e = torch.tensor([[1.0]], dtype=torch.bfloat16, requires_grad=True)
    c = torch.tensor([[7.0], [0.0]], dtype=torch.bfloat16, requires_grad=True)
    loss = linear_cross_entropy(e, c, torch.tensor([0]))
    (gradient,) = torch.autograd.grad(loss, c)
    p = torch.tensor(7.0, dtype=torch.float64).sigmoid()

    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), -p.log(), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient.double()[:, 0], torch.stack([p - 1, 1 - p]), rtol=8e-3, atol=0)


def test_a_large_common_offset_costs_no_digits():
    """Logits around 1e5 give the loss of the same logits around 0, as far as float32 holds them."""
    d = torch.tensor([[1.0, 2.0, -3.0, 0.5]])
    c = torch.tensor([[1.0], [1.0], [1.0], [1.0]], requires_grad=True)
    bias = d[0] + 1e5
    near = bias - 1e5  # what float32 keeps of d beside 1e5
    loss = linear_cross_entropy(torch.zeros(1, 1), c, torch.tensor([1]), bias.requires_grad_())

    torch.testing.assert_close(loss, F.cross_entropy(near[None], torch.tensor([1])), rtol=1e-6, atol=1e-7)
    (gradient,) = torch.autograd.grad(loss, bias)
    torch.testing.assert_close(gradient.sum(), torch.tensor(0.0), atol=1e-7, rtol=0)


def test_any_layout_gives_the_same():
    """Transposed, strided and offset inputs give what contiguous copies give."""
    _, c, y, b = problem(ignored=0.0)
    wide = torch.randn(12, 11, dtype=torch.float64)
    views = (wide.t()[:, 2:7], c.detach().t().contiguous().t(), y.repeat_interleave(2)[::2])
    copies = [x.contiguous() for x in views]

    torch.testing.assert_close(linear_cross_entropy(*views, b), linear_cross_entropy(*copies, b))


@pytest.mark.parametrize("shape", [(0, 3, 4), (1, 1, 1), (3, 2, 1), (5, 0, 3)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_sizes_of_nought_and_one(shape, reduction):
    """No rows, one class and no features are no special cases."""
    n, d, v = shape
    e, c = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    loss = linear_cross_entropy(e, c, torch.zeros(n, dtype=torch.int64), reduction=reduction)
    gradients = torch.autograd.grad(loss.sum(), (e, c))

    dense_loss = F.cross_entropy(e @ c.T, torch.zeros(n, dtype=torch.int64), reduction="sum")
    expected = dense_loss / max(n, 1) if reduction == "mean" else dense_loss
    torch.testing.assert_close(loss.sum(), expected)
    assert all(g.isfinite().all() for g in gradients)


def test_nan_propagates_or_is_named():
    """A NaN gives a NaN loss as in torch; ``check=True`` names its row."""
    e, c, y, b = problem(ignored=0.0)
    bad = e.detach().clone()
    bad[4, 2] = float("nan")

    assert linear_cross_entropy(bad, c, y, b).isnan()
    assert linear_cross_entropy(bad, c, y, b, reduction="none").isnan().nonzero().tolist() == [[4]]
    with pytest.raises(UserError, match="e holds NaN or infinity, first in row 4 of 11"):
        linear_cross_entropy(bad, c, y, b, check=True)


def zipf_problem(n=64, d=24, v=600, seed=0):
    """Return a head with a frequency direction and confident rows, float64."""
    g = torch.Generator().manual_seed(seed)
    frequency = 1 / torch.arange(1, v + 1, dtype=torch.float64)
    c = torch.randn(v, d, generator=g, dtype=torch.float64) * 0.3
    c[:, 0] = frequency.log()
    y = torch.multinomial(frequency, n, replacement=True, generator=g)
    e = torch.randn(n, d, generator=g, dtype=torch.float64) + 6 * c[y]
    e[:, 0] = 1.0
    return e.requires_grad_(), c.requires_grad_(), y


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("features", [24, 80], ids=["", "borrowed"])
@pytest.mark.parametrize("seed", range(3))
def test_the_filters_error_is_within_its_bound(monkeypatch, keep, features, seed):
    """Per row of ∂E and per class of ∂C, with the repair, for a threshold that leaves much out."""
    e, c, y = zipf_problem(d=features, seed=seed)
    monkeypatch.setattr(
        cpu, "choose_tile_sizes", lambda *_, keep, filtered, k=keep: TileSizes(16, 100, keep and k)
    )
    exact = torch.autograd.grad(linear_cross_entropy(e, c, y, reduction="sum"), (e, c))
    loss, mass = linear_cross_entropy(e, c, y, reduction="sum", filter_eps=1e-2, return_mass=True)
    filtered = torch.autograd.grad(loss, (e, c))
    published = torch.autograd.grad(
        linear_cross_entropy(e, c, y, reduction="sum", filter_eps=1e-2, filter_repair=False), (e, c)
    )

    p = (e @ c.T).softmax(1).detach()
    radius = torch.cdist(c.detach(), c.detach()).amax()  # at least the distance to any mean of rows
    error = (filtered[0] - exact[0]).norm(dim=1)
    assert mass.min() > 0
    assert mass.max() < 1
    assert (error <= mass * radius + 1e-12).all()
    spread = torch.cdist(e.detach(), e.detach()).amax()
    assert ((filtered[1] - exact[1]).norm(dim=1) <= p.sum(0) * spread + 1e-12).all()
    torch.testing.assert_close(loss, linear_cross_entropy(e, c, y, reduction="sum"))
    _, nothing = linear_cross_entropy(e, c, y, return_mass=True)
    assert nothing.tolist() == [0.0] * len(y)
    for position in range(2):
        repaired, lost = ((g[position] - exact[position]).norm() for g in (filtered, published))
        assert repaired < lost
    assert (published[1] == 0).all(1).any()
    assert not (filtered[1] == 0).all(1).any()


def test_the_repair_is_exact_where_all_rows_share_a_distribution():
    """Rows with the same logits lose nothing: the rank-one matrix is what was left out."""
    e = torch.ones(8, 3, dtype=torch.float64, requires_grad=True)
    c = torch.randn(50, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(50, dtype=torch.float64, requires_grad=True)
    y = torch.arange(8)
    gradients = [
        torch.autograd.grad(linear_cross_entropy(e, c, y, bias, filter_eps=eps), (e, c, bias))
        for eps in (0.5, None)
    ]

    torch.testing.assert_close(*gradients)


def test_a_filter_of_nothing_is_exact(tiny_tiles):
    """With eps = 0 every column is kept."""
    e, c, y, b = problem()
    gradients = [
        torch.autograd.grad(linear_cross_entropy(e, c, y, b, filter_eps=eps), (e, c, b))
        for eps in (0.0, None)
    ]

    torch.testing.assert_close(*gradients)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 20), st.integers(0, 2**16))
def test_the_rank_one_matrix_keeps_the_sums(n, v, seed):
    """Whatever is left out, row and column sums of ∂L/∂z stay: E and C of ones show them."""
    g = torch.Generator().manual_seed(seed)
    p = torch.rand(v, n, generator=g, dtype=torch.float64)
    kept = (torch.rand(v, generator=g) < 0.5).nonzero().squeeze(1)
    a = torch.rand(n, generator=g, dtype=torch.float64)
    remainder = filtering.Remainder(n, v, p)
    remainder.drop(p, kept, p[kept], slice(0, v), slice(0, n), a)
    e_gradient, c_gradient = (torch.zeros(size, 1, dtype=torch.float64) for size in (n, v))
    ones = (torch.ones(size, 1, dtype=torch.float64) for size in (n, v))
    problem = LinearProblem(*ones, torch.zeros(n, dtype=torch.int64))
    remainder.add_to(filtering.Gradients(e_gradient, c_gradient, None), problem)
    dropped = p.index_fill(0, kept, 0) * a

    torch.testing.assert_close(e_gradient[:, 0], dropped.sum(0))
    torch.testing.assert_close(c_gradient[:, 0], dropped.sum(1))


def test_the_module_is_the_function_with_its_parameters():
    """Its options go to the function, and a call may override them."""
    head = LinearCrossEntropy(5, 7, bias=True, label_smoothing=0.1)
    e, _, y, _ = problem(dtype=torch.float32)
    expected = linear_cross_entropy(e, head.weight, y, head.bias, label_smoothing=0.1, reduction="sum")

    torch.testing.assert_close(head(e, y, reduction="sum"), expected)
    assert "label_smoothing=0.1" in repr(head)
    with pytest.raises(UserError, match="classes=0"):
        LinearCrossEntropy(5, 0)


E, C, Y = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.5}, "label_smoothing=1.5"),
        ({"z_loss": -1.0}, "z_loss=-1.0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"filter_eps": "some"}, "filter_eps='some'"),
        ({"filter_eps": 1.0}, "filter_eps=1.0"),
        ({"buffer_share": 0.0}, "buffer_share=0.0"),
        ({"accumulate": "bf16"}, "accumulate='bf16'"),
        ({"class_weight": torch.ones(4)}, r"class_weight \(4,\)"),
        ({"token_weight": torch.ones(3)}, r"token_weight \(3,\)"),
        ({"impl": "triton"}, "GPU"),
        ({"return_mass": True, "reduction": "none"}, "return_mass"),
    ],
)
def test_bad_options_are_refused_by_name(options, message):
    """The error names the option, its value and what would be right."""
    with pytest.raises(UserError, match=message):
        linear_cross_entropy(E, C, Y, **options)


def test_the_reference_follows_shapes_on_the_meta_device():
    """The dense formula's memory is followed without taking it."""
    e, c = (torch.zeros(size, 3, device="meta", requires_grad=True) for size in (4, 5))
    y = torch.zeros(4, dtype=torch.int64, device="meta")
    loss = linear_cross_entropy(e, c, y, reduction="sum", impl="reference")

    assert [g.shape for g in torch.autograd.grad(loss, (e, c))] == [(4, 3), (5, 3)]


def test_class_weights_belong_to_the_module():
    """They are saved, moved and cast with it, and a call may still override them."""
    weights = torch.tensor([1.0, 0.5, 2.0])
    head = LinearCrossEntropy(4, 3, class_weight=weights)
    e, y = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 2, 1, 0])
    expected = F.cross_entropy(e @ head.weight.T, y, weight=weights)

    torch.testing.assert_close(head(e, y), expected)
    torch.testing.assert_close(head(e, y, class_weight=None), F.cross_entropy(e @ head.weight.T, y))
    assert torch.equal(head.state_dict()["class_weight"], weights)
    assert head.to("meta").class_weight.is_meta
    assert "class_weight" not in LinearCrossEntropy(4, 3).state_dict()
    with pytest.raises(UserError, match=r"class_weight \(2,\) must be \(3,\)"):
        LinearCrossEntropy(4, 3, class_weight=torch.ones(2))
