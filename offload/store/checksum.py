"""Checksums of pieces: XXH3 with 64 bits, block by block, so that the parts of a piece can be hashed apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from xxhash import xxh3_64_digest, xxh3_64_hexdigest

from .layout import STRIPE_NBYTES

BLOCK_NBYTES = STRIPE_NBYTES


def block_digests(view: memoryview) -> bytes:
    """The 8-byte digests of consecutive blocks of 1 MiB (the last may be shorter), concatenated."""
    if len(view) <= BLOCK_NBYTES:
        return xxh3_64_digest(view)
    return b"".join(xxh3_64_digest(view[start : start + BLOCK_NBYTES]) for start in range(0, len(view), BLOCK_NBYTES))


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
