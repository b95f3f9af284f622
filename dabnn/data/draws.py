"""The random numbers of augmentation: pure functions of (seed, epoch, sample, purpose), whole batches at once.

Nothing is drawn in sequence, so neither the number of workers and loaders, nor an interruption, nor another
augmentation that is switched on changes what a sample gets. The generator is splitmix64 (Steele, Lea, Flood: Fast
splittable pseudorandom number generators, 2014; the constants are Stafford's mix 13) with one stream a sample.
"""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_GAMMA = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORD = 2**64 - 1
_TO_UNIT = 2.0**-53


class Purpose(IntEnum):
    """What a number is drawn for; the values are part of every trained figure, so they are never renumbered."""

    PART = 0
    SHIFT = 1
    MIRROR = 2
    ROTATION = 3
    RANDAUGMENT = 4
    ERASING = 5
    MIXING = 6


@dataclass(frozen=True)
class Draws:
    """The numbers of some samples in one epoch.

    Attributes:
        seed: The run's seed.
        epoch: The epoch, from 0.
        indices: int64 (n,): the samples' indices in the split.
    """

    seed: int
    epoch: int
    indices: NDArray[np.int64]

    def uniform(self, purpose: Purpose, num: int) -> NDArray[np.float64]:
        """Returns `num` numbers a sample, uniform in [0, 1) and independent of each other: (n, num), of 53 bits."""
        key = 0
        for word in (self.seed, self.epoch, purpose):
            key = _mix_word(key + _GAMMA * (word + 1) & _WORD)
        streams = _mix(np.uint64(key) + _steps(self.indices.astype(np.uint64)))
        words = _mix(streams[:, None] + _steps(np.arange(num, dtype=np.uint64)))
        return (words >> np.uint64(11)).astype(np.float64) * _TO_UNIT

    def only(self, positions: NDArray[np.int64]) -> "Draws":
        """Returns those of some of the samples, by their positions among these."""
        return Draws(self.seed, self.epoch, self.indices[positions])


def _steps(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return np.uint64(_GAMMA) * (words + np.uint64(1))


def _mix(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(_FIRST)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(_SECOND)
    return words ^ (words >> np.uint64(31))


def _mix_word(word: int) -> int:
    word = (word ^ (word >> 30)) * _FIRST & _WORD
    word = (word ^ (word >> 27)) * _SECOND & _WORD
    return word ^ (word >> 31)
