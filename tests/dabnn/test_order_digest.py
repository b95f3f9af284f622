"""The digest of the sample order: a sum over (epoch, step, sample) that depends on nothing else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dabnn.data.order_digest import add_digests, from_halves, halves, step_digest

Steps = list[list[int]]


def digest(steps: Steps, epoch: int = 0) -> int:
    return add_digests(step_digest(epoch, step, np.array(indices)) for step, indices in enumerate(steps))


def test_it_is_the_published_formula() -> None:
    mask = 2**64 - 1

    def mix(word: int) -> int:
        word = (word + 0x9E3779B97F4A7C15) & mask
        word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & mask
        word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & mask
        return word ^ (word >> 31)

    expected = sum(mix((mix((mix(2) + 5) & mask) + index) & mask) >> 16 for index in (7, 9)) % 2**48
    assert step_digest(2, 5, np.array([9, 7])) == expected


@given(st.lists(st.integers(0, 10**9), min_size=2, max_size=40), st.integers(0, 40))
def test_the_shares_of_the_workers_add_up_to_the_step(indices: list[int], cut: int) -> None:
    parts = [step_digest(3, 11, np.array(part, dtype=np.int64)) for part in (indices[:cut], indices[cut:])]
    assert add_digests(parts) == step_digest(3, 11, np.array(indices))


@pytest.mark.parametrize(
    "other",
    [
        [[0, 1, 2], [3, 4]],
        [[0, 1, 2], [3, 4, 4]],
        [[0, 1, 2], [3, 4, 5, 5]],
        [[0, 1, 3], [2, 4, 5]],
        [[3, 4, 5], [0, 1, 2]],
        [[0, 1, 2, 3], [4, 5]],
    ],
    ids=["lost", "one for another", "repeated", "exchanged", "steps exchanged", "other steps"],
)
def test_it_tells_other_samples_and_other_steps_apart(other: Steps) -> None:
    assert digest([[0, 1, 2], [3, 4, 5]]) != digest(other)
    assert digest([[0, 1, 2], [3, 4, 5]]) != digest([[0, 1, 2], [3, 4, 5]], epoch=1)


@given(st.lists(st.integers(0, 2**48 - 1), min_size=1, max_size=50))
def test_sums_of_halves_are_exact_in_floats(digests: list[int]) -> None:
    high, low = (sum(part) for part in zip(*map(halves, digests), strict=True))
    assert from_halves(high, low) == add_digests(digests)
    assert int(float(add_digests(digests))) == add_digests(digests)
