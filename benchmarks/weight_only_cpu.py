"""Binary weights with real inputs on the CPU, held as bits or dense: time and memory, layers and whole networks.

    PYTHONPATH=. python benchmarks/weight_only_cpu.py

Layers (`weight_only_layers_cpu.json`): `bits` adds up in registers, `parts` makes the filters dense a few megabytes at
a time (what processors without AVX-512 do), the float32 peer is the fastest of torch (contiguous and channels-last) and
onnxruntime. Networks (`weight_only_cpu.json`): `load_packed` with weights `bits` and `dense`. `tensors_mb` is what the
model's tensors and what was rearranged of them take; `resident_mb` and `peak_mb` are what a process of its own has
more, after three passes and at most, than before it loaded the file.

All forms take turns, so that a busy machine slows them alike; each figure is the best of its turns. With one thread it
is processor time of that thread, with more it is wall time.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from packed_conv import record
from torch.nn import functional as F
from weight_only import LAYERS, Case, make_case, refuse_if_wrong

from dabnn.models import build
from dabnn.packed import load_packed, pack
from kernels.weight_only import _dense_cpu

TURNS = {1: 20, 32: 3}
# Network, input channels, input size.
NETWORKS = [("resnetwbin18", 3, 224), ("alexnetwbin", 3, 224), ("sketchanetwbin", 1, 225), ("googlenetwbin", 1, 224)]
FORMS = ("bits", "dense")
HAS_ONNXRUNTIME = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))


def best_ms(forms: Mapping[str, Callable[[], Any]], num_threads: int, turns: int) -> dict[str, float]:
    """Returns the shortest time of each form in milliseconds over rounds in which every form runs once."""
    clock = time.thread_time if num_threads == 1 else time.perf_counter
    best = dict.fromkeys(forms, float("inf"))
    for turn in range(turns + 1):
        for name, form in forms.items():
            start = clock()
            form()
            if turn:  # the first one compiles and arranges
                best[name] = min(best[name], 1e3 * (clock() - start))
    return best


def onnx_form(case: Case, num_threads: int) -> Callable[[], Any]:
    """Returns onnxruntime's float32 convolution of the layer, weights constant, as a call."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    weight = numpy_helper.from_array(case.dense.contiguous().numpy(), "w")
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[case.padding] * 4)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, list(case.x.shape))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "layer", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    feed = {"x": case.x.contiguous().numpy()}
    return lambda: session.run(None, feed)


def measure_layer(case: Case, num_threads: int) -> dict[str, Any]:
    """Returns one row of the table of layers."""
    torch.set_num_threads(num_threads)
    refuse_if_wrong(case)
    x, plain, dense = case.x, case.x.contiguous(), case.dense.contiguous()
    out = case.bits(x).permute(0, 2, 3, 1).contiguous()
    scalars, steps = (case.alpha, case.beta, None), ((1, 1), (case.padding,) * 2, (1, 1))
    forms = {
        "bits": lambda: case.bits(x),
        "parts": lambda: _dense_cpu(x, case.weight_bits, scalars, steps, 1, out),
        "torch": lambda: F.conv2d(plain, dense, padding=case.padding),
        "torch_last": lambda: F.conv2d(x, case.dense, padding=case.padding),
    }
    if HAS_ONNXRUNTIME:
        forms["onnx"] = onnx_form(case, num_threads)
    with torch.inference_mode():
        times = best_ms(forms, num_threads, TURNS[len(x)])
    peer = min(times[name] for name in ("torch", "torch_last", "onnx") if name in times)
    return {
        "layer": case.name,
        "batch": len(x),
        "threads": num_threads,
        **{f"{name}_ms": value for name, value in times.items()},
        "bits_gmac_per_s": case.num_macs / times["bits"] / 1e6,
        "ratio_bits": peer / times["bits"],
        "ratio_parts": peer / times["parts"],
        "weight_mb": case.dense.numel() * 4 / 1e6,
        "bits_mb": case.weight_bits.numel() * 4 / 1e6,
    }


