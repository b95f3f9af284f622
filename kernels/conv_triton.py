"""Triton version of `kernels.conv.packed_conv2d`: a block of output pixels by a block of filters a program.

The portable GPU path: ordinary integer instructions, which LLVM turns into one `popc` a word, and the same source
runs in Triton's interpreter. A popcount is far slower than a tensor core's 1-bit product, so this path is exact but
not a speed-up.
"""

# Triton compiles its kernels itself; their arguments have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from kernels.packing import WORD_BITS

BLOCK_PIXELS = 64
BLOCK_FILTERS = 32


def launch(
    bits: Tensor,
    weight_bits: Tensor,
    alpha: Tensor,
    beta: Tensor,
    bias: Tensor | None,
    in_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    out: Tensor,
) -> None:
    """Writes the convolution into out.

    Args:
        bits: as in `kernels.conv.packed_conv2d`, and likewise all up to `padding`.
        weight_bits: see there.
        alpha: see there.
        beta: see there.
        bias: see there.
        in_channels: see there.
        stride: (vertical, horizontal).
        padding: (vertical, horizontal).
        out: (N, F, H', W') float32, contiguous, overwritten.
    """
    if out.numel() == 0:
        return
    num_filters, kernel_h, kernel_w, words = weight_bits.shape
    num_pixels = out.numel() // num_filters
    grid = (triton.cdiv(num_pixels, BLOCK_PIXELS), triton.cdiv(num_filters, BLOCK_FILTERS))
    last_channels = in_channels - (words - 1) * WORD_BITS
    _conv_kernel[grid](
        bits.contiguous(),
        weight_bits.contiguous(),
        (alpha - beta).contiguous(),
        beta.contiguous(),
        beta if bias is None else bias.contiguous(),
        out,
        num_pixels,
        num_filters,
        in_channels,
        bits.shape[1],
        bits.shape[2],
        out.shape[2],
        out.shape[3],
        *stride,
        *padding,
        kernel_h,
        kernel_w,
        words,
        TAIL=-1 if last_channels == WORD_BITS else (1 << last_channels) - 1,
        HAS_BIAS=bias is not None,
        BLOCK_PIXELS=BLOCK_PIXELS,
        BLOCK_FILTERS=BLOCK_FILTERS,
        enable_fp_fusion=False,  # a fused multiply-add would round once where the float path rounds twice
    )


@triton.jit
def _popcount(word):
    """Ones in each 32-bit word by adding neighbouring fields of 1, 2 and 4 bits, then the four bytes by one product."""
    word = word.to(tl.uint32, bitcast=True)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def _conv_kernel(
    bits_ptr,
    weight_ptr,
    scale_ptr,
    beta_ptr,
    bias_ptr,
    out_ptr,
    num_pixels,
    num_filters,
    in_channels,
    height,
    width,
    out_height,
    out_width,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    kernel_h,
    kernel_w,
    words,
    TAIL: tl.constexpr,  # noqa: N803  (constants of a Triton kernel are upper case)
    HAS_BIAS: tl.constexpr,  # noqa: N803
    BLOCK_PIXELS: tl.constexpr,  # noqa: N803
    BLOCK_FILTERS: tl.constexpr,  # noqa: N803
):
    pixel = tl.program_id(0).to(tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    feature = tl.program_id(1) * BLOCK_FILTERS + tl.arange(0, BLOCK_FILTERS)
    is_pixel = pixel < num_pixels
    is_feature = feature < num_filters
    image = pixel // (out_height * out_width)
    top = (pixel // out_width % out_height) * stride_h - pad_h
    left = (pixel % out_width) * stride_w - pad_w

    # A tap inside the image adds 2 * popc(b & e) - popc(e) to E and 2 * popc(b) - channels to S, others nothing.
    # tl.full and not tl.zeros, a jitted function: interpreted or not is settled when triton loads.
    selected = tl.full((BLOCK_PIXELS, BLOCK_FILTERS), 0, dtype=tl.int32)
    total = tl.full((BLOCK_PIXELS,), 0, dtype=tl.int32)
    for tap in range(kernel_h * kernel_w):
        row = top + tap // kernel_w
        column = left + tap % kernel_w
        is_valid = is_pixel & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        source = bits_ptr + ((image * height + row) * width + column) * words
        weights = weight_ptr + (feature.to(tl.int64) * kernel_h * kernel_w + tap) * words
        total -= tl.where(is_valid, in_channels, 0)
        for word in range(words):
            channels = tl.where(word == words - 1, TAIL, -1)
            signs = tl.load(source + word, mask=is_valid, other=0) & channels
            mask = tl.load(weights + word, mask=is_feature, other=0) & channels
            total += 2 * _popcount(signs)
            selected += 2 * _popcount(signs[:, None] & mask[None, :])
            selected -= tl.where(is_valid[:, None], _popcount(mask)[None, :], 0)

    beta = tl.load(beta_ptr + feature, mask=is_feature, other=0.0)
    scale = tl.load(scale_ptr + feature, mask=is_feature, other=0.0)
    result = scale[None, :] * selected.to(tl.float32) + beta[None, :] * total.to(tl.float32)[:, None]
    if HAS_BIAS:
        result += tl.load(bias_ptr + feature, mask=is_feature, other=0.0)[None, :]
    plane = out_height * out_width
    target = out_ptr + (image * num_filters * plane + pixel % plane)[:, None] + feature.to(tl.int64)[None, :] * plane
    tl.store(target, result, mask=is_pixel[:, None] & is_feature[None, :])
