r"""ONNX files in onnxruntime, on the CPU: loading one, and comparing its binary layers with those of the packed model.

A layer must agree up to rounding. With g(m) = m u / (1 - m u), u = 2**-24, each of two evaluations of a sum of m
products errs by at most g(m) * (sum of the magnitudes), so that they differ by at most twice that (Higham, Accuracy and
Stability of Numerical Algorithms, section 3.1). With binary inputs the sums are whole numbers and exact, and m counts
the operations after them. Where inputs are two-valued, their scale and offset are means over the sample, which two
programs add up in different orders, m then the number of values, and a value nearer to the channels' mean than that
mean's own rounding may have either sign.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dabnn.activations import input_code
from dabnn.errors import InvalidInputError
from dabnn.export_onnx import LAYERS
from dabnn.exported import INPUT, OUTPUT, ExportedModel, described, first_line
from dabnn.layers import BinaryConv2d
from dabnn.models import skeleton
from dabnn.packed import PackedModel
from dabnn.packed_file import decode_mask
from dabnn.quantizers import expand

# Every tensor between layers is kept for so many images at a time.
_CHUNK = 8
# alpha - beta, two products and a sum, and the bias: the epilogue after two exact integer sums.
_EPILOGUE_OPS = 5
# A product with the scale of the inputs, one with their offset, and the sum.
_SCALED_INPUT_OPS = 3
_UNIT = 2.0**-24
# Of onnxruntime: errors only; its warnings are about its own optimizations.
_ERRORS = 3


def load_onnx(path: Path | str) -> ExportedModel:
    """Read an ONNX file that `dabnn.export_onnx` wrote; it runs in onnxruntime with as many threads as torch has.

    Raises:
        InvalidInputError: There is no such file, or it is damaged or something else.
    """
    path = Path(path)
    session = _session(path, _read(path))

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: images.contiguous().numpy()})[0])

    return described(path, session.get_modelmeta().custom_metadata_map, lambda: run)


def compare_layers(packed: PackedModel, path: Path | str, images: Tensor) -> tuple[float, dict[str, str]]:
    """Compare each binary layer of an ONNX file with the packed model's, fed with what it is fed in the ONNX network.

    Args:
        packed: What the file was made of.
        path: The file.
        images: Normalized images (N, in_channels, input_size, input_size).

    Returns:
        The largest difference of an output, and a sentence for every layer that differs by more than rounding explains.
    """
    largest, wrong = 0.0, {}
    table = skeleton(**asdict(packed.spec))
    for layer, x, y in _layer_values(Path(path), images):
        shape = cast(BinaryConv2d, table.get_submodule(layer))
        difference = (packed.net.get_submodule(layer)(x) - y).abs().nan_to_num(nan=torch.inf)
        bound = _rounding_bound(shape, _scalars(packed, layer, shape), x)
        largest = max(largest, float(difference.max()))
        if bool((difference > bound).any()):
            wrong[layer] = (
                f"{layer}: the ONNX layer differs by {float(difference.max()):.3g} where rounding explains "
                f"{float(bound.max()):.3g} at most."
            )
    return largest, wrong


def _layer_values(path: Path, images: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield path, input and output of every binary layer, a few images at a time."""
    import onnx

    model = onnx.load_from_string(_read(path))
    layers = json.loads({prop.key: prop.value for prop in model.metadata_props}[LAYERS])
    names = sorted({name for pair in layers.values() for name in pair} - {INPUT, OUTPUT})
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    session = _session(path, model.SerializeToString())
    for chunk in images.split(_CHUNK):
        found = session.run([OUTPUT, *names], {INPUT: chunk.contiguous().numpy()})
        values = dict(zip([OUTPUT, *names], map(torch.from_numpy, found), strict=True)) | {INPUT: chunk}
        for layer, (before, after) in layers.items():
            yield layer, values[before], values[after]


def _scalars(packed: PackedModel, layer: str, shape: nn.Conv2d) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return mask, alpha, beta and bias of a binary layer, as its file has them."""
    alpha, beta = (packed.tensors[f"{layer}.{name}"].float() for name in ("alpha", "beta"))
    mask = decode_mask(packed.tensors[f"{layer}.weight_bits"], shape.weight.shape)
    bias = packed.tensors.get(f"{layer}.bias", torch.zeros_like(alpha)).float()
    return mask, alpha, beta, bias


def _rounding_bound(conv: BinaryConv2d, scalars: tuple[Tensor, Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
    """Return the largest difference that rounding explains, of a shape that broadcasts to the layer's output."""
    mask, alpha, beta, bias = scalars
    size = mask[0].numel()
    if not conv.binary_input:
        # Either side may compute it as (alpha - beta) * (sum where the mask is 1) + beta * (sum).
        weight = expand(mask, (alpha - beta).abs() + beta.abs(), beta.abs())
        sums = F.conv2d(x.abs(), weight, bias.abs(), conv.stride, conv.padding, conv.dilation, conv.groups)
        return _twice(size + _EPILOGUE_OPS) * sums
    magnitude = (size * ((alpha - beta).abs() + beta.abs())).view(-1, 1, 1)
    code = input_code(x, conv.options.input_quantizer, None)
    if conv.options.input_quantizer != "two_valued" or code.scale is None or code.offset is None:
        return _twice(_EPILOGUE_OPS) * (magnitude + bias.abs().view(-1, 1, 1))
    largest = code.scale.abs() + code.offset.abs()
    num_values = x[0].numel()
    rounded = _twice(_EPILOGUE_OPS + _SCALED_INPUT_OPS + num_values) * (largest * magnitude + bias.abs().view(-1, 1, 1))
    doubtful = (code.real.abs() <= _twice(x.shape[1] + 1) * (x.abs() + x.abs().mean(1, keepdim=True))).float()
    reached = F.conv2d(doubtful, torch.ones_like(mask[:1], dtype=torch.float32), None, conv.stride, conv.padding)
    return rounded + 2 * largest * reached * alpha.abs().maximum(beta.abs()).view(-1, 1, 1)


def _twice(num_operations: int) -> float:
    growth = num_operations * _UNIT / (1 - num_operations * _UNIT)
    # Divided by 1 - growth, since the sum of magnitudes is itself a float32 result.
    return 2 * growth / (1 - growth)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInputError(
            f"{path}: cannot be read ({error.strerror}). Give a file that dab export wrote."
        ) from error


def _session(path: Path, data: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = _ERRORS
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have nothing else in common
        raise InvalidInputError(
            f"{path}: is no whole ONNX model, or none that onnxruntime {onnxruntime.__version__} runs "
            f"({first_line(error)}), so it is damaged, cut off or something else. Export or copy it again."
        ) from error
