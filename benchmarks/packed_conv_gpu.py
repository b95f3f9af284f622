"""The Triton packed convolution beside cuDNN's bfloat16 and float32 convolutions on the GPU, in one run.

    PYTHONPATH=. python benchmarks/packed_conv_gpu.py

`pack` is signs to bits, `packed` the convolution from bits to float32. Peers run channels-last with cuDNN's autotuner
on. Inputs rotate over more memory than the L2 cache holds; each figure is the median of CUDA-event timings, the forms
taking turns.
"""

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from packed_conv import LAYERS, Case, make_case, record, refuse_if_wrong
from torch import Tensor
from torch.nn import functional as F

from kernels import pack_signs

TURNS = 50
L2_BYTES = 60 * 2**20
MAX_COPIES = 64


def rotating(tensor: Tensor) -> Callable[[], Tensor]:
    """Returns a function that gives up to 64 copies of a tensor in turn, to be together larger than the L2 cache."""
    num_copies = min(MAX_COPIES, L2_BYTES // (tensor.numel() * tensor.element_size()) + 2)
    copies = [tensor.clone(memory_format=torch.preserve_format) for _ in range(num_copies)]
    turn = iter(range(10**9))
    return lambda: copies[next(turn) % num_copies]


def median_ms(forms: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Returns the median time of each form in milliseconds over `TURNS` rounds in which every form runs once."""
    for form in forms.values():
        for _ in range(3):
            form()
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(TURNS):
        for name, form in forms.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            form()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def measure(case: Case) -> dict[str, Any]:
    """Returns one row of the table."""
    refuse_if_wrong(case)
    x, bits = rotating(case.x), rotating(pack_signs(case.x))
    sign, dense = (tensor.to(memory_format=torch.channels_last) for tensor in (case.sign, case.dense))
    sign_float, sign_bf16, dense_bf16 = rotating(sign), rotating(sign.bfloat16()), dense.bfloat16()
    times = median_ms(
        {
            "pack": lambda: pack_signs(x()),
            "packed": lambda: case.packed(bits()),
            "float32": lambda: F.conv2d(sign_float(), dense, padding=1),
            "bfloat16": lambda: F.conv2d(sign_bf16(), dense_bf16, padding=1),
        }
    )
    return {
        "layer": case.name,
        "batch": case.batch,
        **{f"{name}_ms": value for name, value in times.items()},
        "packed_gmac_per_s": case.num_macs / times["packed"] / 1e6,
        "ratio_to_bfloat16": times["bfloat16"] / times["packed"],
        "ratio_to_float32": times["float32"] / times["packed"],
    }


def main() -> None:
    """Measures every layer and writes the record."""
    if not torch.cuda.is_available():
        raise SystemExit("packed_conv_gpu: torch sees no CUDA device, and without one there is nothing to measure.")
    torch.backends.cudnn.benchmark = True
    rows = [measure(make_case(channels, size, batch, "cuda")) for batch in (1, 128) for channels, size in LAYERS]
    record("packed_conv_gpu", rows, turns=TURNS, figure="median of turns, host launch included at small sizes")


if __name__ == "__main__":
    main()
