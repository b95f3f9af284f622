"""Binary weights with real inputs on the GPU, held as bits, beside cuDNN with the same weights dense.

    PYTHONPATH=. python benchmarks/weight_only_gpu.py

Batch 1, 32 and 128, bfloat16 and float32 in and out, channels-last; the peer has cuDNN's autotuner on, and in float32
also TF32 (`tf32_ms`), which is far less precise than the bits are. Each form is captured in CUDA graphs, one for each of
several inputs that together are larger than the L2 cache; a figure is the median time of a replay, the forms taking
turns. `weight_mb` and `bits_mb` are what the weights take on the device.
"""

import itertools
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from packed_conv import record
from torch import Tensor
from torch.nn import functional as F
from weight_only import LAYERS, Case, make_case, refuse_if_wrong

BATCHES = (1, 32, 128)
TURNS = 50
L2_BYTES = 60 * 2**20
MAX_COPIES = 16


def captured(form: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    """Returns a function that replays the form on copies of x in turn."""
    num_copies = min(MAX_COPIES, L2_BYTES // (x.numel() * x.element_size()) + 2)
    graphs = []
    for _ in range(num_copies):
        copy = x.clone(memory_format=torch.preserve_format)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):  # compiles and tunes, which a capture may not
            for _ in range(3):
                form(copy)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            form(copy)
        graphs.append((graph, copy))
    turn = itertools.cycle(graphs)
    return lambda: next(turn)[0].replay()


def median_ms(forms: Mapping[str, Callable[[], None]]) -> dict[str, float]:
    """Returns the median time of each form in milliseconds over `TURNS` rounds in which every form runs once."""
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
    dense, padding = case.dense.to(case.x.dtype), case.padding

    def peer(x: Tensor, allow_tf32: bool) -> Tensor:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=allow_tf32):
            return F.conv2d(x, dense, padding=padding)

    forms = {"bits": captured(case.bits, case.x), "cudnn": captured(lambda x: peer(x, False), case.x)}
    if case.x.dtype == torch.float32:
        forms["tf32"] = captured(lambda x: peer(x, True), case.x)
    times = median_ms(forms)
    return {
        "layer": case.name,
        "batch": len(case.x),
        "dtype": str(case.x.dtype).removeprefix("torch."),
        "bits_ms": times["bits"],
        "cudnn_ms": times["cudnn"],
        "tf32_ms": times.get("tf32"),
        "bits_gmac_per_s": case.num_macs / times["bits"] / 1e6,
        "ratio": times["cudnn"] / times["bits"],
        "weight_mb": dense.numel() * dense.element_size() / 1e6,
        "bits_mb": case.weight_bits.numel() * 4 / 1e6,
    }


def main() -> None:
    """Measures every layer and writes the record."""
    if not torch.cuda.is_available():
        raise SystemExit("weight_only_gpu: torch sees no CUDA device, and without one there is nothing to measure.")
    kinds = [(dtype, batch) for dtype in (torch.bfloat16, torch.float32) for batch in BATCHES]
    rows = [measure(make_case(layer, batch, "cuda", dtype=dtype)) for dtype, batch in kinds for layer in LAYERS]
    record("weight_only_gpu", rows, turns=TURNS, figure="median of graph replays, forms taking turns")


if __name__ == "__main__":
    main()
