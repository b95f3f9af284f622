"""The convolution of a packed model whose inputs are real: two-valued filters held as bits, in memory too."""

import numpy as np
import torch
from torch import Tensor, nn

from dabnn.errors import InvalidInputError
from dabnn.layers import BinaryConv2d
from kernels import packed_weight_conv2d
from kernels.packing import WORD_BITS


class PackedWeightConv2d(nn.Module):
    """A convolution of real inputs with two-valued filters held as bits, for inference only.

    Computes what `dabnn.layers.BinaryConv2d` with real inputs computes in evaluation, within the rounding bound of
    `kernels.weight_only`. Input (N, C, H, W) of any floating type, output (N, F, H', W') in that type.

    Attributes:
        weight_bits: (F, kh, kw, ceil(C / groups / 32)) int32.
        alpha: (F,) float32.
        beta: (F,) float32.
        bias: (F,) float32, or None.
    """

    weight_bits: Tensor
    alpha: Tensor
    beta: Tensor
    bias: Tensor | None

    def __init__(self, layer: BinaryConv2d, mask: Tensor, alpha: Tensor, beta: Tensor) -> None:
        """Take geometry and bias from `layer`, the filters from mask (F, C / groups, kh, kw), alpha (F,), beta (F,)."""
        super().__init__()
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            raise InvalidInputError(
                f"weights: bits are for layers padded by a number of zeros; this one has padding {layer.padding} of "
                f"mode {layer.padding_mode}. Load the model with weights=dense."
            )
        self.stride = (layer.stride[0], layer.stride[1])
        self.padding = (layer.padding[0], layer.padding[1])
        self.dilation = (layer.dilation[0], layer.dilation[1])
        self.groups = layer.groups
        self.register_buffer("weight_bits", _words(mask))
        self.register_buffer("alpha", alpha)
        self.register_buffer("beta", beta)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of x (N, C, H, W)."""
        return packed_weight_conv2d(
            x,
            self.weight_bits,
            self.alpha,
            self.beta,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )

    def extra_repr(self) -> str:
        """Return the layer's geometry."""
        filters, height, width, words = self.weight_bits.shape
        return (
            f"{filters} filters of {height}x{width}x{words} words, stride={self.stride}, padding={self.padding}, "
            f"dilation={self.dilation}, groups={self.groups}"
        )


def _words(mask: Tensor) -> Tensor:
    """Return what `pack_signs` makes of the mask (F, C, kh, kw), at a byte a weight in between."""
    ordered = mask.permute(0, 2, 3, 1).numpy()
    missing = -ordered.shape[3] % WORD_BITS
    padded = np.pad(ordered, ((0, 0), (0, 0), (0, 0), (0, missing))) if missing else ordered
    return torch.from_numpy(np.packbits(padded, axis=3, bitorder="little")).view(torch.int32)
