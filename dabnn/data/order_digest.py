"""A number that tells whether two runs trained on the same samples in the same steps.

Each sample that a step took is hashed together with the epoch and the step; the hashes are added modulo 2^48:

    digest = sum over (epoch, step, index) of mix(mix(mix(epoch) + step) + index) >> 16   (mod 2^48)

A sum has no order, so the shares of the ranks add up to that of the step, and the part before an interruption and the
part after it to that of the epoch: the digest depends neither on the number of workers and loaders nor on where a run
was interrupted. It differs when a sample is lost, repeated, or taken in another step, except once in 2^48. 48 bits, so
that a float64 holds it exactly and any tracker can keep it as a metric. Leaves out who adds up: `dabnn.tally`.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

_BITS = 48
_MODULUS = 1 << _BITS
_HALF = 1 << 24
# The finalizer of splitmix64 (Steele et al., OOPSLA 2014), which is a permutation of the 64-bit words.
_GAMMA, _FIRST, _SECOND = (np.uint64(word) for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def step_digest(epoch: int, step: int, indices: NDArray[np.int64]) -> int:
    """Returns what the samples of a step, or of one rank's share of it, add to the digest.

    Args:
        epoch: Finished epochs before the step.
        step: Steps of the epoch before it.
        indices: The samples, in any order.

    Returns:
        A number below 2^48.
    """
    place = _mix(_mix(np.array([epoch], np.uint64)) + np.uint64(step))
    hashes = _mix(place + indices.astype(np.uint64)) >> np.uint64(64 - _BITS)
    return int(hashes.sum()) % _MODULUS  # 2^16 hashes are needed to wrap at 2^64, which 2^48 divides


def add_digests(digests: Iterable[int]) -> int:
    """Returns the digest of several disjoint parts together."""
    return sum(digests) % _MODULUS


def halves(digest: int) -> list[float]:
    """Returns a digest as two numbers whose sums over up to 2^29 ranks a float64 holds exactly."""
    return [float(digest // _HALF), float(digest % _HALF)]


def from_halves(high: float, low: float) -> int:
    """Returns the digest whose `halves`, or sums of them, these are."""
    return (int(high) * _HALF + int(low)) % _MODULUS


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = words + _GAMMA
    words = (words ^ (words >> np.uint64(30))) * _FIRST
    words = (words ^ (words >> np.uint64(27))) * _SECOND
    return words ^ (words >> np.uint64(31))
