"""The kernels of `native` for machines without a C compiler: compiled by numba, called through the same door."""
