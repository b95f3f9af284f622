"""Packed convolutions by several of torch's threads at once."""

from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np
import pytest
import torch
from numba import types

from kernels import pack_signs, packed_conv2d, packed_conv2d_signs
from kernels.conv import packed_conv2d_reference
from kernels.team import next_task, runtime_address, team_of, team_size


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def case(batch, channels=96, filters=160, size=19):
    generator = torch.Generator().manual_seed(batch)
    bits = pack_signs(torch.randn(batch, channels, size, size, generator=generator))
    weight_bits = pack_signs(torch.randn(filters, channels, 3, 3, generator=generator))
    return bits, weight_bits, *torch.randn(3, filters, generator=generator)


def expected(bits, weight_bits, alpha, beta, bias, channels=96):
    return packed_conv2d_reference(bits, weight_bits, alpha, beta, bias, channels, (1, 1), (1, 1))


@pytest.mark.usefixtures("three_threads")
@pytest.mark.parametrize("batch", [1, 5])
def test_threads_of_torch_compute_what_one_does(batch):
    given = case(batch)
    wanted = expected(*given)
    assert torch.equal(packed_conv2d(*given, in_channels=96), wanted)
    threshold, falls = given[3], torch.arange(160) % 3 == 0
    bits = packed_conv2d_signs(*given, threshold, falls, in_channels=96)
    reached = (wanted >= threshold.view(-1, 1, 1)) ^ falls.view(-1, 1, 1)
    assert torch.equal(bits, pack_signs(torch.where(reached, 1.0, -1.0)))


@pytest.mark.usefixtures("three_threads")
def test_several_python_threads_may_convolve_at_once():
    cases = [case(batch) for batch in (1, 2, 3, 4)]
    wanted = [expected(*given) for given in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            results = list(pool.map(lambda given: packed_conv2d(*given, in_channels=96), cases))
            assert all(map(torch.equal, results, wanted))


@pytest.mark.usefixtures("three_threads")
def test_the_runtime_of_torch_is_found_where_torch_uses_openmp():
    has_openmp = "OpenMP" in torch.__config__.parallel_info().split("ATen parallel backend:")[-1]
    assert bool(runtime_address()) == has_openmp
    assert team_size() == (3 if has_openmp else 1)


def test_tasks_are_numbered_one_by_one():
    @numba.njit
    def take(counter):
        return next_task(np.int64(counter.ctypes.data)), next_task(np.int64(counter.ctypes.data))

    counter = np.zeros(1, np.int64)
    assert (take(counter), counter[0]) == ((0, 1), 2)


def test_a_team_refuses_arguments_that_its_worker_does_not_expect():
    run, _ = team_of([types.float32])

    @numba.njit
    def call(value):
        run(0, 0, 1, (value,))

    with pytest.raises(TypeError, match="workers expect"):
        call(1)
