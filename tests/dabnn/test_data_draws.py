"""Random numbers of augmentation: uniform, independent, and of nothing but seed, epoch, sample and purpose."""

import numpy as np
import pytest

from dabnn.data.draws import Draws, Purpose


def numbers(seed: int = 1, epoch: int = 2, purpose: Purpose = Purpose.SHIFT, num: int = 3) -> np.ndarray:
    return Draws(seed, epoch, np.arange(20_000)).uniform(purpose, num)


def test_the_numbers_are_those_of_splitmix64() -> None:
    word = 2**64 - 1

    def mix(state: int) -> int:
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & word
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & word
        return state ^ (state >> 31)

    def child(state: int, number: int) -> int:
        return mix(state + 0x9E3779B97F4A7C15 * (number + 1) & word)

    stream = child(child(child(child(0, 5), 3), Purpose.ROTATION), 12345)
    expected = [(child(stream, number) >> 11) / 2**53 for number in range(4)]
    found = Draws(5, 3, np.array([7, 12345])).uniform(Purpose.ROTATION, 4)[1]
    assert found.tolist() == expected


def test_the_numbers_of_this_version_are_those_of_the_next() -> None:
    found = Draws(1, 2, np.array([3, 2**40])).uniform(Purpose.PART, 2)
    assert found.tolist() == [[0.22137264995725925, 0.85154066342976], [0.5775314946835136, 0.30461843743190786]]


def test_a_number_depends_on_its_own_sample_alone() -> None:
    together = numbers()
    chosen = np.array([19_999, 5, 77])
    assert np.array_equal(Draws(1, 2, chosen).uniform(Purpose.SHIFT, 3), together[chosen])
    assert np.array_equal(Draws(1, 2, np.arange(20_000)).only(chosen).uniform(Purpose.SHIFT, 3), together[chosen])
    assert np.array_equal(numbers(num=2), together[:, :2])


@pytest.mark.parametrize("purpose", list(Purpose))
def test_the_numbers_are_uniform(purpose: Purpose) -> None:
    for found in numbers(purpose=purpose).T:
        counts = np.histogram(found, bins=100, range=(0, 1))[0]
        # Chi square of 99 degrees of freedom: its mean is 99 and its deviation 14.
        assert abs(((counts - 200) ** 2 / 200).sum() - 99) < 5 * 14
        assert 0 <= found.min() < found.max() < 1


@pytest.mark.parametrize(
    "other",
    [
        numbers(seed=2),
        numbers(epoch=3),
        numbers(purpose=Purpose.MIRROR),
        np.roll(numbers(), 1, axis=0),
        np.roll(numbers(), 1, axis=1),
        numbers(seed=2, epoch=1),
    ],
    ids=["seed", "epoch", "purpose", "sample", "number", "seed and epoch"],
)
def test_the_numbers_of_two_streams_do_not_depend_on_each_other(other: np.ndarray) -> None:
    first = numbers()
    for mine, its in zip(first.T, other.T, strict=True):
        counts = np.histogram2d(mine, its, bins=10, range=((0, 1), (0, 1)))[0]
        assert abs(((counts - 200) ** 2 / 200).sum() - 99) < 5 * 14
        assert abs(np.corrcoef(mine, its)[0, 1]) < 5 / np.sqrt(len(mine))


def test_any_seed_is_taken() -> None:
    for seed in (0, 2**32 - 1, 2**63, 2**64 - 1):
        assert Draws(seed, 10**6, np.array([0, 2**62])).uniform(Purpose.MIXING, 1).shape == (2, 1)
