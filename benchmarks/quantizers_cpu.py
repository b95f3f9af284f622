"""Quantizing every filter of ResNet-18 (20 convolutions, 11.2 million weights) on one core, each quantizer in turn.

    PYTHONPATH=. python benchmarks/quantizers_cpu.py

`split_ms` is what a training step needs first, threshold, alpha and beta of each filter; `dense_ms` the two-valued
weight from them; `sort_ms` torch's sort of the same weights, which the obvious exact search would begin with.
`dab_warm` starts from the optimum of the weights before a step of 1 % of their standard deviation. Forms take turns;
each figure is the median of its turns. A result beyond the stated bound to the exact optimum is refused.
"""

import time
from collections.abc import Callable
from statistics import median

import torch
from packed_conv import record
from torch import Tensor

from dabnn.quantizers import QUANTIZERS, Split, split, split_warm
from kernels import two_valued

TURNS = 15
STEP = 0.01


def resnet18_shapes() -> list[tuple[int, int, int, int]]:
    """Returns the shapes of ResNet-18's convolutions, for ImageNet."""
    shapes = [(64, 3, 7, 7), *[(64, 64, 3, 3)] * 4]
    for channels in (128, 256, 512):
        half = channels // 2
        shapes += [(channels, half, 3, 3), (channels, half, 1, 1), *[(channels, channels, 3, 3)] * 3]
    return shapes


def error(weight: Tensor, parts: Split) -> Tensor:
    """Returns the squared error of all filters together, float64."""
    return (weight.double() - two_valued(weight, *parts).double()).square().sum()


def timed(form: Callable[[], object]) -> float:
    """Returns how long one call takes, in milliseconds."""
    start = time.perf_counter()
    form()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    """Prints the table and writes `quantizers_cpu.json`."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    before = [torch.randn(shape, generator=generator) * 0.05 for shape in resnet18_shapes()]
    weights = [old + torch.randn(old.shape, generator=generator) * 0.05 * STEP for old in before]
    starts = [(alpha + beta) / 2 for _, alpha, beta in (split(old, "dab") for old in before)]

    def quantize(method: str) -> list[Split]:
        if method == "dab_warm":
            return [split_warm(weight, start) for weight, start in zip(weights, starts, strict=True)]
        return [split(weight, method) for weight in weights]

    exact, warm = quantize("dab"), quantize("dab_warm")
    for old, weight, best, found in zip(before, weights, exact, warm, strict=True):
        bound = error(weight, best).sqrt() + 2 * (weight - old).double().norm()
        if not error(weight, best) * (1 - 1e-6) <= error(weight, found) <= bound.square():
            raise RuntimeError(f"{tuple(weight.shape)}: the warm-started search is wrong, so it is not timed")
    excess = sum(error(w, p) for w, p in zip(weights, warm, strict=True)) / sum(map(error, weights, exact)) - 1

    methods = [name for name in QUANTIZERS if name != "dab_learned"]
    times: dict[str, list[float]] = {name: [] for name in [*methods, "dense", "sort"]}
    for _ in range(TURNS):
        for name in methods:
            times[name].append(timed(lambda name=name: quantize(name)))
        times["dense"].append(timed(lambda: [two_valued(w, *parts) for w, parts in zip(weights, exact, strict=True)]))
        times["sort"].append(timed(lambda: [weight.flatten(1).sort(1) for weight in weights]))
    rows = [
        {
            "weights": name,
            "split_ms": median(times[name]),
            "dense_ms": median(times["dense"]),
            "sort_ms": median(times["sort"]),
        }
        for name in methods
    ]
    num_weights = sum(weight.numel() for weight in weights)
    record("quantizers_cpu", rows, threads=1, num_weights=num_weights, turns=TURNS, warm_excess_error=float(excess))


if __name__ == "__main__":
    main()
