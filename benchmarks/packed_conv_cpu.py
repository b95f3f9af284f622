"""The packed convolution beside float32 and int8 convolutions on the CPU, in one run, at 1 thread and at all.

    PYTHONPATH=. python benchmarks/packed_conv_cpu.py

`pack` is signs to bits, `packed` the convolution from bits to float32, `both` the two in a row from float32 to float32,
`signs` the convolution from bits to the next layer's bits; all are channels-last. The float32 peer is the fastest of
torch (contiguous and channels-last) and onnxruntime, the int8 peer onnxruntime's QLinearConv; onnxruntime takes part
where `benchmarks/requirements-kernels.txt` is installed. Peers compute in ordinary numbers, so far more precisely.

All forms take turns, so that a busy machine slows them alike; each figure is the best of its turns. With one thread it
is processor time of that thread, with more it is wall time.
"""

import importlib.util
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from packed_conv import LAYERS, Case, make_case, record, refuse_if_wrong
from torch.nn import functional as F

from kernels import pack_signs, packed_conv2d_signs

TURNS = 100
HAS_ONNXRUNTIME = all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime"))


def best_ms(forms: Mapping[str, Callable[[], Any]], num_threads: int) -> dict[str, float]:
    """Returns the shortest time of each form in milliseconds over `TURNS` rounds in which every form runs once."""
    clock = time.thread_time if num_threads == 1 else time.perf_counter
    best = dict.fromkeys(forms, float("inf"))
    for _ in range(TURNS):
        for name, form in forms.items():
            start = clock()
            form()
            best[name] = min(best[name], 1e3 * (clock() - start))
    return best


def onnx_forms(case: Case, num_threads: int) -> dict[str, Callable[[], Any]]:
    """Returns onnxruntime's float32 and int8 convolution of the layer, weights constant, as calls."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    shape = list(case.x.shape)
    scales = {"s": np.float32(1 / 64), "z": np.uint8(128), "ws": np.float32(1 / 127), "wz": np.int8(0)}
    scales |= {"ys": np.float32(1), "yz": np.uint8(128)}
    whole = torch.randint(-127, 128, case.dense.shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    makes = {
        "onnx_float32": ("Conv", ["x", "w"], TensorProto.FLOAT, {"w": case.dense.numpy()}),
        "onnx_int8": (
            "QLinearConv",
            ["x", "s", "z", "w", "ws", "wz", "ys", "yz"],
            TensorProto.UINT8,
            {"w": whole.numpy()} | scales,
        ),
    }
    inputs = {
        "onnx_float32": case.x.contiguous().numpy(),
        "onnx_int8": case.x.mul(30).add(128).clamp(0, 255).byte().numpy(),
    }
    forms = {}
    for name, (operator, names, kind, constants) in makes.items():
        initial = [numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items()]
        node = helper.make_node(operator, names, ["y"], pads=[1, 1, 1, 1])
        ports = [helper.make_tensor_value_info(port, kind, shape) for port in ("x", "y")]
        graph = helper.make_graph([node], name, ports[:1], ports[1:], initial)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        forms[name] = _call(session, {"x": np.ascontiguousarray(inputs[name])})
    return forms


def _call(session: Any, feed: Mapping[str, Any]) -> Callable[[], Any]:
    return lambda: session.run(None, feed)


def measure(case: Case, num_threads: int) -> dict[str, Any]:
    """Returns one row of the table."""
    torch.set_num_threads(num_threads)
    refuse_if_wrong(case)
    x, sign, dense = (t.to(memory_format=torch.channels_last) for t in (case.x, case.sign, case.dense))
    bits, channels = pack_signs(x), case.x.shape[1]
    threshold, falls = torch.zeros(channels), torch.arange(channels) % 2 == 0
    filters = (case.weight_bits, case.alpha, case.beta, None, threshold, falls)
    with torch.inference_mode():
        times = best_ms(
            {
                "pack": lambda: pack_signs(x),
                "packed": lambda: case.packed(bits),
                "both": lambda: case.packed(pack_signs(x)),
                "signs": lambda: packed_conv2d_signs(bits, *filters, in_channels=channels),
                "torch": lambda: F.conv2d(case.sign, case.dense, padding=1),
                "torch_last": lambda: F.conv2d(sign, dense, padding=1),
            }
            | (onnx_forms(case, num_threads) if HAS_ONNXRUNTIME else {}),
            num_threads,
        )
    peer = min(times[name] for name in ("torch", "torch_last", "onnx_float32") if name in times)
    row = {"layer": case.name, "batch": case.batch, "threads": num_threads}
    row |= {f"{name}_ms": time_ms for name, time_ms in times.items()}
    row["packed_gmac_per_s"] = case.num_macs / times["packed"] / 1e6
    row |= {f"ratio_{name}": peer / times[name] for name in ("packed", "both", "signs")}
    if "onnx_int8" in times:
        row["ratio_both_int8"] = times["onnx_int8"] / times["both"]
    return row


def main() -> None:
    """Measures every layer and writes the record."""
    threads = sorted({1, os.cpu_count() or 1})
    cases = [make_case(channels, size, 1, "cpu") for channels, size in LAYERS]
    rows = [measure(case, num_threads) for num_threads in threads for case in cases]
    conditions: dict[str, Any] = {"turns": TURNS, "figure": "best of turns, forms taking turns"}
    if HAS_ONNXRUNTIME:
        from importlib.metadata import version

        conditions["onnxruntime"] = version("onnxruntime")
    record("packed_conv_cpu", rows, **conditions)


if __name__ == "__main__":
    main()
