"""What is used of Triton besides its documented interface does what it is used for, in this version."""

import pytest
import torch

triton = pytest.importorskip("triton")


@triton.jit
def add_one(into, size, block: triton.language.constexpr):
    """Add one to the first ``size`` numbers."""
    at = triton.language.arange(0, block)
    triton.language.store(into + at, triton.language.load(into + at, at < size) + 1, at < size)


def test_a_kernel_is_specialised_as_a_launch_would():
    """Constants are compiled in, a size that sixteen divides is marked so, and no GPU is there."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    from lossworks.adapters.triton_private import source_of_launch

    backend = make_backend(GPUTarget("cuda", 90, 32))
    arguments = {"into": torch.empty(64, device="meta"), "size": 64, "block": 64}
    source, options = source_of_launch(add_one, backend, arguments)

    assert source.signature == {"into": "*fp32", "size": "i32", "block": "constexpr"}
    assert source.constants == {(2,): 64}, "constants are no longer packed by their place"
    assert {(0,), (1,)} <= set(source.attrs), "divisible arguments are no longer marked"
    assert "num_warps" in options
