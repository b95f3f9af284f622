"""Binary weights with real inputs on the GPU, held as bits, beside cuDNN with the same weights dense.

    PYTHONPATH=. python benchmarks/weight_only_gpu.py

Batch 1, 32 and 128, bfloat16 and float32 in and out, channels-last; the peer has cuDNN's autotuner on, and in float32
also TF32 (`tf32_us`), which is far less precise than the bits are. A figure is the median of replays of CUDA graphs,
over inputs that together are larger than the L2 cache (`replays`), the forms taking turns. `weight_mb` and `bits_mb`
are what the weights take on the device.
"""

from typing import Any

import torch
from packed_conv import record
from replays import median_us
from torch import Tensor
from torch.nn import functional as F
from weight_only import LAYERS, Case, make_case, refuse_if_wrong

BATCHES = (1, 32, 128)
TURNS = 20
MAX_CALLS = 100


def measure(case: Case) -> dict[str, Any]:
    """Returns one row of the table."""
    refuse_if_wrong(case)
    dense, padding = case.dense.to(case.x.dtype), case.padding

    def peer(x: Tensor, allow_tf32: bool) -> Tensor:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=allow_tf32):
            return F.conv2d(x, dense, padding=padding)

    forms = {"bits": (case.bits, case.x), "cudnn": (lambda x: peer(x, False), case.x)}
    if case.x.dtype == torch.float32:
        forms["tf32"] = (lambda x: peer(x, True), case.x)
    times = median_us(forms, TURNS, MAX_CALLS)
    return {
        "layer": case.name,
        "batch": len(case.x),
        "dtype": str(case.x.dtype).removeprefix("torch."),
        "bits_us": times["bits"],
        "cudnn_us": times["cudnn"],
        "tf32_us": times.get("tf32"),
        "bits_gmac_per_s": case.num_macs / times["bits"] / 1e3,
        "ratio": times["cudnn"] / times["bits"],
        "weight_mb": dense.numel() * dense.element_size() / 1e6,
        "bits_mb": case.weight_bits.numel() * 4 / 1e6,
    }


def main() -> None:
    """Measures every layer and writes the record."""
    if not torch.cuda.is_available():
        raise SystemExit("weight_only_gpu: torch sees no CUDA device, and without one there is nothing to measure.")
    kinds = [(dtype, batch) for dtype in (torch.bfloat16, torch.float32) for batch in BATCHES]
    rows = []
    for dtype, batch in kinds:
        for layer in LAYERS:
            rows.append(measure(make_case(layer, batch, "cuda", dtype=dtype)))
            torch.cuda.empty_cache()
    record("weight_only_gpu", rows, turns=TURNS, figure="median of graph replays, forms taking turns")


if __name__ == "__main__":
    main()
