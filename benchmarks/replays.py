"""Times calls on the GPU as replays of CUDA graphs over inputs that the L2 cache cannot hold.

A graph holds a call for each of many copies of the input, one after the other, so that neither the host nor a warm
cache takes part; its outputs stay alive, so that writes go to memory as well. Without a CUDA device the same calls run
one by one, which serves to try a benchmark out and measures nothing.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

CALLS_BEFORE_CAPTURE = 3
# Twice the L2 cache of an H200, so that what is read next has been driven out.
ROTATED_BYTES = 120 * 2**20
# Starting a graph takes microseconds: a graph holds calls enough for that not to count.
MIN_CALLS, MAX_CALLS = 40, 400


def replay_of(call: Callable[[Tensor], Any], x: Tensor, max_calls: int) -> tuple[Callable[[], Any], int]:
    """Returns what runs `call` on many copies of x in turn, recorded if there is a GPU, and how many calls that is."""
    num_copies = min(max_calls, ROTATED_BYTES // (x.numel() * x.element_size()) + 1)
    copies = [x.clone(memory_format=torch.preserve_format) for _ in range(num_copies)]
    inputs = list(
        itertools.islice(itertools.cycle(copies), max(min(MIN_CALLS, max_calls), num_copies) if x.is_cuda else 1)
    )
    kept: list[Any] = []

    def run() -> None:
        kept[:] = [call(each) for each in inputs]

    if not x.is_cuda:
        return run, len(inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what a first call makes and compiles cannot be recorded
        for _ in range(CALLS_BEFORE_CAPTURE):
            call(inputs[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay() -> list[Any]:
        graph.replay()
        return kept

    return replay, len(inputs)


def median_us(
    forms: Mapping[str, tuple[Callable[[Tensor], Any], Tensor]], turns: int, max_calls: int = MAX_CALLS
) -> dict[str, float]:
    """Returns the median time of one call of each form in microseconds over `turns` rounds; the forms take turns.

    Args:
        forms: By name, a call and its input.
        turns: How often each graph is replayed, after a first time.
        max_calls: Calls in a graph at most; few where a call alone drives its input out of the cache.
    """
    replays = {name: replay_of(*form, max_calls) for name, form in forms.items()}
    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(turns + 1):
        for name, (replay, num_calls) in replays.items():
            duration = _duration_us(replay)
            if turn > 0:
                times[name].append(duration / num_calls)
    return {name: statistics.median(values) for name, values in times.items()}


def _duration_us(run: Callable[[], Any]) -> float:
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - begin)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)
