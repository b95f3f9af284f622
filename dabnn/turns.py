"""Timing of several forms of one computation in turns, so that a machine that others use slows all of them alike.

On the CPU with one thread a figure is processor time of that thread, which others do not lengthen; with more threads it
is wall time. On CUDA it is the time between two events round the replay of a CUDA graph, so that launches from Python
do not count. Left out: what is timed (`dabnn.bench`).
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Form = Callable[[], object]
"""One way to compute something; its result is dropped."""

_FEWEST, _MOST = 5, 100


@dataclass(frozen=True)
class Times:
    """How long one call of a form took.

    Attributes:
        median_s: Of the turns, seconds.
        best_s: The shortest.
    """

    median_s: float
    best_s: float


def choose_turns(round_s: float, budget_s: float) -> int:
    """Return how many rounds of `round_s` seconds fit into `budget_s`, at least 5 and at most 100."""
    return max(_FEWEST, min(_MOST, int(budget_s / round_s))) if round_s > 0 else _MOST


def in_turns(
    forms: Mapping[str, Form],
    device: torch.device,
    *,
    turns: int | None = None,
    budget_s: float = 10.0,
    repeats: int = 1,
) -> tuple[dict[str, Times], int]:
    """Time forms in rounds in which each runs once; two rounds before do not count.

    Args:
        forms: What to time, by name.
        device: Where they compute.
        turns: Rounds; None for as many as fit into `budget_s` (`choose_turns`).
        budget_s: Seconds to spend, about.
        repeats: Calls in one measurement, for forms shorter than what a clock can tell.

    Returns:
        The times of one call by name, and the number of rounds.
    """
    seconds = _clock(device)
    many = {name: _repeated(form, repeats) for name, form in forms.items()}
    ready = {name: _graph(form) for name, form in many.items()} if device.type == "cuda" else many
    for form in ready.values():  # compiles and arranges
        form()
    begin = time.perf_counter()
    for form in ready.values():
        seconds(form)
    count = choose_turns(time.perf_counter() - begin, budget_s) if turns is None else turns
    found: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(count):
        for name, form in ready.items():
            found[name].append(seconds(form) / repeats)
    return {name: Times(statistics.median(each), min(each)) for name, each in found.items()}, count


def _repeated(form: Form, repeats: int) -> Form:
    def run() -> None:
        for _ in range(repeats):
            form()

    return form if repeats == 1 else run


def _clock(device: torch.device) -> Callable[[Form], float]:
    if device.type == "cuda":
        return _cuda_seconds
    now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def seconds(form: Form) -> float:
        begin = now()
        form()
        return now() - begin

    return seconds


def _cuda_seconds(form: Form) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    form()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _graph(form: Form) -> Form:
    """Return the replay of a form as a CUDA graph, made after calls that let kernels compile and be chosen."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            form()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        form()
    return graph.replay
