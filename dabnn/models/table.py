"""What a model costs: its layers numbered as plans count them, operations, and bytes as float and as packed file."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dabnn.layers import BinaryConv2d
from dabnn.models.blocks import Chain
from dabnn.models.folding import sign_norms
from dabnn.models.network import ModelSpec, Network
from dabnn.models.zoo import build, find, real_stages
from dabnn.plans import numbered_convs

FLOAT_BYTES = 4
SCALAR_BYTES_PER_FILTER = 2 * FLOAT_BYTES
WORD_BITS = 32
# Factor on the channels of a network that is run for its positions alone, which do not depend on them. A run without
# data, on torch's device meta, imports torch's compiler, which takes 2 s.
_THIN = 1 / 64


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
        float_bytes: weights and bias in float32.
        packed_bytes: the same in the packed file.
        xnor_word_ops: operations on packed words for one image with XNOR weights, where weights and inputs are binary,
            else 0. For an output position with W words a filter, kh kw ceil(C / 32): xor, popcount and add a word and
            filter, and a product a filter, F (3 W + 1).
        dab_word_ops: what DAB weights add to that: the sum of the inputs, popcount and add a word, once for all filters
            of the position, and one multiply-add a filter: 2 W + F.
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
    float_bytes: int
    packed_bytes: int
    xnor_word_ops: int
    dab_word_ops: int


@dataclass(frozen=True)
class ModelTable:
    """A model and its layers.

    Attributes:
        name: model name.
        family: architecture that it is a variant of.
        variant: float, wbin, fbin, hybrid, hybridv2 or hybridv3.
        block: order of the blocks: reference or bireal.
        input_shape: channels, height, width of an image.
        num_params: number of parameters.
        layers: its convolutions in order.
        float_bytes: parameters and BN statistics in float32, without what only a quantizer keeps.
        packed_bytes: tensors of the packed file: a bit a binary weight (whole bytes a layer), two float32 scalars a
            binary filter, BN folded to two float32 a channel (one and a bit before a sign), all else in float32.
        dab_extra: word operations that DAB adds to XNOR's, as a share of them, over all layers; None without such
            layers.
    """

    name: str
    family: str
    variant: str
    block: str
    input_shape: tuple[int, int, int]
    num_params: int
    layers: tuple[LayerRow, ...]
    float_bytes: int
    packed_bytes: int
    dab_extra: float | None


def describe(net: Network) -> ModelTable:
    """Return the table of a network from `build`, without running it."""
    spec = net.spec
    family, variant = find(spec.name)
    maps = _output_sizes(spec)
    rows = tuple(_row(index, path, conv, maps[index]) for index, (path, conv) in numbered_convs(net).items())
    xnor = sum(row.xnor_word_ops for row in rows)
    return ModelTable(
        name=spec.name,
        family=family.name,
        variant=variant.kind.value,
        block=spec.block,
        input_shape=(spec.in_channels, spec.input_size, spec.input_size),
        num_params=_num_elements(net.parameters()),
        layers=rows,
        float_bytes=float_bytes(net),
        packed_bytes=float_bytes(net) - sum(row.float_bytes - row.packed_bytes for row in rows) - _folded_away(net),
        dab_extra=sum(row.dab_word_ops for row in rows) / xnor if xnor else None,
    )


def outline(name: str, **options: Any) -> ModelTable:
    """Return the table of the network that `build(name, **options)` would return, without its memory."""
    return describe(skeleton(name, **options))


def skeleton(name: str, **options: Any) -> Network:
    """Return the network that `build(name, **options)` would return on torch's device meta: shapes without memory."""
    with torch.device("meta"):
        return build(name, **options)


def float_bytes(net: nn.Module) -> int:
    """Return the bytes of parameters and BN statistics in float32, without what only a quantizer keeps."""
    everything = _num_elements(net.parameters()) + _num_elements(_float_buffers(net))
    return FLOAT_BYTES * (everything - _num_elements(_quantizer_state(net)))


def _row(index: int, path: str, conv: nn.Conv2d, output_size: int) -> LayerRow:
    binary_weights = _has_binary_weights(conv)
    binary_inputs = isinstance(conv, BinaryConv2d) and conv.binary_input
    macs = conv.weight.numel() * output_size
    filters, channels, height, width = conv.weight.shape
    has_words = binary_weights and binary_inputs
    words = height * width * math.ceil(channels / WORD_BITS)
    layer_bytes = FLOAT_BYTES * (conv.weight.numel() + (0 if conv.bias is None else filters))
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
        bit_ops=macs if has_words else 0,
        float_bytes=layer_bytes,
        packed_bytes=layer_bytes - (saved_bytes(conv) if binary_weights else 0),
        xnor_word_ops=output_size * filters * (3 * words + 1) if has_words else 0,
        dab_word_ops=output_size * (2 * words * conv.groups + filters) if has_words else 0,
    )


def _has_binary_weights(conv: nn.Conv2d) -> bool:
    return isinstance(conv, BinaryConv2d) and conv.weight_quantizer is not None


def saved_bytes(conv: nn.Conv2d) -> int:
    """Return how many bytes fewer the packed file has for binary weights of this layer than for float32 ones."""
    num_weights = conv.weight.numel()
    packed = -(-num_weights // 8) + SCALAR_BYTES_PER_FILTER * conv.out_channels
    return FLOAT_BYTES * num_weights - packed


def _folded_away(net: nn.Module) -> int:
    """Return the bytes by which folding (`dabnn.models.folding`) makes the BN of a packed file smaller."""
    signs = sign_norms(net)
    saved = 0
    for path, norm in net.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            channels = norm.num_features
            folded = FLOAT_BYTES * channels + math.ceil(channels / 8) if path in signs else 2 * FLOAT_BYTES * channels
            saved += FLOAT_BYTES * channels * (4 if norm.affine else 2) - folded
    return saved


def _quantizer_state(net: nn.Module) -> list[Tensor]:
    """Return what layers keep for their quantizer alone: learned values, starts of searches."""
    kept = [(m.alpha, m.beta, m.threshold) for m in net.modules() if isinstance(m, BinaryConv2d)]
    return [tensor for tensors in kept for tensor in tensors if tensor is not None]


def _float_buffers(net: nn.Module) -> list[Tensor]:
    """Return the BN statistics; BN's step counter is left out, since no evaluation reads it."""
    return [buffer for buffer in net.buffers() if buffer.is_floating_point()]


def _num_elements(tensors: Any) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _output_sizes(spec: ModelSpec) -> dict[int, int]:
    """Return {number: output positions of that convolution}, found by a run of a thin copy of the real network."""
    sizes: dict[int, int] = {}
    body = Chain(real_stages(replace(spec, width=_THIN))).eval()
    for index, (_, conv) in numbered_convs(body).items():
        conv.register_forward_hook(lambda _, __, output, index=index: sizes.update({index: output[0, 0].numel()}))
    with torch.inference_mode():
        body(torch.zeros(1, spec.in_channels, spec.input_size, spec.input_size))
    return sizes
