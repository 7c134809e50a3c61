"""The audit of a loss: does it compute what it says, under everything that training does to it?

Wrong gradients hide well: a uniform upstream gradient, equal batches and mild float32 inputs show none. Every
check here is one of those that would have found a fault that lived in a released library.
"""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lossworks.errors import UserError
from lossworks.losses.audits.subject import ROWS, AuditFinding, Subject, judged
from lossworks.losses.problems import Problem

_DIRECTIONS, _STEP = 4, 1e-6
_FIRST = torch.tensor([0])
_REDUCTIONS = ("sum", "mean", "none")
_NO_VALUE = "it is declared unmonitored: its gradient isn't that of its value"


def audit(subject: Subject, *, ranks: bool = True) -> Iterator[AuditFinding]:
    """Yield the findings one by one; a check that raises has failed.

    Args:
        subject: What to audit.
        ranks: Whether to start two processes for the last check, which takes some seconds.
    """
    for check, name in _CHECKS:
        yield _tried(check, name, subject)
    if ranks:
        from lossworks.losses.audits.audit_ranks import two_ranks

        yield _tried(two_ranks, "two ranks of unequal share give what one gives", subject)


def _tried(check: Callable[[Subject], AuditFinding], name: str, subject: Subject) -> AuditFinding:
    try:
        found = check(subject)
    except Exception as error:  # noqa: BLE001 - a loss of anybody's; the report is to say what it did
        return AuditFinding(name, False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return AuditFinding(name, found.passed, found.detail)


def _finite_differences(subject: Subject) -> AuditFinding:
    if "unmonitored" in subject.flags:
        return AuditFinding("", None, _NO_VALUE)
    return judged(_worst_slope(subject, "sum", seed=1), 1e-6, "relative error")


def _every_reduction(subject: Subject) -> AuditFinding:
    if "unmonitored" in subject.flags:
        return AuditFinding("", None, _NO_VALUE)
    worst = {how: _worst_slope(subject, how, seed=2) for how in _REDUCTIONS}
    how = max(worst, key=lambda name: worst[name] if worst[name] == worst[name] else math.inf)
    return judged(worst[how], 1e-6, f"worst with reduction={how!r}: relative error")


def _worst_slope(subject: Subject, reduction: str, seed: int) -> float:
    """Return the worst error of the gradient along random directions, for a random upstream gradient."""
    problem = subject.problem(seed=seed)
    generator = torch.Generator().manual_seed(seed)
    prediction = problem.prediction.clone().requires_grad_()
    value = subject.value(reduction, problem.with_prediction(prediction))
    upstream = torch.randn(value.shape, dtype=value.dtype, generator=generator)
    (gradient,) = torch.autograd.grad((value * upstream).sum(), prediction)
    errors = [0.0]
    for _ in range(_DIRECTIONS):
        direction = torch.randn(prediction.shape, dtype=prediction.dtype, generator=generator)
        ahead, behind = (
            (
                subject.value(reduction, problem.with_prediction(problem.prediction + step * direction))
                * upstream
            )
            .sum()
            .item()
            for step in (_STEP, -_STEP)
        )
        measured, claimed = (ahead - behind) / (2 * _STEP), (gradient * direction).sum().item()
        errors.append(abs(measured - claimed) / max(1.0, abs(measured)))
    return max(errors) if all(map(math.isfinite, errors)) else math.nan


def _unequal_split(subject: Subject) -> AuditFinding:
    if subject.indivisible:
        return AuditFinding("", None, subject.indivisible)
    problem = subject.problem(rows=ROWS - 1)
    whole = subject.value("sum", problem)
    parts = sum(subject.value("sum", problem.part(rows)) for rows in (slice(0, 2), slice(2, None)))
    worst = float((whole - parts).abs() / whole.abs().clamp(min=1))
    return judged(worst, 1e-12, "relative difference of the sums")


def _ignored(subject: Subject) -> AuditFinding:
    problem = subject.problem()
    index = getattr(subject.build("sum"), "ignore_index", None)
    if index is None:
        return AuditFinding("", None, "it has no ignore_index")
    # A number that isn't known is NaN; a class is the index.
    unknown = math.nan if problem.target.is_floating_point() else index
    nothing = Problem(
        problem.prediction.clone().requires_grad_(),
        torch.full_like(problem.target, unknown),
        problem.context,
    )
    for reduction in ("sum", "mean"):
        value = subject.value(reduction, nothing)
        (gradient,) = torch.autograd.grad(value, nothing.prediction, materialize_grads=True)
        if value.item() != 0 or gradient.abs().max().item() != 0:
            return AuditFinding(
                "", False, f"reduction={reduction!r} gives {value.item():g} for nothing but ignored"
            )
    return AuditFinding("", True, "zero loss and gradient where everything is ignored")


def _blank(subject: Subject) -> AuditFinding:
    """Judge by a row that counts for nothing and holds NaN, beside the same row of zeros."""
    problem = subject.problem()
    index = getattr(subject.build("sum"), "ignore_index", None)
    if index is None:
        return AuditFinding("", None, "it has no ignore_index")
    targets = problem.target.clone()
    targets[0] = math.nan if targets.is_floating_point() else index
    cases = {"an ignored target": Problem(problem.prediction, targets, problem.context)}
    for shape in (problem.target.shape, problem.target.shape[:1]):
        weighted = problem.given(
            weight=torch.ones(shape, dtype=problem.prediction.dtype).index_fill(0, _FIRST, 0)
        )
        with contextlib.suppress(UserError):  # it takes no weights of that shape
            subject.value("sum", weighted)
            cases["a weight of 0"] = weighted
    for what, case in cases.items():
        for reduction in ("sum", "mean"):
            zeros, blank = (_with_first_row(subject, reduction, case, value) for value in (0.0, math.nan))
            if not all(torch.equal(one, other) for one, other in zip(zeros, blank, strict=True)):
                return AuditFinding(
                    "", False, f"reduction={reduction!r} depends on what a row holds that has {what}"
                )
    return AuditFinding("", True, f"rows with {' or '.join(cases)} may hold NaN")


def _with_first_row(subject: Subject, reduction: str, case: Problem, value: float) -> tuple[Tensor, Tensor]:
    """Return the loss and the predictions' gradient where the first row holds ``value``."""
    prediction = case.prediction.index_fill(0, _FIRST, value).requires_grad_()
    loss = subject.value(reduction, case.with_prediction(prediction))
    return loss.detach(), torch.autograd.grad(loss, prediction, materialize_grads=True)[0]


def _extreme(subject: Subject) -> AuditFinding:
    problem = subject.problem()
    signs = torch.sign(problem.prediction)
    for scale in (0.0, 1e4, -1e4):
        prediction = (scale * signs).float().requires_grad_()
        value = subject.value("sum", problem.with_prediction(prediction))
        (gradient,) = torch.autograd.grad(value, prediction, materialize_grads=True)
        for what, tensor in (("loss", value), ("gradient", gradient)):
            if not tensor.isfinite().all():
                return AuditFinding("", False, f"the {what} is not finite where predictions are {scale:+g}")
    return AuditFinding("", True, "finite in float32 at 0 and at ±1e4")


def _low_precision(subject: Subject) -> AuditFinding:
    """Judge by what rounding the true losses to the dtype costs, of the same rounded predictions."""
    worst = 0.0
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        problem = subject.problem()
        rounded = problem.prediction.to(dtype)
        true = subject.value("none", problem.with_prediction(rounded.double()))
        actual = subject.value("none", problem.with_prediction(rounded)).double()
        scale = true.abs().max().clamp(min=1.0)
        worst = max(worst, float((actual - true).abs().max() / scale) / torch.finfo(dtype).eps)
    return judged(worst, 64.0, "error in units of the dtype's rounding")


_CHECKS: tuple[tuple[Callable[[Subject], AuditFinding], str], ...] = (
    (_finite_differences, "gradient equals finite differences in float64"),
    (_every_reduction, "a random upstream gradient, for every reduction"),
    (_unequal_split, "unequal parts of a batch add up to the whole"),
    (_ignored, "ignored targets count for nothing"),
    (_blank, "what counts for nothing may hold NaN"),
    (_extreme, "extreme predictions stay finite"),
    (_low_precision, "low precision is as good as rounding allows"),
)
