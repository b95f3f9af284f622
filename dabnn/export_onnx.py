"""Packed models as ONNX files that any runtime for ONNX can run: plain operators, and bits that stay bits in the file.

The mask of a binary layer is the initializer that the packed file holds, one bit a weight. The graph takes it apart
(BitwiseAnd, Reshape, Transpose, Cast); runtimes fold that once, when they load the file. So the file is about as small
as the packed file, while the loaded network multiplies floats: it is small, not fast.

- Binary weights and inputs: with s the signs, Where(x >= 0, 1, -1), and e the mask,
  y = (alpha - beta) * Round(Conv(s, e)) + beta * Round(Conv(sum of s over channels, 1)) + bias. Both convolutions are
  whole numbers, so that their rounding changes nothing; it keeps runtimes from multiplying alpha - beta into e, which
  would make the sums inexact, and makes them exact again where a runtime computes a convolution by FFT or Winograd. So
  a layer gives the bits of the packed one wherever multiplication and addition are IEEE float32.
- Binary weights and real inputs: Conv(x, Where(e, alpha, beta)).
- A batch normalisation is the Mul and Add, or the threshold, of the packed file.

What is float in the packed file is float here, half where it is half. Left out: quantized operators (QLinearConv and
such), runtimes' own operators, and running the file (`dabnn.run_onnx`).
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from dabnn.activations import RPReLU
from dabnn.errors import InvalidInputError
from dabnn.exported import INPUT, OUTPUT, describe
from dabnn.layers import BinaryConv2d
from dabnn.models import skeleton
from dabnn.models.blocks import Branches, Chain, RepeatChannels, Shortcut
from dabnn.packed import PackedModel
from dabnn.whole_file import write_whole

# BitwiseAnd came with 18. Files of a newer version would shut out older runtimes for nothing.
OPSET = 18
_IR_VERSION = 8
# Of the metadata: the names of the input and the output of each binary layer, by its path.
LAYERS = "layers"


@dataclass(frozen=True)
class _Value:
    """A tensor of the graph.

    Attributes:
        name: its name.
        shape: (C, H, W), or (C,) after flattening.
        is_sign: whether it holds nothing but +1 and -1.
    """

    name: str
    shape: tuple[int, ...]
    is_sign: bool = False


@dataclass
class _Graph:
    """A graph as it grows; `tensors` are those of the packed file."""

    tensors: Mapping[str, Tensor]
    nodes: list[Any] = field(default_factory=list)
    initializers: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, tuple[str, str]] = field(default_factory=dict)

    def add(self, op: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """Append a node and return the name of its output."""
        from onnx import helper

        output = name or f"_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], **attributes))
        return output

    def constant(self, name: str, array: NDArray[Any]) -> str:
        """Return the name of an initializer, made once a name."""
        from onnx import numpy_helper

        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def ints(self, *values: int) -> str:
        """Return the name of an int64 vector."""
        return self.constant("i" + "_".join(map(str, values)), np.array(values, np.int64))

    def number(self, value: float) -> str:
        """Return the name of a float32 scalar."""
        return self.constant(f"f{value:g}", np.array(value, np.float32))

    def stored(self, name: str, *shape: int) -> str:
        """Return the name of a tensor of the packed file in float32, of `shape` where given."""
        tensor = self.tensors[name]
        array = tensor.contiguous().numpy().reshape(shape or tuple(tensor.shape))
        if array.dtype == np.float32:
            return self.constant(name, array)
        return self.add("Cast", self.constant(f"{name}.half", array), name=name, to=_onnx_type("FLOAT"))

    def per_channel(self, name: str) -> str:
        """Return the name of a vector of the packed file as (C, 1, 1) in float32."""
        return self.stored(name, -1, 1, 1)


def export_onnx(packed: PackedModel, path: Path | str) -> int:
    """Write a packed model as an ONNX file, in one step.

    Input `images` (batch, in_channels, input_size, input_size) float32, normalized; output `logits` (batch,
    num_classes) float32; any batch. The model's metadata say how to prepare images and hold the names of the classes
    (`dabnn.exported`), and, as `layers`, the names of the input and the output of each binary layer by its path.

    Args:
        packed: From `dabnn.packed.pack` or `load_packed`.
        path: The file; an existing one is replaced.

    Returns:
        Size of the file in bytes.

    Raises:
        InvalidInputError: A layer has no form in ONNX, or the folder does not exist.
        DabError: The file cannot be written; no part of it is left.
    """
    return write_whole(Path(path), _model(packed).SerializeToString(deterministic=True))


def _model(packed: PackedModel) -> Any:
    import onnx
    from onnx import helper

    spec = packed.spec
    graph = _Graph(packed.tensors)
    size = (spec.in_channels, spec.input_size, spec.input_size)
    _chain(graph, "", skeleton(**asdict(spec)), _Value(INPUT, size))
    graph.nodes[-1].output[0] = OUTPUT
    described = helper.make_graph(
        graph.nodes,
        spec.name,
        [helper.make_tensor_value_info(INPUT, onnx.TensorProto.FLOAT, ["batch", *size])],
        [helper.make_tensor_value_info(OUTPUT, onnx.TensorProto.FLOAT, ["batch", spec.num_classes])],
        list(graph.initializers.values()),
    )
    opset = helper.make_opsetid("", OPSET)
    model = helper.make_model(described, opset_imports=[opset], ir_version=_IR_VERSION, producer_name="dab")
    helper.set_model_props(model, describe(packed) | {LAYERS: json.dumps(graph.layers)})
    onnx.checker.check_model(model)
    return model


def _onnx_type(name: str) -> int:
    from onnx import TensorProto

    return int(TensorProto.DataType.Value(name))


def _emit(graph: _Graph, path: str, module: nn.Module, x: _Value) -> _Value:
    for kind, rule in _RULES:
        if isinstance(module, kind):
            return rule(graph, path, module, x)
    raise InvalidInputError(
        f"{path}: {type(module).__name__} has no form in ONNX here. Export the packed model instead, or add a rule for "
        "it to dabnn/export_onnx.py."
    )


def _chain(graph: _Graph, path: str, chain: Chain, x: _Value) -> _Value:
    starts = {module.start for module in chain if isinstance(module, Shortcut)}
    kept: dict[str, _Value] = {}
    for name, module in chain.named_children():
        if name in starts:
            kept[name] = x
        inner = f"{path}.{name}" if path else name
        if isinstance(module, Shortcut):
            around = _chain(graph, inner, module, kept[module.start])
            x = _Value(graph.add("Add", x.name, around.name), x.shape)
        else:
            x = _emit(graph, inner, module, x)
    return x


def _branches(graph: _Graph, path: str, branches: Branches, x: _Value) -> _Value:
    made = [_emit(graph, f"{path}.{name}", branch, x) for name, branch in branches.items()]
    shape = (sum(value.shape[0] for value in made), *made[0].shape[1:])
    return _Value(graph.add("Concat", *(value.name for value in made), axis=1), shape)


def _conv(graph: _Graph, path: str, conv: nn.Conv2d, x: _Value) -> _Value:
    if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        raise InvalidInputError(
            f"{path}: padding {conv.padding!r} with {conv.padding_mode} has no form in ONNX here, which takes zeros. "
            "Export the packed model instead."
        )
    quantizer = conv.options.input_quantizer if isinstance(conv, BinaryConv2d) and conv.binary_input else None
    is_binary = f"{path}.weight_bits" in graph.tensors
    if is_binary and quantizer is not None:
        name = _binary_conv(graph, path, conv, x, quantizer)
    else:
        if quantizer is not None:
            x = _Value(_two_valued_input(graph, path, x, quantizer), x.shape)
        weight = _two_valued_weight(graph, path, conv) if is_binary else graph.stored(f"{path}.weight")
        bias = [graph.stored(f"{path}.bias")] if conv.bias is not None else []
        name = graph.add("Conv", x.name, weight, *bias, name=path, **_geometry(conv))
    if is_binary:
        graph.layers[path] = (x.name, name)
    sizes = [
        (size + 2 * int(pad) - dilation * (kernel - 1) - 1) // stride + 1
        for size, pad, dilation, kernel, stride in zip(
            x.shape[1:], conv.padding, conv.dilation, conv.kernel_size, conv.stride, strict=True
        )
    ]
    return _Value(name, (conv.out_channels, *sizes))


def _geometry(conv: nn.Conv2d) -> dict[str, Any]:
    """Return the attributes of a convolution that differ from those that ONNX takes by default."""
    attributes = {
        "pads": [*map(int, conv.padding), *map(int, conv.padding)],
        "strides": list(conv.stride),
        "dilations": list(conv.dilation),
        "group": conv.groups,
    }
    usual: dict[str, Any] = {"pads": [0] * 4, "strides": [1, 1], "dilations": [1, 1], "group": 1}
    return {name: value for name, value in attributes.items() if value != usual[name]}


def _binary_conv(graph: _Graph, path: str, conv: nn.Conv2d, x: _Value, quantizer: str) -> str:
    """Return the name of the convolution of binary inputs, in the order of operations of `PackedConv2d`."""
    real, is_sign = x.name, x.is_sign
    scales = None
    if quantizer == "rsign":
        real = graph.add("Sub", real, graph.per_channel(f"{path}.input_shift"))
    elif quantizer == "two_valued":
        real = _channel_centered(graph, real)
        scales = _scale_and_offset(graph, real, math.prod(x.shape))
    signs = real if is_sign and quantizer == "sign" else _signs(graph, _is_upper(graph, real))
    parts = _BinaryFilters.of(graph, path, conv)
    y = parts.convolve(graph, signs)
    if scales is not None:
        ones = graph.add("Expand", graph.number(1.0), graph.ints(1, *x.shape))
        offset = graph.add("Mul", scales[1], parts.convolve(graph, ones))
        y = graph.add("Add", graph.add("Mul", scales[0], y), offset)
    if conv.bias is not None:
        y = graph.add("Add", y, graph.per_channel(f"{path}.bias"))
    graph.nodes[-1].output[0] = path
    return path


@dataclass(frozen=True)
class _BinaryFilters:
    """The constants of a layer with binary weights and inputs, by their names in the graph."""

    mask: str
    ones: str
    difference: str
    beta: str
    geometry: Mapping[str, Any]

    @classmethod
    def of(cls, graph: _Graph, path: str, conv: nn.Conv2d) -> "_BinaryFilters":
        beta = graph.per_channel(f"{path}.beta")
        difference = graph.add("Sub", graph.per_channel(f"{path}.alpha"), beta)
        mask = graph.add("Cast", _mask(graph, path, conv), to=_onnx_type("FLOAT"))
        height, width = conv.kernel_size
        ones = graph.constant(f"ones{height}x{width}", np.ones((1, 1, height, width), np.float32))
        return cls(mask, ones, difference, beta, _geometry(conv))

    def convolve(self, graph: _Graph, signs: str) -> str:
        selected = graph.add("Round", graph.add("Conv", signs, self.mask, **self.geometry))
        summed = graph.add("ReduceSum", signs, graph.ints(1), keepdims=1)
        total = graph.add("Round", graph.add("Conv", summed, self.ones, **self.geometry))
        return graph.add("Add", graph.add("Mul", self.difference, selected), graph.add("Mul", self.beta, total))


def _mask(graph: _Graph, path: str, conv: nn.Conv2d) -> str:
    """Return the name of the mask (F, C, kh, kw), bool, taken out of its bits."""
    filters, channels, height, width = conv.weight.shape
    bits = graph.tensors[f"{path}.weight_bits"]
    shape = (filters, height, width, channels)
    return _unpacked(graph, f"{path}.weight_bits", bits, shape)


def _unpacked(graph: _Graph, name: str, bits: Tensor, shape: tuple[int, int, int, int]) -> str:
    """Return the name of a bool tensor (F, C, kh, kw) whose bits lie in the order of `shape`, (F, kh, kw, C)."""
    places = graph.constant("places", 2 ** np.arange(8, dtype=np.uint8))
    planes = graph.add("BitwiseAnd", graph.constant(name, bits.numpy().reshape(-1, 1)), places)
    if math.prod(shape) % 8:
        flat = graph.add("Reshape", planes, graph.ints(-1))
        planes = graph.add("Slice", flat, graph.ints(0), graph.ints(math.prod(shape)))
    ordered = graph.add("Cast", graph.add("Reshape", planes, graph.ints(*shape)), to=_onnx_type("BOOL"))
    return graph.add("Transpose", ordered, perm=[0, 3, 1, 2])


def _two_valued_weight(graph: _Graph, path: str, conv: nn.Conv2d) -> str:
    alpha, beta = (graph.stored(f"{path}.{name}", -1, 1, 1, 1) for name in ("alpha", "beta"))
    return graph.add("Where", _mask(graph, path, conv), alpha, beta)


def _is_upper(graph: _Graph, real: str) -> str:
    return graph.add("GreaterOrEqual", real, graph.number(0.0))


def _signs(graph: _Graph, is_upper: str) -> str:
    return graph.add("Where", is_upper, graph.number(1.0), graph.number(-1.0))


def _two_valued_input(graph: _Graph, path: str, x: _Value, quantizer: str) -> str:
    """Return the name of the binary form of an input of a layer with real weights."""
    if quantizer == "sign":
        return x.name if x.is_sign else _signs(graph, _is_upper(graph, x.name))
    if quantizer == "rsign":
        shifted = graph.add("Sub", x.name, graph.per_channel(f"{path}.input_shift"))
        return _signs(graph, _is_upper(graph, shifted))
    real = _channel_centered(graph, x.name)
    return graph.add("Where", _is_upper(graph, real), *_means(graph, real, math.prod(x.shape)))


def _channel_centered(graph: _Graph, x: str) -> str:
    return graph.add("Sub", x, graph.add("ReduceMean", x, graph.ints(1), keepdims=1))


def _means(graph: _Graph, real: str, size: int) -> tuple[str, str]:
    """Return the names of the means (N, 1, 1, 1) of the values from 0 up, and of those below; 0 where none is."""
    is_upper = _is_upper(graph, real)
    zero, axes = graph.number(0.0), graph.ints(1, 2, 3)
    ones = graph.add("ReduceSum", graph.add("Cast", is_upper, to=_onnx_type("FLOAT")), axes, keepdims=1)
    upper = graph.add("ReduceSum", graph.add("Where", is_upper, real, zero), axes, keepdims=1)
    lower = graph.add("ReduceSum", graph.add("Where", is_upper, zero, real), axes, keepdims=1)
    zeros = graph.add("Sub", graph.number(float(size)), ones)
    least = graph.number(1.0)
    return (
        graph.add("Div", upper, graph.add("Max", ones, least)),
        graph.add("Div", lower, graph.add("Max", zeros, least)),
    )


def _scale_and_offset(graph: _Graph, real: str, size: int) -> tuple[str, str]:
    alpha, beta = _means(graph, real, size)
    two = graph.number(2.0)
    return (
        graph.add("Div", graph.add("Sub", alpha, beta), two),
        graph.add("Div", graph.add("Add", alpha, beta), two),
    )


def _norm(graph: _Graph, path: str, _module: nn.BatchNorm2d, x: _Value) -> _Value:
    if f"{path}.threshold" not in graph.tensors:
        scaled = graph.add("Mul", x.name, graph.per_channel(f"{path}.scale"))
        return _Value(graph.add("Add", scaled, graph.per_channel(f"{path}.shift"), name=path), x.shape)
    reached = graph.add("GreaterOrEqual", x.name, graph.per_channel(f"{path}.threshold"))
    falls = graph.tensors[f"{path}.falls_bits"]
    if bool(falls.any()):
        reached = graph.add("Xor", reached, _unpacked(graph, f"{path}.falls_bits", falls, (1, 1, 1, x.shape[0])))
    return _Value(_signs(graph, reached), x.shape, is_sign=True)


def _relu(graph: _Graph, path: str, _module: nn.Module, x: _Value) -> _Value:
    return _Value(graph.add("Relu", x.name, name=path), x.shape)


def _rprelu(graph: _Graph, path: str, _module: RPReLU, x: _Value) -> _Value:
    shifted = graph.add("Sub", x.name, graph.per_channel(f"{path}.shift_in"))
    bent = graph.add("PRelu", shifted, graph.per_channel(f"{path}.slope"))
    return _Value(graph.add("Add", bent, graph.per_channel(f"{path}.shift_out"), name=path), x.shape)


def _pool(graph: _Graph, path: str, pool: nn.MaxPool2d | nn.AvgPool2d, x: _Value) -> _Value:
    """Return a pool whose borders are written out, since programs differ on what a window beyond them holds."""
    kernel, stride, padding = (_pair(value) for value in (pool.kernel_size, pool.stride, pool.padding))
    sides = [_windows(x.shape[1 + i], kernel[i], stride[i], padding[i], pool.ceil_mode) for i in (0, 1)]
    attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": stride}
    ends = [end for _, end in sides]
    is_average = isinstance(pool, nn.AvgPool2d)
    if isinstance(pool, nn.AvgPool2d):
        if pool.divisor_override is not None or (pool.ceil_mode and pool.count_include_pad and any(padding)):
            raise InvalidInputError(
                f"{path}: {pool} has no form in ONNX here. Use ceil_mode=False or count_include_pad=False, without "
                "divisor_override, or export the packed model instead."
            )
        if pool.count_include_pad and any(padding):
            attributes["count_include_pad"], ends = 1, list(padding)
    elif _pair(pool.dilation) != [1, 1] or pool.return_indices:
        raise InvalidInputError(f"{path}: {pool} has no form in ONNX here. Export the packed model instead.")
    name = graph.add("AveragePool" if is_average else "MaxPool", x.name, name=path, pads=padding + ends, **attributes)
    return _Value(name, (x.shape[0], *(number for number, _ in sides)))


def _windows(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> tuple[int, int]:
    """Return how many windows of a pool there are along a side, and the padding at its end that all of them need."""
    room = size + 2 * padding - kernel
    number = (-(-room // stride) if ceil_mode else room // stride) + 1
    if ceil_mode and (number - 1) * stride >= size + padding:
        number -= 1  # torch leaves out a window that starts beyond the image
    return number, max(0, (number - 1) * stride + kernel - size - padding)


def _pair(value: Any) -> list[int]:
    return list(value) if isinstance(value, tuple) else [int(value)] * 2


def _global_average(graph: _Graph, path: str, pool: nn.AdaptiveAvgPool2d, x: _Value) -> _Value:
    if pool.output_size not in (1, (1, 1)):
        raise InvalidInputError(f"{path}: {pool} has no form in ONNX here. Export the packed model instead.")
    return _Value(graph.add("GlobalAveragePool", x.name, name=path), (x.shape[0], 1, 1))


def _flatten(graph: _Graph, path: str, _module: nn.Flatten, x: _Value) -> _Value:
    return _Value(graph.add("Flatten", x.name, name=path), (math.prod(x.shape),))


def _linear(graph: _Graph, path: str, linear: nn.Linear, x: _Value) -> _Value:
    bias = [graph.stored(f"{path}.bias")] if linear.bias is not None else []
    weight = graph.stored(f"{path}.weight")
    return _Value(graph.add("Gemm", x.name, weight, *bias, name=path, transB=1), (linear.out_features,))


def _repeat(graph: _Graph, _path: str, repeat: RepeatChannels, x: _Value) -> _Value:
    times = -(-repeat.num_channels // x.shape[0])
    name = x.name if times == 1 else graph.add("Concat", *[x.name] * times, axis=1)
    if times * x.shape[0] != repeat.num_channels:
        name = graph.add("Slice", name, graph.ints(0), graph.ints(repeat.num_channels), graph.ints(1))
    return _Value(name, (repeat.num_channels, *x.shape[1:]))


def _nothing(_graph: _Graph, _path: str, _module: nn.Module, x: _Value) -> _Value:
    return x


_Rule = Callable[[_Graph, str, Any, _Value], _Value]
_RULES: tuple[tuple[type | tuple[type, ...], _Rule], ...] = (
    (Chain, _chain),
    (Branches, _branches),
    (nn.Conv2d, _conv),
    (nn.BatchNorm2d, _norm),
    (nn.ReLU, _relu),
    (RPReLU, _rprelu),
    ((nn.MaxPool2d, nn.AvgPool2d), _pool),
    (nn.AdaptiveAvgPool2d, _global_average),
    (nn.Flatten, _flatten),
    (nn.Linear, _linear),
    (RepeatChannels, _repeat),
    ((nn.Dropout, nn.Dropout2d, nn.Identity), _nothing),
)
