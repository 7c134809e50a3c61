"""Triton besides its documented interface: what a launch would compile, without launching."""

from typing import Any

from triton.compiler import ASTSource
from triton.runtime.jit import create_function_from_signature


def source_of_launch(
    kernel: Any, backend: Any, arguments: dict[str, Any]
) -> tuple[ASTSource, dict[str, Any]]:
    """Return the source, specialised as a launch would specialise it, and the options of its compilation.

    Args:
        kernel: A function under ``triton.jit``.
        backend: Of ``triton.compiler.make_backend``.
        arguments: The kernel's, by name; tensors may be on the device ``meta``.
    """
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**arguments)
    packed, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, specialization, options
    )
    return ASTSource(kernel, signature, constants, attributes), vars(packed)
