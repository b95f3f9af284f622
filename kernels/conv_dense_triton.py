"""The dense way of a packed convolution on a GPU: unpack, let cuDNN convolve, finish in one kernel.

Bits become +1 and -1 in float16, or in float32 (TF32 on the tensor cores, where torch is allowed it) when a window has
more than 2,048 taps, beyond which float16 cannot hold their sum. One more filter of ones gives S beside every E. All
terms are whole numbers, which a convolution that multiplies and adds gives exactly; tensors are channels-last, the
layout in which cuDNN does just that on its tensor cores and knows no Winograd transformation, whose thirds and sixths
would round. `kernels.gpu_path` says where this way is taken.
"""

# Triton compiles its kernels itself; their arguments have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.conv_layer import Filters, Geometry
from kernels.packing import WORD_BITS, unpack_signs

BLOCK_PIXELS = 32
BLOCK_FILTERS = 32
# Sums up to this magnitude are exact in float16.
MAX_HALF = 2048
# cuDNN's tensor-core convolutions take channels in eights.
CHANNEL_STEP = 8


def masks(weight_bits: Tensor, geometry: Geometry) -> Tensor:
    """Returns the filters e as 1 and 0, one filter of ones, and zeros up to a multiple of eight filters.

    Args:
        weight_bits: (F, kh, kw, words) int32.
        geometry: The layer.

    Returns:
        (filters, C, kh, kw) float16 or float32, channels-last.
    """
    ones = (unpack_signs(weight_bits, geometry.channels) + 1) / 2
    filters = -(-(geometry.filters + 1) // CHANNEL_STEP) * CHANNEL_STEP
    dense = ones.new_zeros((filters, *ones.shape[1:]))
    dense[: geometry.filters] = ones
    dense[geometry.filters] = 1
    return dense.to(_dtype(geometry), memory_format=torch.channels_last)


def launch(bits: Tensor, dense: Tensor, filters: Filters, geometry: Geometry, out: Tensor) -> None:
    """Writes the convolution, or the signs of it, into out.

    Args:
        bits: (N, H, W, words) int32, contiguous.
        dense: From `masks`.
        filters: The filters.
        geometry: The layer.
        out: (N, H', W', F) of a floating type, or (N, H', W', ceil(F / 32)) int32 of packed results; contiguous,
            overwritten.
    """
    g = geometry
    signs = bits.new_empty((bits.shape[0], g.height, g.width, g.channels), dtype=dense.dtype)
    num_pixels = signs[..., 0].numel()
    _unpack_kernel[(triton.cdiv(num_pixels, BLOCK_PIXELS), g.words)](
        bits, signs, num_pixels, g.channels, g.words, WORD_BITS=WORD_BITS, BLOCK_PIXELS=BLOCK_PIXELS
    )
    with torch.autocast(bits.device.type, enabled=False):
        sums = F.conv2d(signs.permute(0, 3, 1, 2), dense, stride=(g.stride_h, g.stride_w), padding=(g.pad_h, g.pad_w))
    rows = sums.permute(0, 2, 3, 1).contiguous()
    num_pixels = rows[..., 0].numel()
    f = filters
    _finish_kernel[(triton.cdiv(num_pixels, BLOCK_PIXELS), triton.cdiv(g.filters, BLOCK_FILTERS))](
        rows,
        f.alpha.contiguous(),
        f.beta.contiguous(),
        f.beta if f.bias is None else f.bias.contiguous(),
        f.beta if f.threshold is None else f.threshold.contiguous(),
        f.beta if f.falls is None else f.falls.contiguous(),
        out,
        num_pixels,
        g.filters,
        rows.shape[3],
        g.out_words,
        HAS_BIAS=f.bias is not None,
        IS_PACKED=f.threshold is not None,
        BLOCK_PIXELS=BLOCK_PIXELS,
        BLOCK_FILTERS=BLOCK_FILTERS,
        enable_fp_fusion=False,  # a fused multiply-add would round once where the float path rounds twice
    )


def _dtype(geometry: Geometry) -> torch.dtype:
    return torch.float16 if geometry.taps * geometry.channels <= MAX_HALF else torch.float32


@triton.jit
def _unpack_kernel(
    bits_ptr,
    signs_ptr,
    num_pixels,
    channels,
    words,
    WORD_BITS: tl.constexpr,  # noqa: N803  (constants of a Triton kernel are upper case)
    BLOCK_PIXELS: tl.constexpr,  # noqa: N803
):
    pixel = tl.program_id(0).to(tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    bit = tl.arange(0, WORD_BITS)
    channel = tl.program_id(1) * WORD_BITS + bit
    word = tl.load(bits_ptr + pixel * words + tl.program_id(1), mask=pixel < num_pixels, other=0)
    signs = 2 * ((word[:, None] >> bit[None, :]) & 1) - 1
    place = signs_ptr + pixel[:, None] * channels + channel[None, :]
    is_value = (pixel < num_pixels)[:, None] & (channel < channels)[None, :]
    tl.store(place, signs.to(signs_ptr.dtype.element_ty), mask=is_value)


@triton.jit
def _finish_kernel(
    sums_ptr,
    alpha_ptr,
    beta_ptr,
    bias_ptr,
    threshold_ptr,
    falls_ptr,
    out_ptr,
    num_pixels,
    num_filters,
    num_sums,
    out_words,
    HAS_BIAS: tl.constexpr,  # noqa: N803  (constants of a Triton kernel are upper case)
    IS_PACKED: tl.constexpr,  # noqa: N803
    BLOCK_PIXELS: tl.constexpr,  # noqa: N803
    BLOCK_FILTERS: tl.constexpr,  # noqa: N803
):
    pixel = tl.program_id(0).to(tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    feature = tl.program_id(1) * BLOCK_FILTERS + tl.arange(0, BLOCK_FILTERS)
    is_pixel = pixel < num_pixels
    is_feature = feature < num_filters
    both = is_pixel[:, None] & is_feature[None, :]
    source = sums_ptr + pixel * num_sums
    selected = tl.load(source[:, None] + feature[None, :], mask=both, other=0.0).to(tl.float32)
    total = tl.load(source + num_filters, mask=is_pixel, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + feature, mask=is_feature, other=0.0)
    scale = tl.load(alpha_ptr + feature, mask=is_feature, other=0.0) - beta
    result = scale[None, :] * selected + beta[None, :] * total[:, None]
    if HAS_BIAS:
        result += tl.load(bias_ptr + feature, mask=is_feature, other=0.0)[None, :]
    if IS_PACKED:
        threshold = tl.load(threshold_ptr + feature, mask=is_feature, other=float("inf"))
        falls = tl.load(falls_ptr + feature, mask=is_feature, other=0) != 0
        ones = ((result >= threshold[None, :]) ^ falls[None, :]).to(tl.uint32)
        packed = tl.sum(ones << tl.arange(0, BLOCK_FILTERS)[None, :].to(tl.uint32), axis=1)
        place = out_ptr + pixel * out_words + tl.program_id(1)
        tl.store(place, packed.to(tl.uint32).to(tl.int32, bitcast=True), mask=is_pixel)
    else:
        place = out_ptr + pixel[:, None] * num_filters + feature[None, :]
        tl.store(place, result.to(out_ptr.dtype.element_ty), mask=both)
