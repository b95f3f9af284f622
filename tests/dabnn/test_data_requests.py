"""What a rank reads in which order, whom a sample is mixed with, and what is fetched ahead."""

from itertools import islice

import numpy as np
import pytest
from numpy.typing import NDArray

from dabnn.data.order import batches, partners, share, steps
from dabnn.data.requests import Plan, Requests


def training_plan(rank: int = 0, world_size: int = 1, *, num: int = 21000, window: int = 5000) -> Plan:
    cut = steps(num, 300, 3)
    blocks = tuple(share(step, rank, world_size) for step in cut)
    return Plan(tuple(cut), blocks, (1000,) * (num // 1000), seed=4, shuffle=True, window=window, is_mixing=True)


class Ahead:
    """Remembers what it was told to fetch."""

    def __init__(self) -> None:
        self.told: list[NDArray[np.int64]] = []

    def prefetch(self, indices: NDArray[np.int64]) -> None:
        self.told.append(indices)


@pytest.mark.parametrize("size", [2, 7, 8])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_partners_are_the_same_on_any_number_of_workers(size: int, world_size: int) -> None:
    step = range(100, 100 + size)
    found = np.concatenate([partners(step, share(step, rank, world_size)) for rank in range(world_size)])
    expected = [100 + (place ^ 1 if place ^ 1 < size else place) for place in range(size)]
    assert found.tolist() == expected
    assert sorted(found.tolist()) == list(step)


def test_a_request_names_partners_of_its_own_step() -> None:
    whole = training_plan().request(2, 5)
    parts = [training_plan(rank, 3).request(2, 5) for rank in range(3)]
    assert whole.partners is not None
    for field in ("indices", "partners"):
        assert np.concatenate([getattr(part, field) for part in parts]).tolist() == getattr(whole, field).tolist()
    by_sample = dict(zip(whole.indices.tolist(), whole.partners.tolist(), strict=True))
    assert all(by_sample[partner] == sample for sample, partner in by_sample.items())


def test_what_is_fetched_ahead_is_what_is_read_next() -> None:
    plan, ahead = training_plan(), Ahead()
    read = [request.indices for request in islice(Requests(plan, ahead), 140)]
    assert [len(told) for told in ahead.told[:5]] == [10200, 9900, 9900, 11100, 6000]
    assert np.array_equal(np.concatenate(read)[: len(ahead.told[0])], ahead.told[0])
    beginnings = [position for position in range(70) if position * 300 // 5000 != (position - 1) * 300 // 5000]
    for told, step in zip(ahead.told, beginnings, strict=False):
        coming = np.concatenate(read[step:])
        assert np.array_equal(coming[: len(told)], told)


def test_an_evaluation_fetches_each_sample_ahead_once_and_nothing_of_the_next_epoch() -> None:
    blocks = tuple(batches(range(9000), 100))
    plan, ahead = Plan(blocks, blocks, (9000,), seed=0, shuffle=False, window=100_000), Ahead()
    list(islice(Requests(plan, ahead), len(blocks)))
    assert [told.tolist() for told in ahead.told] == [list(range(9000))]


def test_a_rank_without_samples_asks_for_nothing() -> None:
    assert not list(Requests(Plan((), (), (3,), seed=0, shuffle=False, window=10), Ahead()))


def test_the_orders_of_two_epochs_are_kept() -> None:
    plan = training_plan()
    first = plan.order(0)
    assert plan.order(0) is first
    for epoch in range(1, 5):
        plan.order(epoch)
    again = plan.order(0)
    assert again is not first
    assert np.array_equal(again, first)
