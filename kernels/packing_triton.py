"""Triton version of `kernels.packing.pack_signs`: a block of pixels and one word a program, input of any strides."""

# Triton compiles its kernels itself; their arguments have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from kernels.packing import WORD_BITS

BLOCK_PIXELS = 128


def launch(x: Tensor, bits: Tensor) -> None:
    """Packs the signs of x into bits.

    Args:
        x: (N, C, H, W), a floating type, any strides.
        bits: (N, H, W, ceil(C / 32)) int32 on the same device, contiguous, overwritten.
    """
    batch, channels, height, width = x.shape
    num_pixels = batch * height * width
    if bits.numel() == 0:
        return
    grid = (triton.cdiv(num_pixels, BLOCK_PIXELS), bits.shape[3])
    _pack_kernel[grid](
        x, bits, num_pixels, channels, height, width, *x.stride(), WORD_BITS=WORD_BITS, BLOCK_PIXELS=BLOCK_PIXELS
    )


@triton.jit
def _pack_kernel(
    x_ptr,
    bits_ptr,
    num_pixels,
    channels,
    height,
    width,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    WORD_BITS: tl.constexpr,  # noqa: N803  (constants of a Triton kernel are upper case)
    BLOCK_PIXELS: tl.constexpr,  # noqa: N803
):
    pixel = tl.program_id(0).to(tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    word = tl.program_id(1)
    is_pixel = pixel < num_pixels
    column = pixel % width
    row = pixel // width % height
    image = pixel // (width * height)
    source = x_ptr + image * stride_n + row * stride_h + column * stride_w
    packed = tl.full((BLOCK_PIXELS,), 0, dtype=tl.uint32)
    for bit in range(WORD_BITS):
        channel = word * WORD_BITS + bit
        value = tl.load(source + channel.to(tl.int64) * stride_c, mask=is_pixel & (channel < channels), other=-1.0)
        packed |= (value >= 0).to(tl.uint32) << bit
    tl.store(bits_ptr + pixel * tl.num_programs(1) + word, packed.to(tl.int32, bitcast=True), mask=is_pixel)
