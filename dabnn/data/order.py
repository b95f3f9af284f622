"""Which sample comes when: pure functions of integers, so that a resumed or resized run sees the same steps.

An epoch is one order of all samples (`epoch_order`), cut into steps (`steps`), of which each rank takes a contiguous
block (`share`). Nothing here knows how many loader processes there are, and only `share` knows the rank:

    order:     s0 s1 s2 s3 | s4 s5 s6 s7 | s8 s9      batch_size 4, 2 workers
    rank 0:    s0 s1       | s4 s5       | s8
    rank 1:          s2 s3 |       s6 s7 |    s9
"""

import hashlib
import struct
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from dabnn.choices import unknown_choice
from dabnn.errors import InvalidInputError

REMAINDERS = ("keep", "drop")
# BatchNorm cannot train on one value a channel, so a worker needs two samples.
_MIN_SAMPLES_PER_WORKER = 2
_SHARD_LEVEL, _SAMPLE_LEVEL = 0, 1


def random_keys(num: int, seed: int, *purpose: int) -> NDArray[np.uint64]:
    """Returns `num` random 64-bit words that depend on nothing but the arguments.

    They come straight from the PCG64 bit generator, whose stream NumPy keeps the same over versions (NEP 19), unlike
    that of `Generator.permutation`.
    """
    entropy = np.random.SeedSequence(seed % 2**64, spawn_key=purpose)
    return np.random.PCG64(entropy).random_raw(num)


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """Returns the 63-bit seed of a sample's augmentation, which depends on nothing but the arguments.

    A hash: a `SeedSequence` for each sample would take a tenth of the time of decoding and augmenting it.
    """
    digest = hashlib.blake2b(struct.pack("<QQQ", seed % 2**64, epoch, index), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def permutation(num: int, seed: int, *purpose: int) -> NDArray[np.int64]:
    """Returns a random permutation of `0 .. num - 1` that depends on nothing but the arguments."""
    return np.argsort(random_keys(num, seed, *purpose), kind="stable")


def epoch_order(seed: int, epoch: int, shard_sizes: Sequence[int], window: int) -> NDArray[np.int64]:
    """Returns the order in which an epoch visits the samples.

    The shards are permuted over the whole dataset and laid end to end; the result is cut into windows of equal size,
    at most `window` samples, and permuted within each. A reader therefore touches the shards of one window at a time.

    Args:
        seed: The run's seed.
        epoch: The epoch, from 0.
        shard_sizes: Samples of each shard.
        window: Most samples that are mixed with each other; a window of all samples is a full shuffle.

    Returns:
        int64 (num_samples,): each sample's index once.
    """
    sizes = np.asarray(shard_sizes, dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    shards = permutation(len(sizes), seed, epoch, _SHARD_LEVEL)
    sequence = np.concatenate([np.arange(starts[shard], starts[shard] + sizes[shard]) for shard in shards])
    num_samples = len(sequence)
    num_windows = -(-num_samples // window)
    windows = np.arange(num_samples) * num_windows // num_samples
    return sequence[np.lexsort((random_keys(num_samples, seed, epoch, _SAMPLE_LEVEL), windows))]


def steps(num_samples: int, batch_size: int, num_workers: int, remainder: str = "keep") -> list[range]:
    """Cuts an epoch of samples into optimizer steps.

    Args:
        num_samples: Samples in the epoch.
        batch_size: Samples a step over all workers.
        num_workers: Workers that the run was planned for.
        remainder: What becomes of the samples after the last full step. `keep`: a smaller step of their own, or part
            of the step before where a worker would get fewer than 2 of them. `drop`: left out.

    Returns:
        The positions in the epoch's order that each step trains on, in order.

    Raises:
        InvalidInputError: The batch size is not a positive multiple of the workers, or the samples do not make a step.
    """
    if remainder not in REMAINDERS:
        raise unknown_choice("data.remainder", remainder, REMAINDERS)
    if batch_size < 1 or batch_size % num_workers:
        raise InvalidInputError(
            f"data.batch_size: {batch_size} is not a positive multiple of {num_workers} workers, so a step could not "
            f"be the same on any number of them; use {max(1, round(batch_size / num_workers)) * num_workers}"
        )
    full, left = divmod(num_samples, batch_size)
    boundaries = [step * batch_size for step in range(full + 1)]
    if remainder == "keep" and left:
        if full and left // num_workers < _MIN_SAMPLES_PER_WORKER:
            boundaries.pop()
        boundaries.append(num_samples)
    _require_a_step(num_samples, batch_size, num_workers, has_steps=len(boundaries) > 1)
    return [range(start, stop) for start, stop in pairwise(boundaries)]


def _require_a_step(num_samples: int, batch_size: int, num_workers: int, *, has_steps: bool) -> None:
    if num_samples < _MIN_SAMPLES_PER_WORKER * num_workers:
        raise InvalidInputError(
            f"cluster.num_workers: {num_workers} workers for {num_samples} samples; each needs at least "
            f"{_MIN_SAMPLES_PER_WORKER} a step, since batch normalization cannot train on one. Use fewer workers"
        )
    if not has_steps:
        raise InvalidInputError(
            f"data.batch_size: {batch_size} is more than the {num_samples} samples, so data.remainder=drop leaves no "
            f"step; use a batch size of at most {num_samples // num_workers * num_workers} or data.remainder=keep"
        )


def share(step: range, rank: int, world_size: int) -> range:
    """Returns a rank's contiguous block of a step (or of a whole split); blocks differ by at most one sample."""
    size = len(step)
    return step[size * rank // world_size : size * (rank + 1) // world_size]


def partners(step: range, block: range) -> NDArray[np.int64]:
    """Returns the positions of the samples that those of a block are mixed with.

    The samples of a step are mixed in pairs: the one at place p of the step with that at p ^ 1, the last of an odd step
    with itself. So a sample's partner does not depend on the number of workers.

    Args:
        step: Positions of a step in the epoch's order.
        block: Part of them.

    Returns:
        int64 (len(block),): positions within `step`.
    """
    places = (np.arange(block.start, block.stop) - step.start) ^ 1
    return np.where(places < len(step), places, places ^ 1) + step.start


def batches(block: range, batch_size: int) -> list[range]:
    """Cuts a block into batches of `batch_size`, the last one smaller where it does not divide."""
    return [block[start : start + batch_size] for start in range(0, len(block), batch_size)]
