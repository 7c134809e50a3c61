"""Logits of a linear head that are computed when somebody reads them, and never otherwise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lossworks.adapters.torch_private import of_shape_alone, past_torch_function, tree_map_only, version_of
from lossworks.head import Gathered, LogSumExp, LowRankClassifier, Mean, linear_row_statistics
from lossworks.patching.linear_heads import HeadClassifier


@dataclass(frozen=True)
class Form:
    """What of the logits z = s·tanh((E·Cᵀ + b)/s) a deferred tensor stands for.

    Attributes:
        softcap: Cap s of the logits' magnitude, or None.
        normalised: Whether it is log p = z − lse, and not z.
        sign: 1, or −1 for the negative.
        dtype: In which E·Cᵀ is computed, as autocast has it where it is on.
    """

    softcap: float | None
    normalised: bool = False
    sign: int = 1
    dtype: torch.dtype | None = None


class DeferredLogits(Tensor):
    """A tensor (..., V) that has the shape of the logits and holds the features (..., D).

    Every operation of torch forms the logits first and is right, gradients included. What a loss over labels
    does is recognised and goes without them: positions are cut off, log-probabilities are taken, negated, and
    gathered or summed over the classes, as ``transformers.Trainer`` smooths labels.
    """

    features: Tensor
    weight: Tensor
    bias: Tensor | None
    low: Tensor | None
    form: Form
    versions: tuple[int, ...]
    formed: Tensor | None
    total: Tensor | None

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Answer what needs no logits; leave the rest to autograd, which asks for the values."""
        kwargs = kwargs or {}
        recognised = _WITHOUT_LOGITS.get(func)
        if recognised is not None and args and isinstance(args[0], DeferredLogits):
            found = recognised(*args, **kwargs)
            if found is not None:
                return found
        with past_torch_function():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation on the values."""
        del types
        args, kwargs = tree_map_only(cls, _values, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Return what it is, without forming it."""
        return f"DeferredLogits(shape={tuple(self.shape)}, dtype={self.dtype})"


def deferred_logits(
    features: Tensor, classifier: HeadClassifier, bias: Tensor | None, softcap: float | None
) -> Tensor:
    """Return the logits of features (..., D), shape (..., V), formed only when they are read.

    Under autocast they are said to be float32, so that what casts all of a model's outputs to it doesn't form
    them.
    """
    kind = features.device.type
    within = torch.is_autocast_enabled(kind)
    form = Form(softcap, dtype=torch.get_autocast_dtype(kind) if within else None)
    weight, low = (
        (classifier.weight, classifier.b) if isinstance(classifier, LowRankClassifier) else (classifier, None)
    )
    dtype = torch.float32 if within else features.dtype
    found: Tensor = _Defer.apply(features, weight, bias, low, form, dtype)
    return found


class _Defer(torch.autograd.Function):
    """Gives the deferred tensor its place in the graph, so that what is computed of it has its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        low: Tensor | None,
        form: Form,
        dtype: torch.dtype,
    ) -> Tensor:
        """Return the tensor of ``features`` (..., D), ``weight`` (V, D) and ``bias`` (V,) or None.

        With ``low`` (V, r) the features are (..., D + r), of which the last r meet it.
        """
        ctx.save_for_backward(features, weight, bias, low)
        ctx.form = form
        shape = (*features.shape[:-1], len(weight))
        versions = _versions(features, weight, low)
        found = of_shape_alone(DeferredLogits, shape, dtype=dtype, device=features.device)
        found.features, found.weight, found.bias, found.low, found.form = features, weight, bias, low, form
        found.versions = versions
        found.formed = found.total = None
        return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Return the gradients of features, weight, bias and low for that of the values, (..., V)."""
        given = ctx.saved_tensors
        wanted = [x is not None and ctx.needs_input_grad[place] for place, x in enumerate(given)]
        copies: list[Any] = [
            None if x is None else x.detach().requires_grad_(needed)
            for x, needed in zip(given, wanted, strict=True)
        ]
        with torch.enable_grad():
            values = _formed(copies[0], copies[1], copies[2], copies[3], ctx.form)
        leaves = [copy for copy, needed in zip(copies, wanted, strict=True) if needed]
        found = iter(torch.autograd.grad(values, leaves, gradient.to(values.dtype)))
        return (*(next(found) if needed else None for needed in wanted), None, None)


def _formed(features: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor | None, form: Form) -> Tensor:
    """Return what the form says, shape (..., V); log-probabilities in float32 at least."""
    dtype = features.dtype if form.dtype is None else form.dtype
    features, weight = features.to(dtype), weight.to(dtype)
    with torch.autocast(features.device.type, enabled=False):
        z = F.linear(features[..., : weight.shape[1]], weight, None if bias is None else bias.to(dtype))
        if low is not None:
            z = z + F.linear(features[..., weight.shape[1] :], low.to(dtype))
        if form.softcap is not None:
            z = form.softcap * torch.tanh(z / form.softcap)
        if form.normalised:
            z = F.log_softmax(z, dim=-1, dtype=torch.promote_types(z.dtype, torch.float32))
        return z * form.sign if form.sign != 1 else z


