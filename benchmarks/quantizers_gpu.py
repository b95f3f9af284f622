"""Quantizing every filter of ResNet-18 (20 convolutions, 11.2 million weights) on the GPU, beside plain torch.

    PYTHONPATH=. python benchmarks/quantizers_gpu.py

Forms of the exact search: `many`, all weights in one call; `singly`, one call a weight; `torch`, the plain-torch search
one weight after the other; `torch_compiled`, the same as one compiled graph; `sort`, torch's sort alone, which that
search begins with. `warm` starts from the optimum of the weights before a step of 1 % of their standard deviation.
Then what a layer does in a training step, tap-centred, forward and backward: `step`, by one operator each way, `parts`,
from its parts, and `parts_compiled`, these as one compiled graph.

`eager_ms` holds launches and host, `graph_ms` is the replay of a CUDA graph. The second table is one weight of 512
filters of each size by the number of warps that share a filter. Before each call a buffer larger than the L2 cache is
written. Forms take turns; each figure is the median of CUDA-event timings. A form whose result differs from the
processor's is not timed.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from packed_conv import record
from quantizers_cpu import STEP, resnet18_shapes
from torch import Tensor

from dabnn.gradients import Estimator, dab_ste, two_valued_ste
from dabnn.quantizers import split, subtract_center
from kernels import dab_threshold, dab_threshold_warm
from kernels.dab import dab_threshold_reference

TURNS = 30
CALLS_BEFORE_CAPTURE = 3
FLUSHED_BYTES = 256 * 2**20
WIDTH_FILTERS, WIDTH_SIZES, WIDTHS = 512, (64, 576, 1152, 2304, 4608), (1, 2, 4, 8)
Form = Callable[[], Any]


def search_forms(weights: Sequence[Tensor], starts: Sequence[Tensor]) -> dict[str, Form]:
    """Returns the forms of the search."""
    compiled = torch.compile(lambda: [dab_threshold_reference(weight) for weight in weights], dynamic=False)
    return {
        "many": lambda: torch.ops.dab.dab_many(weights),
        "singly": lambda: [dab_threshold(weight) for weight in weights],
        "warm": lambda: [dab_threshold_warm(*pair) for pair in zip(weights, starts, strict=True)],
        "torch": lambda: [dab_threshold_reference(weight) for weight in weights],
        "torch_compiled": compiled,
        "sort": lambda: [weight.flatten(1).sort(1, descending=True) for weight in weights],
    }


def step_forms(weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> dict[str, Form]:
    """Returns the forms of what the layers do in a training step."""
    leaves = [weight.clone().requires_grad_() for weight in weights if weight.shape[1] > 3]
    upstream = gradients[-len(leaves) :]

    def fused(weight: Tensor) -> Tensor:
        return dab_ste(weight, "tap", Estimator(), is_about_threshold=False, has_means=False)

    def composed(weight: Tensor) -> Tensor:
        centered = subtract_center(weight, "tap")
        return two_valued_ste(centered, *split(centered, "dab"))

    compiled = torch.compile(lambda: [composed(leaf) for leaf in leaves], dynamic=False)
    return {
        "step": lambda: torch.autograd.grad([fused(leaf) for leaf in leaves], leaves, upstream),
        "parts": lambda: torch.autograd.grad([composed(leaf) for leaf in leaves], leaves, upstream),
        "parts_compiled": lambda: torch.autograd.grad(compiled(), leaves, upstream),
    }


def refuse_if_wrong(weights: Sequence[Tensor], forms: Mapping[str, Form]) -> None:
    """Raises RuntimeError unless every exact form finds the thresholds of the processor."""
    expected = torch.cat([dab_threshold(weight.cpu())[0] for weight in weights])
    found = {"many": forms["many"]()[1]}
    for name in ("singly", "torch", "torch_compiled"):
        found[name] = torch.cat([parts[0] for parts in forms[name]()])
    for name, thresholds in found.items():
        if not torch.equal(thresholds.cpu(), expected):
            raise RuntimeError(f"{name}: thresholds differ from the processor's, so it is not timed")


def captured(form: Form) -> Form | None:
    """Returns the replay of a form as a CUDA graph, or None where torch cannot capture it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(CALLS_BEFORE_CAPTURE):
            form()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = form()
    except RuntimeError as error:
        print(f"not captured: {str(error).splitlines()[0]}")
        return None

    def replay() -> Any:
        graph.replay()
        return kept

    return replay


def median_ms(forms: Mapping[str, Form]) -> dict[str, float]:
    """Returns the median time of each form in milliseconds over `TURNS` rounds in which every form runs once."""
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(TURNS):
        for name, form in forms.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flushed.zero_()
            torch.cuda.synchronize()
            start.record()
            form()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def widths() -> list[dict[str, Any]]:
    """Returns the time of the search by size of the filters and warps a filter."""
    from kernels import dab_triton

    rows = []
    for size in WIDTH_SIZES:
        weight = torch.randn(WIDTH_FILTERS, size, device="cuda")
        outputs = [torch.empty(WIDTH_FILTERS, device="cuda") for _ in range(3)]
        forms = {
            f"warps_{num_warps}_ms": captured(partial(dab_triton.launch, weight, *outputs, num_warps=num_warps))
            for num_warps in WIDTHS
        }
        times = median_ms({name: form for name, form in forms.items() if form})
        rows.append({"filters": WIDTH_FILTERS, "size": size, "chosen": dab_triton.num_warps_for(size), **times})
    return rows


def main() -> None:
    """Prints the tables and writes `quantizers_gpu.json` and `quantizers_gpu_widths.json`."""
    if not torch.cuda.is_available():
        raise SystemExit("quantizers_gpu: torch sees no CUDA device, and without one there is nothing to measure.")
    generator = torch.Generator().manual_seed(0)
    before = [torch.randn(shape, generator=generator) * 0.05 for shape in resnet18_shapes()]
    weights = [(old + torch.randn(old.shape, generator=generator) * 0.05 * STEP).cuda() for old in before]
    starts = [(alpha + beta).cuda() / 2 for _, alpha, beta in map(dab_threshold, before)]
    forms = search_forms(weights, starts)
    refuse_if_wrong(weights, forms)
    forms |= step_forms(weights, [torch.randn_like(weight) for weight in weights])
    for form in forms.values():
        form()
    eager = median_ms(forms)
    replays = {name: captured(form) for name, form in forms.items()}
    graphs = median_ms({name: replay for name, replay in replays.items() if replay})
    rows = [
        {
            "form": name,
            "eager_ms": eager[name],
            "graph_ms": graphs.get(name),
            "ratio_to_many": eager[name] / eager["many"],
        }
        for name in forms
    ]
    num_weights = sum(weight.numel() for weight in weights)
    record("quantizers_gpu", rows, num_weights=num_weights, turns=TURNS, figure="median, L2 flushed before each call")
    record("quantizers_gpu_widths", widths(), turns=TURNS, figure="median of graph replays, L2 flushed before each")


if __name__ == "__main__":
    main()
