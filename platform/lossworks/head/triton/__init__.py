"""The head's kernels for GPUs, in Triton; :mod:`~lossworks.head.triton.launch` has the functions.

Nothing here is imported before a GPU is asked for, because importing Triton takes time and it exists on
Linux only.
"""
