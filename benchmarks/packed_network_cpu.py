"""Whole packed networks beside the same architecture in torch's float32 on the CPU, at 1 thread and at all.

    PYTHONPATH=. python benchmarks/packed_network_cpu.py

Both run channels-last, one image at a time, on random weights: the time does not depend on them. `stem_share` is the
part of the packed network's time that its first, real-valued layer takes. The float peer is the network of the same
name without binary layers. All forms take turns; each figure is the best of its turns, processor time with one thread
and wall time with more.
"""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from packed_conv import record
from torch import nn

from dabnn.models import Network, build
from dabnn.packed import pack

TURNS = 30
# Packed network, float network, input channels, input size.
NETWORKS = [("resnetfbin18", "resnet18", 3, 224), ("sketchanetfbin", "sketchanet", 1, 225)]


def best_ms(forms: Mapping[str, Callable[[], Any]], num_threads: int) -> dict[str, float]:
    """Returns the shortest time of each form in milliseconds over `TURNS` rounds in which every form runs once."""
    clock = time.thread_time if num_threads == 1 else time.perf_counter
    best = dict.fromkeys(forms, float("inf"))
    for turn in range(TURNS + 2):
        for name, form in forms.items():
            start = clock()
            form()
            if turn >= 2:  # the first ones compile and arrange
                best[name] = min(best[name], 1e3 * (clock() - start))
    return best


def stem(net: Network) -> nn.Sequential:
    """Returns the first convolution with its BN and ReLU."""
    return nn.Sequential(*(net.get_submodule(name) for name in ("conv1", "bn1", "relu1")))


def measure(packed_name: str, float_name: str, channels: int, size: int, num_threads: int) -> dict[str, Any]:
    """Returns one row of the table."""
    torch.set_num_threads(num_threads)
    shape = {"num_classes": 250, "in_channels": channels, "input_size": size, "seed": 0}
    real = build(float_name, **shape).eval()
    nn.Module.to(real, memory_format=torch.channels_last)
    packed = pack(build(packed_name, **shape).eval())
    x = torch.randn(1, channels, size, size).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        if not torch.equal(packed(x), packed.net(x)):
            raise RuntimeError(f"{packed_name}: the running form is wrong, so it is not timed")
        first = stem(packed.net)
        times = best_ms(
            {"packed": lambda: packed(x), "float32": lambda: real(x), "stem": lambda: first(x)}, num_threads
        )
    return {
        "network": packed_name,
        "threads": num_threads,
        "packed_ms": times["packed"],
        "float32_ms": times["float32"],
        "ratio": times["float32"] / times["packed"],
        "stem_share": times["stem"] / times["packed"],
    }


def main() -> None:
    """Measures every network and writes the record."""
    threads = sorted({1, os.cpu_count() or 1})
    rows = [measure(*network, num_threads) for num_threads in threads for network in NETWORKS]
    record("packed_network_cpu", rows, batch=1, turns=TURNS, figure="best of turns, forms taking turns")


if __name__ == "__main__":
    main()
