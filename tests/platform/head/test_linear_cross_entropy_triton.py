"""The Triton kernels in Triton's interpreter, against the formulas in float64.

Triton decides whether to interpret a kernel when it is decorated, so the interpreter has a process of its
own: other tests compile the same kernels in this one. The interpreter's tiles are 16 rows × 32 classes × 16
features and its slabs 4 KiB.
"""

import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lossworks.errors import UserError
from lossworks.head.core.low_rank import Frozen, QuantizedClassifier
from lossworks.head.core.problem import Coefficients, Filter, LinearProblem, Softmax
from lossworks.head.triton import launch

ALL = (True, True, True)
EXACT = Filter(eps=0.0)  # drops nothing, and so sends exact gradients through the fused kernel


@pytest.fixture(scope="module")
def interpreter():
    """Return a function that runs a function of ``launch`` in the process that interprets."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_INTERPRET", "1")
            patch.setenv("OMP_NUM_THREADS", "1")
            pool.submit(int).result()
        yield lambda function, *args, **options: pool.submit(function, *args, **options).result()


OPTIONS = [
    pytest.param(dict(zip(("softcap", "bias", "temperature", "classes", "offset"), chosen, strict=True)))
    for chosen in itertools.product(
        (None, 3.0), (False, True), (1.0, 0.7, "rows"), (False, True), (False, True)
    )
]


def make(n=20, v=70, d=24, *, seed=0, dtype=torch.float32, **options):
    """Return a random problem and softmax; about a row in seven has no target here."""
    g = torch.Generator().manual_seed(seed)
    e, c = (torch.randn(size, d, generator=g).div(d**0.5 / 2).to(dtype) for size in (n, v))
    targets = torch.randint(0, v, (n,), generator=g)
    targets[torch.rand(n, generator=g) < 1 / 7] = -1
    bias = torch.randn(v, generator=g) if options.get("bias") else None
    offset = torch.randn(n, generator=g) if options.get("offset") else None
    temperature = options.get("temperature", 1.0)
    temperature = torch.rand(n, generator=g) + 0.5 if temperature == "rows" else temperature
    classes = torch.rand(v, generator=g) < 0.6 if options.get("classes") else None
    if classes is not None:
        classes[0] = True
    problem = LinearProblem(e, c, targets, bias, options.get("softcap"), offset)
    return problem, Softmax(temperature, classes)


def coefficients(n=20, v=70, *, seed=1):
    """Return random coefficients of every part."""
    g = torch.Generator().manual_seed(seed)
    return Coefficients(*(torch.randn(n, generator=g) for _ in range(5)), torch.rand(v, generator=g))


def logits(problem):
    """Return z, the onehot targets and the slope of the softcap, each (N, V), in float64."""
    z = problem.e.double() @ problem.c.double().T + (0 if problem.bias is None else problem.bias.double())
    slope = torch.ones_like(z)
    if problem.softcap is not None:
        z = problem.softcap * torch.tanh(z / problem.softcap)
        slope = 1 - (z / problem.softcap) ** 2
    onehot = (problem.targets[:, None] == torch.arange(len(problem.c), device=z.device)).double()
    if problem.target_offset is not None:
        z = z + onehot * problem.target_offset[:, None]
    return z, onehot, slope


def tempered(z, softmax):
    """Return z/τ, −inf where a class takes no part, and τ as a column."""
    tau = torch.as_tensor(softmax.temperature, dtype=torch.float64, device=z.device).reshape(-1, 1)
    z = z / tau
    return (z if softmax.classes is None else z.masked_fill(~softmax.classes, -torch.inf)), tau


def dense_gradient(problem, softmax, parts):
    """Return ∂L/∂z (N, V) from the definition of Coefficients."""
    z, onehot, slope = logits(problem)
    scaled, tau = tempered(z, softmax)
    p = scaled.softmax(1)
    a, x, t, c, m = (
        torch.zeros(len(z), 1, dtype=torch.float64, device=z.device)
        if part is None
        else part.double()[:, None]
        for part in (parts.softmax, parts.expected, parts.target, parts.constant, parts.linear)
    )
    w = 1 if parts.constant_weights is None else parts.constant_weights.double()
    centred = z - (p * z).sum(1, keepdim=True)
    return (a * p + x * p * (1 + centred / tau) + t * onehot + c * w + m * z) * slope


def check(actual, problem, g, rtol=1e-4, atol=2e-5):
    """Compare gradients with those that ∂L/∂z gives."""
    expected = (g @ problem.c.double(), g.T @ problem.e.double(), g.sum(0))
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("options", OPTIONS)
def test_row_sums_match_the_definition(interpreter, options):
    """Every sum of a row, for every mix of options."""
    problem, softmax = make(**options)
    sums, _ = interpreter(launch.row_sums, problem, softmax, expected=True, sums=True, predicted=True)
    z, onehot, _ = logits(problem)
    scaled, _ = tempered(z, softmax)
    expected = (
        scaled.logsumexp(1), (onehot * z).sum(1), (scaled.softmax(1) * z).sum(1), z.sum(1), z.square().sum(1)
    )  # fmt: skip

    for ours, theirs in zip(sums, expected, strict=False):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(sums.maximum + sums.log_total, sums.logsumexp)
    assert sums.predicted.tolist() == z.argmax(1).tolist()


@pytest.mark.parametrize("options", OPTIONS)
def test_slab_gradients_match_the_definition(interpreter, options):
    """All parts of the gradient at once, over three slabs."""
    problem, softmax = make(**options)
    parts = coefficients()
    sums, _ = interpreter(launch.row_sums, problem, softmax, expected=True)
    actual = interpreter(
        launch.gradients, problem, softmax, sums.logsumexp, parts, ALL, expected=sums.expected
    )

    check(actual, problem, dense_gradient(problem, softmax, parts), atol=1e-4)


@pytest.mark.parametrize("options", OPTIONS)
def test_fused_gradients_match_the_definition(interpreter, options):
    """Parts of softmax, target and constant by the fused kernel, classes in a random order."""
    problem, softmax = make(**options)
    parts = replace(coefficients(), expected=None, linear=None)
    if problem.softcap is not None:
        parts = replace(parts, constant=None)
    sums, _ = interpreter(launch.row_sums, problem, softmax)
    order = torch.randperm(70).int()
    actual = interpreter(
        launch.gradients, problem, softmax, sums.logsumexp, parts, ALL, filter=EXACT, order=order
    )

    check(actual, problem, dense_gradient(problem, softmax, parts))


@pytest.mark.parametrize("part", ["softmax", "expected", "target", "constant", "linear"])
@pytest.mark.parametrize("options", [{"deterministic": True}, {"filter": EXACT}])
def test_each_coefficient_alone(interpreter, part, options):
    """Every part counts by itself; one that a filter can't see is exact all the same."""
    problem, softmax = make()
    parts = Coefficients(**{part: coefficients().softmax})
    sums, _ = interpreter(launch.row_sums, problem, softmax, expected=True)
    actual = interpreter(
        launch.gradients, problem, softmax, sums.logsumexp, parts, ALL, expected=sums.expected, **options
    )

    check(actual, problem, dense_gradient(problem, softmax, parts))


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 3.0, "bias": True, "temperature": "rows", "classes": True}]
)
@pytest.mark.parametrize("n", [20, 33])
def test_a_row_has_the_same_bits_in_any_batch(interpreter, n, options):
    """Alone, in another order and among fewer; and they are those of the definition."""
    problem, softmax = make(n, 200, 40, **options)
    parts = coefficients(n, 200)
    same = {"rows_alike": True}

    def numbers(index):
        rows = replace(problem, e=problem.e[index], targets=problem.targets[index])
        tau = softmax.temperature
        of_rows = replace(softmax, temperature=tau[index] if isinstance(tau, torch.Tensor) else tau)
        sums, _ = interpreter(launch.row_sums, rows, of_rows, expected=True, sums=True, **same)
        some = Coefficients(*(x[index] for x in list(vars(parts).values())[:5]), parts.constant_weights)
        found = interpreter(
            launch.gradients, rows, of_rows, sums.logsumexp, some, ALL, expected=sums.expected, **same
        )
        return *sums[:7], found.e, found

    *whole, found = numbers(torch.arange(n))
    check(found, problem, dense_gradient(problem, softmax, parts), atol=1e-4)
    for index in (torch.tensor([n - 1]), torch.randperm(n), torch.randperm(n)[: n // 2]):
        for mine, theirs in zip(numbers(index)[:-1], whole, strict=True):
            assert mine.equal(theirs[index])


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "bias": True, "temperature": "rows"}])
def test_frozen_columns_and_a_low_rank_part(interpreter, quantised, options):
    """A classifier in two parts, of which the second has a gradient, is their concatenation."""
    whole, softmax = make(d=24, **options)
    frozen = Frozen(whole.c[:, :20])
    if quantised:
        frozen = Frozen.of(QuantizedClassifier.of(whole.c[:, :20]))
        whole = replace(whole, c=torch.cat([frozen.rows(slice(None), torch.float32), whole.c[:, 20:]], 1))
    parts = coefficients()
    problem = replace(whole, c=whole.c[:, 20:], frozen=frozen)
    sums, _ = interpreter(launch.row_sums, problem, softmax, expected=True, sums=True)
    expected, _ = interpreter(launch.row_sums, whole, softmax, expected=True, sums=True)
    for ours, theirs in zip(sums[:5], expected[:5], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    how = {"expected": sums.expected, "filter": EXACT}  # a filter is not for such a classifier: exact
    found = interpreter(launch.gradients, problem, softmax, sums.logsumexp, parts, ALL, **how)

    assert found.c.shape == (70, 4)
    of_e, of_c, of_bias = interpreter(launch.gradients, whole, softmax, sums.logsumexp, parts, ALL, **how)
    torch.testing.assert_close(tuple(found), (of_e, of_c[:, 20:], of_bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", [{"deterministic": True}, {"filter": EXACT}])
def test_the_slope_of_a_saturated_softcap_has_all_its_digits(interpreter, how):
    """1 − tanh² of a capped logit cancels; the gradient of E is then as wrong as large."""
    g = torch.Generator().manual_seed(0)
    e, c = torch.rand((20, 1), generator=g) + 6, torch.randn((70, 1), generator=g).sign()
    problem = LinearProblem(e, c, torch.randint(0, 70, (20,), generator=g), softcap=1.0)
    parts = replace(coefficients(), expected=None, constant=None, linear=None)
    sums, _ = interpreter(launch.row_sums, problem, Softmax())
    found = interpreter(launch.gradients, problem, Softmax(), sums.logsumexp, parts, ALL, **how)

    check(found, problem, dense_gradient(problem, Softmax(), parts), rtol=1e-5, atol=0)


@settings(max_examples=8, deadline=None)
@given(n=st.integers(1, 34), v=st.integers(1, 70), d=st.integers(1, 34), seed=st.integers(0, 99))
@example(n=1, v=1, d=1, seed=0)
@example(n=16, v=32, d=16, seed=0)
@example(n=17, v=33, d=17, seed=0)
def test_ragged_edges_on_every_axis(interpreter, n, v, d, seed):
    """Sizes on both sides of a tile give the definition's sums and gradients, on both ways."""
    problem, softmax = make(n, v, d, seed=seed, bias=True)
    parts = replace(coefficients(n, v, seed=seed), expected=None, linear=None)
    sums, _ = interpreter(launch.row_sums, problem, softmax, sums=True)
    z, onehot, _ = logits(problem)
    g = dense_gradient(problem, softmax, parts)

    torch.testing.assert_close(sums.target.double(), (onehot * z).sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums.logsumexp.double(), z.logsumexp(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums.total.double(), z.sum(1), rtol=1e-5, atol=1e-4)
    for how in (None, EXACT):
        actual = interpreter(launch.gradients, problem, softmax, sums.logsumexp, parts, ALL, filter=how)
        check(actual, problem, g)


@pytest.mark.parametrize("taking_part", [[69], [40], []])
def test_tiles_without_any_class_give_no_nan(interpreter, taking_part):
    """Whole tiles masked out before, after and around the only class; and a row without any class."""
    problem, _ = make()
    classes = torch.zeros(70, dtype=torch.bool)
    classes[taking_part] = True
    sums, _ = interpreter(launch.row_sums, problem, Softmax(1.0, classes))
    z, _, _ = logits(problem)

    torch.testing.assert_close(sums.logsumexp, z[:, classes].logsumexp(1).float())


def test_what_is_not_asked_for_is_none(interpreter):
    """Sums and gradients are optional one by one."""
    problem, softmax = make(bias=True)
    sums, mean = interpreter(launch.row_sums, problem, softmax)
    parts = Coefficients(softmax=torch.ones(20))
    g = dense_gradient(problem, softmax, parts)

    assert (sums.expected, sums.total, sums.squares, mean) == (None, None, None, None)
    for how, i in itertools.product((None, EXACT), range(3)):
        wanted = tuple(i == k for k in range(3))
        found = interpreter(launch.gradients, problem, softmax, sums.logsumexp, parts, wanted, filter=how)
        expected = (g @ problem.c.double(), g.T @ problem.e.double(), g.sum(0))[i].float()
        assert [x is not None for x in found] == list(wanted)
        torch.testing.assert_close(found[i], expected, rtol=1e-4, atol=1e-5)


def test_order_is_the_mean_logit(interpreter):
    """Classes can be sorted by what ``order`` returns: the mean over rows of their logits."""
    problem, softmax = make(bias=True)
    _, mean = interpreter(launch.row_sums, problem, softmax, order=True)

    torch.testing.assert_close(mean.double(), logits(problem)[0].mean(0), rtol=1e-5, atol=1e-5)


def test_strided_inputs(interpreter):
    """Rows of any stride, and columns that are not contiguous, are read as they lie."""
    problem, softmax = make()
    rows = torch.randn(40, 24)[::2]
    problem = replace(problem, e=rows, c=problem.c.T.contiguous().T)
    sums, _ = interpreter(launch.row_sums, problem, softmax)
    parts = Coefficients(softmax=torch.ones(20))

    for how in (None, EXACT):
        actual = interpreter(launch.gradients, problem, softmax, sums.logsumexp, parts, ALL, filter=how)
        check(actual, problem, dense_gradient(problem, softmax, parts))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-2), (torch.bfloat16, 1e-1)])
@pytest.mark.parametrize("accumulate", ["fp32", "input"])
@pytest.mark.parametrize("how", [None, EXACT])
def test_half_precision(interpreter, dtype, tolerance, accumulate, how):
    """Sums are as exact as in float32, gradients round ∂L/∂z once, and come in the dtype asked for."""
    if dtype == torch.bfloat16 and accumulate == "input" and how is EXACT:
        pytest.skip("the interpreter has no atomic addition of bfloat16")
    problem, softmax = make(dtype=dtype)
    parts = Coefficients(softmax=torch.rand(20), target=-torch.rand(20))
    sums, _ = interpreter(launch.row_sums, problem, softmax)
    actual = interpreter(
        launch.gradients, problem, softmax, sums.logsumexp, parts, ALL, filter=how, accumulate=accumulate
    )
    z, _, _ = logits(problem)

    torch.testing.assert_close(sums.logsumexp.double(), z.logsumexp(1), rtol=1e-5, atol=1e-5)
    check(actual, problem, dense_gradient(problem, softmax, parts), rtol=tolerance, atol=tolerance)
    assert {actual.e.dtype, actual.c.dtype} == {torch.float32 if accumulate == "fp32" else dtype}


def peaked(seed=0):
    """Return a problem whose probabilities are tiny in whole tiles, with a > 0, and its true ∂L/∂z."""
    problem, softmax = make(32, 128, 16, seed=seed, bias=True)
    bias = torch.randn(128) - 12.0 * (torch.arange(128) >= 32)
    problem = replace(problem, bias=bias, targets=torch.randint(0, 32, (32,)))
    a = torch.rand(32) + 0.5
    parts = Coefficients(softmax=a, target=-a)
    return problem, softmax, parts, dense_gradient(problem, softmax, parts)


def test_a_repaired_filter_keeps_its_bound(interpreter):
    """‖error of ∂e_i‖ ≤ a_i·m_i·max ‖C_k − c̄‖, and likewise for ∂C; sums over a row or a class are exact."""
    problem, softmax, parts, g = peaked()
    sums, _ = interpreter(launch.row_sums, problem, softmax)
    found = interpreter(
        launch.gradients, problem, softmax, sums.logsumexp, parts, ALL, filter=Filter(eps=1e-3)
    )
    e, c = problem.e.double(), problem.c.double()
    dropped = g[:, 32:]  # the tiles of 16 × 32 behind the first, none of which has a target
    m, q = dropped.sum(1), dropped.sum(0)
    centre, mean = q @ c[32:] / m.sum(), m @ e / m.sum()
    error_e, error_c = (found.e - g @ c).norm(dim=1), (found.c - g.T @ e).norm(dim=1)[32:]

    assert dropped.max() < 1e-3
    assert (error_e <= m * (c[32:] - centre).norm(dim=1).max() + 1e-5).all()
    assert (error_c <= q * (e - mean).norm(dim=1).max() + 1e-6).all()
    torch.testing.assert_close(found.bias.double(), g.sum(0), rtol=1e-4, atol=1e-5)


def test_the_published_filter_loses_what_the_repaired_one_keeps(interpreter):
    """Without repair classes of dropped tiles get no gradient at all, and E's error is larger."""
    problem, softmax, parts, g = peaked()
    sums, _ = interpreter(launch.row_sums, problem, softmax)
    published, repaired = (
        interpreter(
            launch.gradients, problem, softmax, sums.logsumexp, parts, ALL, filter=Filter(1e-3, repair=repair)
        )
        for repair in (False, True)
    )
    exact = g @ problem.c.double()

    assert (published.c[32:] == 0).all()
    assert (published.bias[32:] == 0).all()
    assert (repaired.c[32:] != 0).any(dim=1).all()
    assert (published.c[:32] != 0).any()
    assert (repaired.e - exact).norm() < (published.e - exact).norm()


def test_sorting_lets_the_filter_drop_scattered_classes(interpreter):
    """Under a permutation of classes no tile is small; walked in the order of mean logits they are again."""
    problem, softmax, parts, _ = peaked()
    shuffle = torch.randperm(128)
    place = shuffle.argsort()
    mixed = replace(problem, c=problem.c[shuffle], bias=problem.bias[shuffle], targets=place[problem.targets])
    sums, mean = interpreter(launch.row_sums, mixed, softmax, order=True)

    def zeros(order):
        published = Filter(1e-3, repair=False)
        c = interpreter(
            launch.gradients, mixed, softmax, sums.logsumexp, parts, ALL, filter=published, order=order
        ).c
        return int((c == 0).all(dim=1).sum())

    assert zeros(None) == 0
    assert zeros(mean.argsort().int()) == 96


def test_a_large_smoothed_target_is_not_dropped(interpreter):
    """With label smoothing a sure row's gradient at its target is −α, not p − 1 ≈ 0, and has to stay."""
    problem = LinearProblem(torch.ones(1, 1), torch.tensor([[30.0], [0.0]]), torch.tensor([0]))
    parts = Coefficients(torch.ones(1), target=torch.full((1,), -0.9), constant=torch.full((1,), -0.05))
    sums, _ = interpreter(launch.row_sums, problem, Softmax())
    found = interpreter(launch.gradients, problem, Softmax(), sums.logsumexp, parts, ALL, filter=Filter(1e-3))

    torch.testing.assert_close(found.bias, torch.tensor([0.05, -0.05]))


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("teacher_softcap", [None, 2.0])
@pytest.mark.parametrize(
    "options", [{}, {"bias": True, "temperature": "rows", "classes": True, "offset": True}]
)
def test_a_teacher_of_another_width(interpreter, softcap, teacher_softcap, options):
    """Expected logits under the teacher's softmax, and their gradient, match the definition."""
    problem, _ = make(softcap=softcap, bias=True, offset=True)
    teacher, softmax = make(d=9, seed=5, softcap=teacher_softcap, **options)
    expected, lse = interpreter(launch.teacher_expected, problem, teacher, softmax)
    scale = torch.randn(20)
    found = interpreter(launch.teacher_gradients, problem, teacher, softmax, lse, scale, ALL)
    z, _, slope = logits(problem)
    scaled, _ = tempered(logits(teacher)[0], softmax)
    q = scaled.softmax(1)

    torch.testing.assert_close(lse.double(), scaled.logsumexp(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(expected.double(), (q * z).sum(1), rtol=1e-5, atol=1e-5)
    check(found, problem, scale.double()[:, None] * q * slope)


FAR = """
import torch
from lossworks.head.core.problem import Coefficients, Filter, LinearProblem, Softmax
from lossworks.head.triton import launch

far = torch.from_file(path, True, 2**31 + 8, dtype=torch.float16).as_strided((3, 8), (2**30, 1))
far.copy_(torch.randn(3, 8))
near, y, softmax = far.clone(), torch.tensor([0, 1, 2]), Softmax()
parts = Coefficients(softmax=torch.ones(3))
for e, c in ((far, near), (near, far)):
    here, there = LinearProblem(near, near, y), LinearProblem(e, c, y)
    sums = launch.row_sums(here, softmax)[0]
    assert launch.row_sums(there, softmax)[0].logsumexp.equal(sums.logsumexp)
    for how in (None, Filter(0.0)):
        arguments = softmax, sums.logsumexp, parts, (True,) * 3
        one, two = (launch.gradients(x, *arguments, filter=how) for x in (here, there))
        assert one.e.equal(two.e) and one.c.equal(two.c)
"""


def test_offsets_past_two_to_the_31st_element(interpreter, tmp_path):
    """Rows that lie 2³⁰ elements apart, in a file of holes, are found."""
    path = tmp_path / "holes"
    with path.open("wb") as file:
        file.truncate(2**32 + 2**12)
    interpreter(exec, FAR, {"path": str(path)})


def test_a_problem_that_is_not_on_a_gpu_is_refused():
    """Where kernels are compiled, tensors of the CPU get a message instead of a crash."""
    with pytest.raises(UserError, match="need a GPU"):
        launch.row_sums(*make())


def on_gpu(*, softcap=None, seed=0):
    """Return a problem of a real shape in bfloat16 on the GPU, and coefficients of cross-entropy."""
    problem, _ = make(2048, 50257, 768, seed=seed, dtype=torch.bfloat16, bias=True, softcap=softcap)
    moved = replace(problem, **{x: getattr(problem, x).cuda() for x in ("e", "c", "targets", "bias")})
    a = torch.rand(2048).cuda() / 2048
    return moved, Coefficients(softmax=a, target=torch.where(moved.targets < 0, 0, -a))


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("how", [None, EXACT])
def test_a_gpu_gives_what_the_definition_gives(softcap, how):
    """Sums to float32's precision; gradients as close as ∂L/∂z in bfloat16 allows."""
    problem, parts = on_gpu(softcap=softcap)
    sums, _ = launch.row_sums(problem, Softmax(), expected=True, sums=True)
    found = launch.gradients(problem, Softmax(), sums.logsumexp, parts, ALL, filter=how)
    z, _, _ = logits(problem)
    g = dense_gradient(problem, Softmax(), parts)

    torch.testing.assert_close(sums.logsumexp.double(), z.logsumexp(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums.expected.double(), (z.softmax(1) * z).sum(1), rtol=1e-3, atol=1e-3)
    for ours, theirs in zip(found, (g @ problem.c.double(), g.T @ problem.e.double(), g.sum(0)), strict=True):
        assert (ours - theirs).norm() <= 5e-3 * theirs.norm()


@pytest.mark.gpu
def test_a_gpu_repeats_its_slabs_bit_for_bit():
    """Two deterministic calls give the same bits."""
    problem, parts = on_gpu()
    first, second = (
        launch.gradients(
            problem,
            Softmax(),
            launch.row_sums(problem, Softmax())[0].logsumexp,
            parts,
            ALL,
            deterministic=True,
        )
        for _ in range(2)
    )

    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.gpu
def test_a_gpu_repairs_what_it_drops():
    """With the default ε the repaired gradient of C is closer than the published one."""
    problem, parts = on_gpu()
    sums, mean = launch.row_sums(problem, Softmax(), order=True)
    exact = dense_gradient(problem, Softmax(), parts).T @ problem.e.double()
    order = mean.argsort().int()
    errors = [
        (
            launch.gradients(
                problem, Softmax(), sums.logsumexp, parts, ALL, filter=Filter(2.0**-12, repair), order=order
            ).c
            - exact
        ).norm()
        for repair in (True, False)
    ]

    assert errors[0] < errors[1]
