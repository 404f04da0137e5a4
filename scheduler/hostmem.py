"""Page-aligned host memory outside of malloc: given back to the system as soon as the last reference goes."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

_HUGE_NBYTES = 2 << 20


def allocate_pages(nbytes: int) -> Tensor:
    """A zeroed uint8 [nbytes] buffer that starts on a page, fit for direct I/O.

    An own anonymous mapping, because malloc keeps freed memory and promises 16 bytes of alignment only.
    """
    if nbytes == 0:
        return torch.empty(0, dtype=torch.uint8)
    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= _HUGE_NBYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            mapping.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # huge pages are a speed-up that a kernel may refuse; the memory is the same
    return torch.frombuffer(mapping, dtype=torch.uint8)
