"""The convolution of a packed model: sign inputs and two-valued filters, both held as bits."""

from typing import TypedDict

import torch
from torch import Tensor, nn

from dabnn.activations import input_code
from dabnn.errors import InvalidInputError
from dabnn.layers import BinaryConv2d, has_packed_form
from kernels import pack_signs, packed_conv2d, packed_conv2d_signs
from kernels.conv import DTYPES


class _Window(TypedDict):
    in_channels: int
    stride: tuple[int, int]
    padding: tuple[int, int]


class PackedConv2d(nn.Module):
    """A convolution of sign inputs with two-valued filters held as bits, for inference only.

    Computes what `dabnn.layers.BinaryConv2d` computes in evaluation, operation for operation, on packed bits (see
    `kernels.packed_conv2d`), for every input quantizer. Input (N, C, H, W) of any floating type, output (N, F, H', W')
    in that type. Where inputs are plain signs they may also come packed, (N, H, W, ceil(C / 32)) int32; after `emit`
    the output is the packed signs of the values, (N, H', W', ceil(F / 32)) int32.

    Attributes:
        weight_bits: (F, kh, kw, ceil(C / 32)) int32.
        alpha: (F,) float32.
        beta: (F,) float32.
        bias: (F,) float32, or None.
        input_shift: (C,) float32 with rsign inputs, else None.
        threshold: (F,) float32, of the signs that `emit` asked for, else None.
        falls: (F,) bool, likewise.
        dtype: of the output where the input comes packed; rounded once, at the end.
    """

    weight_bits: Tensor
    alpha: Tensor
    beta: Tensor
    bias: Tensor | None
    input_shift: Tensor | None
    threshold: Tensor | None
    falls: Tensor | None

    def __init__(self, layer: BinaryConv2d, mask: Tensor, alpha: Tensor, beta: Tensor) -> None:
        """Take geometry and bias from `layer`, the filters from mask (F, C, kh, kw), alpha (F,) and beta (F,)."""
        super().__init__()
        if not has_packed_form(layer):
            raise InvalidInputError(
                f"binarize.inputs: a layer with groups={layer.groups}, dilation={layer.dilation} and padding "
                f"{layer.padding_mode} has no packed form, which takes groups 1, dilation 1 and zeros. "
                "Give that layer real inputs."
            )
        self.in_channels = layer.in_channels
        self.stride = (layer.stride[0], layer.stride[1])
        self.padding = (int(layer.padding[0]), int(layer.padding[1]))
        self.register_buffer("weight_bits", pack_signs(torch.where(mask, 1.0, -1.0)))
        self.register_buffer("alpha", alpha)
        self.register_buffer("beta", beta)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        self.register_buffer("input_shift", None if layer.input_shift is None else layer.input_shift.detach())
        self.input_quantizer = layer.options.input_quantizer
        self.register_buffer("threshold", None)
        self.register_buffer("falls", None)
        self.dtype = torch.float32

    def emit(self, threshold: Tensor, falls: Tensor) -> None:
        """Return packed signs from now on: bit f of a value y is (y >= threshold[f]) xor falls[f], both (F,)."""
        self.threshold, self.falls = threshold, falls

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of the binary form of x (N, C, H, W), or of packed signs."""
        if x.dtype == torch.int32:
            return self._convolve_bits(x, self.bias, self.dtype)
        code = input_code(x.float(), self.input_quantizer, self.input_shift)
        if code.scale is None or code.offset is None:
            return self._convolve(code.real, self.bias, x.dtype)
        y = code.scale * self._convolve(code.real, None)
        y = y + code.offset * self._convolve(torch.ones_like(code.real[:1]), None)
        return (y if self.bias is None else y + self.bias.view(-1, 1, 1)).to(x.dtype)

    def _convolve(self, x: Tensor, bias: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._convolve_bits(pack_signs(x), bias, dtype)

    def _convolve_bits(self, bits: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return the values in `dtype`, or the signs that `emit` asked for."""
        filters = (bits, self.weight_bits, self.alpha, self.beta, bias)
        window: _Window = {"in_channels": self.in_channels, "stride": self.stride, "padding": self.padding}
        if self.threshold is None or self.falls is None:
            values = dtype if dtype in DTYPES else torch.float32
            return packed_conv2d(*filters, **window, dtype=values).to(dtype)
        return packed_conv2d_signs(*filters, self.threshold, self.falls, **window)
