"""The Numba packed convolution beside torch's float32 convolution on the CPU, in one run, at 1 thread and at all.

    PYTHONPATH=. python benchmarks/packed_conv_cpu.py

`pack` is signs to bits, `packed` the convolution from bits to float32, `both` their sum; the peer is the faster of
the contiguous and the channels-last form. All forms take turns, so that a busy machine slows them alike; each figure
is the best of its turns.
"""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from packed_conv import LAYERS, Case, make_case, record, refuse_if_wrong
from torch.nn import functional as F

from kernels import pack_signs

TURNS = 60


def best_ms(forms: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Returns the shortest time of each form in milliseconds over `TURNS` rounds in which every form runs once."""
    best = dict.fromkeys(forms, float("inf"))
    for _ in range(TURNS):
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
    return best


def measure(case: Case, num_threads: int) -> dict[str, Any]:
    """Returns one row of the table."""
    torch.set_num_threads(num_threads)
    refuse_if_wrong(case)
    bits = pack_signs(case.x)
    channels_last = [tensor.to(memory_format=torch.channels_last) for tensor in (case.sign, case.dense)]
    times = best_ms(
        {
            "pack": lambda: pack_signs(case.x),
            "packed": lambda: case.packed(bits),
            "float": lambda: F.conv2d(case.sign, case.dense, padding=1),
            "float_last": lambda: F.conv2d(*channels_last, padding=1),
        }
    )
    peer, both = min(times["float"], times["float_last"]), times["pack"] + times["packed"]
    return {
        "layer": case.name,
        "batch": case.batch,
        "threads": num_threads,
        "pack_ms": times["pack"],
        "packed_ms": times["packed"],
        "float32_ms": peer,
        "packed_gmac_per_s": case.num_macs / times["packed"] / 1e6,
        "ratio_packed": peer / times["packed"],
        "ratio_both": peer / both,
    }


def main() -> None:
    """Measures every layer and writes the record."""
    threads = sorted({1, os.cpu_count() or 1})
    cases = [make_case(channels, size, 1, "cpu") for channels, size in LAYERS]
    rows = [measure(case, num_threads) for num_threads in threads for case in cases]
    record("packed_conv_cpu", rows, turns=TURNS, figure="best of turns, forms taking turns")


if __name__ == "__main__":
    main()