def _cast(
    features: Tensor, weight: Tensor, bias: Tensor | None, form: Form
) -> tuple[Tensor, Tensor, Tensor | None]:
    if form.dtype is None:
        return features, weight, bias
    return features.to(form.dtype), weight.to(form.dtype), None if bias is None else bias.to(form.dtype)


def _versions(*tensors: Tensor | None) -> tuple[int, ...]:
    """Return how often tensors were changed in place; 0 for None."""
    return tuple(0 if x is None else version_of(x) for x in tensors)


def _values(logits: DeferredLogits) -> Tensor:
    if logits.formed is None:
        if _versions(logits.features, logits.weight, logits.low) != logits.versions:
            raise RuntimeError(
                "these logits are computed when they are read, and the model's weights have changed since: "
                "read outputs.logits before, for instance as outputs.logits.clone()"
            )
        with torch.no_grad():
            parts = (logits.features, logits.weight, logits.bias, logits.low)
            logits.formed = _formed(*parts, logits.form).to(logits.dtype)
    return logits.formed


def _derived(logits: DeferredLogits, features: Tensor, **changed: Any) -> Tensor:
    form = replace(logits.form, **changed)
    dtype = torch.promote_types(logits.dtype, torch.float32) if form.normalised else logits.dtype
    found: Tensor = _Defer.apply(features, logits.weight, logits.bias, logits.low, form, dtype)
    return found


def _cut(logits: DeferredLogits, index: Any) -> Tensor | None:
    """Return ``logits[index]``, if the index leaves the last axis whole."""
    whole = isinstance(index, tuple) and index[-1] == slice(None)
    reaches = whole and (any(part is Ellipsis for part in index) or len(index) == logits.dim())
    plain = reaches and all(part is Ellipsis or isinstance(part, slice) for part in index)
    return _derived(logits, logits.features[index]) if plain else None


def _same(logits: DeferredLogits) -> Tensor:
    return logits


def _log_softmax(
    logits: DeferredLogits, dim: int | None = None, _stacklevel: int = 3, dtype: torch.dtype | None = None
) -> Tensor | None:
    if dim not in (-1, logits.dim() - 1) or logits.form.normalised or logits.form.sign != 1:
        return None
    return _derived(logits, logits.features, normalised=True) if dtype in (None, torch.float32) else None


def _negative(logits: DeferredLogits) -> Tensor:
    return _derived(logits, logits.features, sign=-logits.form.sign)


def _gather(logits: DeferredLogits, dim: int, index: Tensor, **_: Any) -> Tensor | None:
    """Return the log-probabilities of classes (..., K), and keep their sum, which the pass gives, too."""
    if not logits.form.normalised or dim not in (-1, logits.dim() - 1):
        return None
    if index.shape[:-1] != logits.shape[:-1]:
        return None
    picked, logits.total = _statistics(logits, index)
    return picked


def _sum(
    logits: DeferredLogits, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor | None:
    if not logits.form.normalised or dim not in (-1, logits.dim() - 1, (-1,), [-1]):
        return None
    if logits.total is None:
        nothing = torch.zeros(*logits.shape[:-1], 1, dtype=torch.int64, device=logits.features.device)
        logits.total = _statistics(logits, nothing)[1]
    total = logits.total if dtype is None else logits.total.to(dtype)
    return total[..., None] if keepdim else total


def _statistics(logits: DeferredLogits, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of ``index`` (..., K), and their sum over all classes (...), signed."""
    features, weight, bias = _cast(logits.features, logits.weight, logits.bias, logits.form)
    low = logits.low
    classifier = weight if low is None else LowRankClassifier(weight.detach(), None, low.to(features.dtype))
    nowhere = torch.zeros(features.shape[:-1], dtype=torch.int64, device=features.device)
    picked, mean, lse = linear_row_statistics(
        *(features, classifier, nowhere, bias),
        statistics=[Gathered(index), Mean(), LogSumExp()],
        softcap=logits.form.softcap,
    )
    sign = logits.form.sign
    return sign * (picked - lse[..., None]), sign * len(weight) * (mean - lse)


_WITHOUT_LOGITS: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.tolist: lambda logits: _values(logits).tolist(),
    Tensor.__getitem__: _cut,
    Tensor.contiguous: _same,
    F.log_softmax: _log_softmax,
    torch.log_softmax: _log_softmax,
    Tensor.log_softmax: _log_softmax,
    Tensor.neg: _negative,
    Tensor.__neg__: _negative,
    torch.neg: _negative,
    Tensor.gather: _gather,
    torch.gather: _gather,
    Tensor.sum: _sum,
    torch.sum: _sum,
}
