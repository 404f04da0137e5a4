"""Random bits that belong to an element and a step, not to a call: a counter-based generator.

The bits of element `i` at one step are mix(mix(low32(i) ^ key0) ^ high32(i) ^ key1), where `mix` is a 32-bit integer
hash (xor-shifts and odd multipliers; C. Wellons, "hash prospector", lowbias32) and the two keys come from the seed and
the step. So the result of stochastic rounding is the same for every placement, order and cut of the work.
"""

from __future__ import annotations

from dataclasses import dataclass

_MASK64 = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """Where a range takes its random bits from.

    Raises: ValueError, when made, for a negative index.
    """

    seed: int
    step: int
    first_index: int  # index of the range's first element in the whole that the seed stands for, in elements

    def __post_init__(self) -> None:
        if not 0 <= self.first_index < 1 << 62:
            raise ValueError(f"Rounding.first_index is {self.first_index}; expected an element index, 0 or more.")

    def key_pair(self) -> tuple[int, int]:
        """Two 32-bit keys: the halves of a 64-bit hash of seed and step."""
        key = _mix64(_mix64(self.seed & _MASK64) ^ (self.step & _MASK64))
        return key & 0xFFFFFFFF, key >> 32


def _mix64(value: int) -> int:
    """One output of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) from the state `value`."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)
