"""The order of samples: permutations, steps and shares as pure functions."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dabnn.data.order import batches, epoch_order, permutation, random_keys, sample_seed, share, steps
from dabnn.errors import InvalidInputError

SIZES = [5, 1, 7, 4, 8]


def test_the_order_is_the_published_one() -> None:
    assert random_keys(2, 1, 0, 3).tolist() == [17025235807263525261, 3061664903555754633]
    assert epoch_order(1, 0, SIZES, 25).tolist() == [
        17,
        0,
        14,
        2,
        19,
        22,
        16,
        12,
        13,
        6,
        11,
        3,
        24,
        1,
        21,
        9,
        5,
        23,
        7,
        20,
        8,
        4,
        18,
        10,
        15,
    ]
    assert sample_seed(1, 2, 3) == 6520558355739401531


@settings(deadline=None, max_examples=100)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=12),
    window=st.integers(1, 300),
    seed=st.integers(-(2**63), 2**64),
    epoch=st.integers(0, 1000),
)
def test_an_epoch_visits_every_sample_once(sizes: list[int], window: int, seed: int, epoch: int) -> None:
    order = epoch_order(seed, epoch, sizes, window)
    assert sorted(order.tolist()) == list(range(sum(sizes)))


def test_the_order_changes_with_seed_and_epoch_and_with_nothing_else() -> None:
    orders = [tuple(epoch_order(seed, epoch, SIZES, 25).tolist()) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == 16
    assert orders[0] == tuple(epoch_order(0, 0, SIZES, 25).tolist())


def test_a_window_mixes_only_neighbouring_shards() -> None:
    sizes, window = [10] * 20, 25
    shard_of = epoch_order(3, 0, sizes, window) // 10
    seen = [set(shard_of[start : start + window].tolist()) for start in range(0, 200, window)]
    assert all(len(shards) <= 4 for shards in seen)
    assert shard_of.tolist() != sorted(shard_of.tolist())
    assert len(set(shard_of[:25].tolist())) > 1


def test_a_window_of_one_keeps_each_shard_in_its_own_order() -> None:
    order = epoch_order(5, 0, [4, 4, 4], 1).reshape(3, 4)
    assert (np.diff(order, axis=1) == 1).all()
    assert order[:, 0].tolist() != [0, 4, 8] or epoch_order(5, 1, [4, 4, 4], 1).reshape(3, 4)[:, 0].tolist() != [
        0,
        4,
        8,
    ]


def test_a_full_shuffle_is_uniform_over_positions() -> None:
    firsts = np.bincount([permutation(6, seed)[0] for seed in range(3000)], minlength=6)
    # Six standard deviations of a binomial count.
    assert abs(firsts - 500).max() < 6 * (3000 / 6 * 5 / 6) ** 0.5


def test_keep_puts_the_remainder_into_a_smaller_step() -> None:
    assert [len(step) for step in steps(22, 8, 2)] == [8, 8, 6]


def test_keep_merges_a_remainder_that_leaves_a_worker_with_one_sample() -> None:
    assert [len(step) for step in steps(19, 8, 2)] == [8, 11]
    assert [len(step) for step in steps(20, 8, 2)] == [8, 8, 4]
    assert [len(step) for step in steps(17, 8, 1)] == [8, 9]
    assert [len(step) for step in steps(18, 8, 1)] == [8, 8, 2]


def test_drop_leaves_the_remainder_out() -> None:
    assert [len(step) for step in steps(22, 8, 2, "drop")] == [8, 8]


def test_a_split_smaller_than_a_batch_is_one_step() -> None:
    assert steps(5, 64, 2) == [range(5)]


@settings(deadline=None, max_examples=200)
@given(num_samples=st.integers(6, 300), per_worker=st.integers(1, 20), world_size=st.integers(1, 3))
def test_ranks_share_every_step_without_gap_or_overlap(num_samples: int, per_worker: int, world_size: int) -> None:
    cut = steps(num_samples, per_worker * world_size, world_size)
    assert list(chain(*cut)) == list(range(num_samples))
    for step in cut:
        shares = [share(step, rank, world_size) for rank in range(world_size)]
        assert list(chain(*shares)) == list(step)
        lengths = [len(block) for block in shares]
        assert max(lengths) - min(lengths) <= 1
        assert min(lengths) >= min(2, per_worker)


def test_one_two_and_three_workers_have_the_same_steps() -> None:
    # 100 = 8 * 12 + 4: the remainder is too small for 3 workers, so the plan, not the world, must decide.
    planned = steps(100, 12, 3)
    for world_size in (1, 2, 3):
        seen = [list(chain(*(share(step, rank, world_size) for rank in range(world_size)))) for step in planned]
        assert seen == [list(step) for step in planned]


def test_a_batch_size_that_the_workers_do_not_divide_is_refused() -> None:
    with pytest.raises(
        InvalidInputError, match=r"^data\.batch_size: 10 is not a positive multiple of 4 workers.*use 8"
    ):
        steps(100, 10, 4)


def test_drop_without_a_full_step_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"^data\.batch_size: 64 .* at most 20"):
        steps(21, 64, 4, "drop")


def test_fewer_than_two_samples_a_worker_are_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"^cluster\.num_workers: 4 workers for 7 samples"):
        steps(7, 64, 4)


def test_an_unknown_remainder_names_the_nearest() -> None:
    with pytest.raises(InvalidInputError, match=r"^data\.remainder: 'kep' is not known\. Did you mean 'keep'"):
        steps(10, 2, 1, "kep")


def test_batches_cover_a_block() -> None:
    assert batches(range(3, 10), 3) == [range(3, 6), range(6, 9), range(9, 10)]
    assert batches(range(0), 3) == []