def measure_network(file: Path, batch: int, num_threads: int) -> list[dict[str, Any]]:
    """Returns the rows of a packed file, one a form."""
    torch.set_num_threads(num_threads)
    models = {form: load_packed(file, weights=form) for form in FORMS}
    spec = models["bits"].spec
    x = torch.randn(batch, spec.in_channels, spec.input_size, spec.input_size)
    x = x.to(memory_format=torch.channels_last)
    bits, dense = (models[form](x) for form in FORMS)
    if float((bits - dense).abs().max()) > 1e-3 * float(dense.abs().max()):
        raise RuntimeError(f"{spec.name}: the two forms disagree, so they are not timed")
    forms = {form: lambda model=model: model(x) for form, model in models.items()}
    times = best_ms(forms, num_threads, TURNS[batch])
    rows = []
    for form in FORMS:
        row = {"network": spec.name, "batch": batch, "threads": num_threads, "weights": form, "ms": times[form]}
        row |= {"ratio": times["dense"] / times[form], "file_mb": file.stat().st_size / 1e6}
        rows.append(row | memory_mb(file, form, batch))
    return rows


def memory_mb(file: Path, form: str, batch: int) -> dict[str, float]:
    """Returns what a process of its own says of its memory."""
    command = [sys.executable, __file__, str(file), form, str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def tell_memory(file: str, form: str, batch: int) -> None:
    """Loads a file, runs it and prints what it took, in a process that does nothing else."""
    from kernels import derived

    torch.set_num_threads(1)
    small = pack(build("bincifar", num_classes=2, in_channels=3, input_size=16, bin_start=2, bin_end=7, seed=0).eval())
    small(torch.zeros(1, 3, 16, 16))  # what torch, Numba and their kernels take in any case
    resident, _ = status_mb()
    model = load_packed(file, weights=form)
    x = torch.zeros(batch, model.spec.in_channels, model.spec.input_size, model.spec.input_size)
    for _ in range(3):
        model(x)
    after, peak = status_mb()
    tensors = {id(t): t for t in [*model.net.parameters(), *model.net.buffers(), *model.tensors.values()]}
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    for (name, *_), (_, made, _) in derived._entries.items():  # noqa: SLF001 - what is kept has no public name
        num_bytes += sum(array.nbytes for array in made) if name == "weight_only" else 0
    print(json.dumps({"tensors_mb": num_bytes / 1e6, "resident_mb": after - resident, "peak_mb": peak - resident}))


def status_mb() -> tuple[float, float]:
    """Returns what this process holds, and the most it has held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
    return int(values["VmRSS"]) * 1024 / 1e6, int(values["VmHWM"]) * 1024 / 1e6


def main() -> None:
    """Measures every layer and network and writes the records."""
    threads = sorted({1, os.cpu_count() or 1})
    conditions: dict[str, Any] = {"turns": TURNS, "figure": "best of turns, forms taking turns"}
    if HAS_ONNXRUNTIME:
        from importlib.metadata import version

        conditions["onnxruntime"] = version("onnxruntime")
    cases = [make_case(layer, batch, "cpu") for batch in TURNS for layer in LAYERS]
    layers = [measure_layer(case, num_threads) for num_threads in threads for case in cases]
    record("weight_only_layers_cpu", layers, **conditions)
    rows = []
    with tempfile.TemporaryDirectory(prefix="dab-weight-only-") as folder:
        for name, channels, size in NETWORKS:
            file = Path(folder) / name
            pack(build(name, num_classes=1000, in_channels=channels, input_size=size, seed=0).eval()).save(file)
            rows += [row for n in threads for batch in TURNS for row in measure_network(file, batch, n)]
    record("weight_only_cpu", rows, **conditions)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        tell_memory(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    else:
        main()
