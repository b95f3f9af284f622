"""What a model costs: its layers numbered as plans count them, operations, and bytes as float and as packed file."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dabnn.layers import BinaryConv2d
from dabnn.models.blocks import Chain
from dabnn.models.network import ModelSpec, Network
from dabnn.models.zoo import find, real_stages
from dabnn.plans import numbered_convs

FLOAT_BYTES = 4
SCALAR_BYTES_PER_FILTER = 2 * FLOAT_BYTES


@dataclass(frozen=True)
class LayerRow:
    """One convolution.

    Attributes:
        index: number as bin_start and bin_end count.
        path: name inside the network.
        kind: kind of module; always conv2d so far.
        in_channels: input channels.
        out_channels: filters.
        kernel: height, width.
        stride: vertical, horizontal.
        padding: vertical, horizontal.
        binary_weights: whether the weights have two values.
        binary_inputs: whether the input passes through sign.
        macs: multiply-accumulates for one image.
        weight_bits: bits a weight takes in the packed file: 1 or 32.
        bit_ops: of the macs, those of one bit with one bit: all where weights and inputs are binary, else 0.
    """

    index: int
    path: str
    kind: str
    in_channels: int
    out_channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    binary_weights: bool
    binary_inputs: bool
    macs: int
    weight_bits: int
    bit_ops: int


@dataclass(frozen=True)
class ModelTable:
    """A model and its layers.

    Attributes:
        name: model name.
        family: architecture that it is a variant of.
        variant: float, wbin, fbin, hybrid or hybridv2.
        input_shape: channels, height, width of an image.
        num_params: number of parameters.
        layers: its convolutions in order.
        float_bytes: parameters and BN statistics in float32.
        packed_bytes: tensors of the packed file: a bit a binary weight (padded to whole bytes a filter), two float32
            scalars a binary filter, everything else in float32.
    """

    name: str
    family: str
    variant: str
    input_shape: tuple[int, int, int]
    num_params: int
    layers: tuple[LayerRow, ...]
    float_bytes: int
    packed_bytes: int


def describe(net: Network) -> ModelTable:
    """Return the table of a network from `build`, without running it."""
    spec = net.spec
    family, variant = find(spec.name)
    maps = _output_sizes(spec)
    convs = numbered_convs(net)
    float_bytes = FLOAT_BYTES * (_num_elements(net.parameters()) + _num_elements(_float_buffers(net)))
    saved = sum(saved_bytes(conv) for _, conv in convs.values() if _has_binary_weights(conv))
    return ModelTable(
        name=spec.name,
        family=family.name,
        variant=variant.kind.value,
        input_shape=(spec.in_channels, spec.input_size, spec.input_size),
        num_params=_num_elements(net.parameters()),
        layers=tuple(_row(index, path, conv, maps[index]) for index, (path, conv) in convs.items()),
        float_bytes=float_bytes,
        packed_bytes=float_bytes - saved,
    )


def _row(index: int, path: str, conv: nn.Conv2d, output_size: int) -> LayerRow:
    binary_weights = _has_binary_weights(conv)
    binary_inputs = isinstance(conv, BinaryConv2d) and conv.binary_input
    macs = conv.weight.numel() * output_size
    return LayerRow(
        index=index,
        path=path,
        kind="conv2d",
        in_channels=conv.in_channels,
        out_channels=conv.out_channels,
        kernel=conv.kernel_size,
        stride=conv.stride,
        padding=tuple(conv.padding),  # type: ignore[arg-type] # a string only for padding="same", which no model has
        binary_weights=binary_weights,
        binary_inputs=binary_inputs,
        macs=macs,
        weight_bits=1 if binary_weights else 8 * FLOAT_BYTES,
        bit_ops=macs if binary_weights and binary_inputs else 0,
    )


def _has_binary_weights(conv: nn.Conv2d) -> bool:
    return isinstance(conv, BinaryConv2d) and conv.weight_quantizer is not None


def saved_bytes(conv: nn.Conv2d) -> int:
    """Return how many bytes fewer the packed file has for binary weights of this layer than for float32 ones."""
    num_weights = conv.weight.numel()
    packed = -(-num_weights // 8) + SCALAR_BYTES_PER_FILTER * conv.out_channels
    return FLOAT_BYTES * num_weights - packed


def _float_buffers(net: nn.Module) -> list[Tensor]:
    """Return the BN statistics; BN's step counter is left out, since no evaluation reads it."""
    return [buffer for buffer in net.buffers() if buffer.is_floating_point()]


def _num_elements(tensors: Any) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _output_sizes(spec: ModelSpec) -> dict[int, int]:
    """Return {number: output positions of that convolution} from a pass over shapes alone, without data."""
    sizes: dict[int, int] = {}
    with torch.device("meta"), torch.no_grad():
        body = Chain(real_stages(spec)).eval()
        for index, (_, conv) in numbered_convs(body).items():
            conv.register_forward_hook(lambda _, __, output, index=index: sizes.update({index: output[0, 0].numel()}))
        body(torch.empty(1, spec.in_channels, spec.input_size, spec.input_size))
    return sizes
