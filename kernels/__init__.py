"""Arithmetic on flat buffers: fused optimizer updates, gradient passes, losses.

One signature per kernel, several implementations beside each other: `reference` (plain torch, the definition),
`native` (C, for CPU tensors), `jit` (the same, compiled by numba) and `triton` (for CUDA tensors). Callers never ask
which one runs; `dispatch` decides.
Nothing here knows a module, a file or a thread pool, and nothing here imports the packages above.
"""
