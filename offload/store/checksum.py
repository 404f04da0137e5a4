"""Checksums of pieces: XXH3 with 64 bits, block by block, so that the parts of a piece can be hashed apart."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
from xxhash import xxh3_64_digest, xxh3_64_hexdigest

from .layout import STRIPE_NBYTES

BLOCK_NBYTES = STRIPE_NBYTES

_spent_s = 0.0
_spent_lock = threading.Lock()


def spent_s() -> float:
    """CPU seconds that this process has spent in `block_digests` so far, over all threads."""
    return _spent_s


def block_digests(view: memoryview) -> bytes:
    """The 8-byte digests of consecutive blocks of 1 MiB (the last may be shorter), concatenated."""
    global _spent_s
    start_s = time.thread_time()
    digests = b"".join(
        xxh3_64_digest(view[start : start + BLOCK_NBYTES]) for start in range(0, len(view), BLOCK_NBYTES)
    )
    with _spent_lock:
        _spent_s += time.thread_time() - start_s
    return digests


def small_checksum(piece: np.ndarray) -> str:
    """Checksum of a whole piece of at most one block, uint8 [nbytes]; the same as `piece_checksum` gives."""
    return xxh3_64_hexdigest(piece.data)


def piece_checksum(digests: Sequence[bytes]) -> str:
    """Checksum of a piece in hexadecimal from the block digests of its consecutive parts.

    A piece of one block has that block's digest; a longer one the digest of its digests. XXH3 finds accidents (torn
    writes, flipped bits; 1 in 2**64 missed), it is no protection against an adversary.
    """
    joined = b"".join(digests)
    return (joined if len(joined) == 8 else xxh3_64_digest(joined)).hex()
