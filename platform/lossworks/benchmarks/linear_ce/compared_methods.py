"""The linear cross-entropies that ``lossworks bench linear-ce`` compares.

Each is a function of E (N, D), C (V, D) and y (N,) that returns the mean loss. Those that build the logits
take the softmax in float32, as training scripts do: torch's ``cross_entropy`` of bf16 logits would return a
loss with eight bits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

_FILTER_EPS = 2.0**-12  # the smallest gradient entry that bf16 can add to 1, as in the paper's section 4.3


@dataclass(frozen=True)
class ComparedMethod:
    """One of the compared ways.

    Attributes:
        label: What the tables call it.
        build: Returns the loss function; imports what it needs.
        copies: Buffers of N·V·4 bytes that it may hold at once, rounded up, to tell whether it will fit.
        package: A package that is not among ours and must be installed.
        device: The kind of device it is made for, or None for any.
        skips: Whether it leaves out entries of small probability, so that its time depends on the logits.
    """

    label: str
    build: "Callable[[], Loss]"
    copies: float = 0.25
    package: str | None = None
    device: str | None = None
    skips: bool = False

    def reason_against(self, device: str) -> str | None:
        """Return why it can't run on this device or installation, or None if it can."""
        if self.device not in (None, device):
            return f"needs device={self.device}"
        if self.package and find_spec(self.package) is None:
            return f"{self.label} is not installed"
        return None


def _ours(**options: object) -> "Callable[[], Loss]":
    def build() -> "Loss":
        from lossworks import linear_cross_entropy

        function: Any = linear_cross_entropy
        return lambda e, c, y: function(e, c, y, **options)

    return build


def _plain() -> "Loss":
    from torch.nn.functional import cross_entropy

    return lambda e, c, y: cross_entropy((e @ c.t()).float(), y)


def _compiled() -> "Loss":
    import torch

    return torch.compile(_plain())


def _torch(batch_chunk_size: int | None = None) -> "Callable[[], Loss]":
    def build() -> "Loss":
        from torch.nn import LinearCrossEntropyOptions
        from torch.nn.functional import linear_cross_entropy

        options = LinearCrossEntropyOptions(batch_chunk_size=batch_chunk_size)
        return lambda e, c, y: linear_cross_entropy(e, c, y, options=options)

    return build


def _cut_cross_entropy() -> "Loss":
    linear_cross_entropy = import_module("cut_cross_entropy").linear_cross_entropy
    # Its kernels are for GPUs; on others its authors offer the logits in one compiled function.
    return lambda e, c, y: linear_cross_entropy(e, c, y, impl="cce" if e.is_cuda else "torch_compile")


def _liger() -> "Loss":
    loss: Loss = import_module("liger_kernel.transformers.functional").liger_fused_linear_cross_entropy
    return loss


def _quack() -> "Loss":
    loss: Loss = import_module("quack.linear_cross_entropy").chunked_linear_cross_entropy
    return loss


COMPARED_METHODS = {
    "exact": ComparedMethod("lossworks exact", _ours(filter_eps=None)),
    "filtered": ComparedMethod("lossworks filtered", _ours(filter_eps=_FILTER_EPS), skips=True),
    "small-buffer": ComparedMethod("lossworks exact, 1% buffer", _ours(filter_eps=None, buffer_share=0.01)),
    "batch-invariant": ComparedMethod("lossworks batch-invariant", _ours(batch_invariant=True)),
    "triton": ComparedMethod("lossworks triton", _ours(filter_eps=None, impl="triton"), device="cuda"),
    "triton-filtered": ComparedMethod(
        "lossworks triton, filtered",
        _ours(filter_eps=_FILTER_EPS, impl="triton"),
        device="cuda",
        skips=True,
    ),
    "dense": ComparedMethod("torch logits + cross_entropy", _plain, 4),
    "torch-chunked": ComparedMethod("torch linear_cross_entropy", _torch()),
    "torch-chunked-256": ComparedMethod("torch linear_cross_entropy, 256 rows", _torch(256)),
    "compiled": ComparedMethod("torch.compile of the logits", _compiled, 4),
    "cut-cross-entropy": ComparedMethod(
        "cut-cross-entropy", _cut_cross_entropy, 4, package="cut_cross_entropy", skips=True
    ),
    "liger-kernel": ComparedMethod("liger-kernel", _liger, 1, package="liger_kernel", device="cuda"),
    "quack": ComparedMethod("quack", _quack, 1, package="quack", device="cuda"),
}


def methods_for(device: str) -> list[str]:
    """Return the names of all methods that are made for this kind of device."""
    return [name for name, method in COMPARED_METHODS.items() if method.device in (None, device)]
