"""Triton version of `kernels.packing`: signs, or reached thresholds, of an input of any strides as bits.

Two ways through memory: where the channels of a pixel lie side by side (channels-last), a program reads the 32 channels
of each word at once and adds up their bits across threads; elsewhere it reads one channel of a block of pixels after
the other.
"""

# Triton compiles its kernels itself; their arguments have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

import triton
import triton.language as tl
from torch import Tensor

from kernels.packing import WORD_BITS

BLOCK_PIXELS = 128
BLOCK_WORDS = 128


def launch(x: Tensor, bits: Tensor) -> None:
    """Packs the signs of x into bits.

    Args:
        x: (N, C, H, W), a floating type, any strides.
        bits: (N, H, W, ceil(C / 32)) int32 on the same device, contiguous, overwritten.
    """
    _run(x, None, None, bits)


def launch_reached(x: Tensor, threshold: Tensor, falls: Tensor, bits: Tensor) -> None:
    """Packs (x >= threshold) xor falls, each of them by channel, into bits.

    Args:
        x: as in `launch`.
        threshold: (C,) of the type of x.
        falls: (C,) bool.
        bits: as in `launch`.
    """
    _run(x, threshold.contiguous(), falls.contiguous(), bits)


def _run(x: Tensor, threshold: Tensor | None, falls: Tensor | None, bits: Tensor) -> None:
    batch, channels, height, width = x.shape
    if bits.numel() == 0:
        return
    num_pixels, words = batch * height * width, bits.shape[3]
    scalars = (x if threshold is None else threshold, x if falls is None else falls)
    constants = {"HAS_THRESHOLD": threshold is not None, "WORD_BITS": WORD_BITS}
    stride_n, stride_c, stride_h, stride_w = x.stride()
    is_even = stride_h == width * stride_w and stride_n == height * stride_h
    if stride_c == 1 and is_even:
        is_small = x.numel() + num_pixels * stride_w < 2**31
        rows_grid = (triton.cdiv(num_pixels * words, BLOCK_WORDS),)
        _pack_rows_kernel[rows_grid](
            x,
            *scalars,
            bits,
            num_pixels * words,
            channels,
            words,
            stride_w,
            **constants,
            BLOCK_WORDS=BLOCK_WORDS,
            IS_SMALL=is_small,
        )
        return
    planes_grid = (triton.cdiv(num_pixels, BLOCK_PIXELS), words)
    strides = (stride_n, stride_c, stride_h, stride_w)
    _pack_planes_kernel[planes_grid](
        x, *scalars, bits, num_pixels, channels, height, width, words, *strides, **constants, BLOCK_PIXELS=BLOCK_PIXELS
    )


@triton.jit
def _is_reached(value, threshold):
    """Compares in float32 at least, which is exact: Triton's interpreter compares the bits of bfloat16."""
    if value.dtype == tl.float64:
        return value >= threshold
    else:  # noqa: RET505  (Triton takes one return a branch)
        return value.to(tl.float32) >= threshold.to(tl.float32)


@triton.jit
def _pack_rows_kernel(
    x_ptr,
    threshold_ptr,
    falls_ptr,
    bits_ptr,
    num_words,
    channels,
    words,
    stride_w,
    HAS_THRESHOLD: tl.constexpr,  # noqa: N803  (constants of a Triton kernel are upper case)
    WORD_BITS: tl.constexpr,  # noqa: N803
    BLOCK_WORDS: tl.constexpr,  # noqa: N803
    IS_SMALL: tl.constexpr,  # noqa: N803
):
    """A program packs BLOCK_WORDS words, neighbours in the result, from pixels at one distance of each other."""
    place = tl.program_id(0).to(tl.int64) * BLOCK_WORDS + tl.arange(0, BLOCK_WORDS)
    if IS_SMALL:  # a division of 64-bit numbers is a function call
        place = place.to(tl.int32)
    bit = tl.arange(0, WORD_BITS)
    channel = (place % words)[:, None] * WORD_BITS + bit[None, :]
    is_value = (place < num_words)[:, None] & (channel < channels)
    value = tl.load(x_ptr + ((place // words * stride_w)[:, None] + channel), mask=is_value, other=-1.0)
    if HAS_THRESHOLD:
        threshold = tl.load(threshold_ptr + channel, mask=is_value, other=float("inf"))
        ones = _is_reached(value, threshold) ^ (tl.load(falls_ptr + channel, mask=is_value, other=0) != 0)
    else:
        ones = value >= 0
    packed = tl.sum(ones.to(tl.uint32) << bit[None, :].to(tl.uint32), axis=1)
    tl.store(bits_ptr + place, packed.to(tl.uint32).to(tl.int32, bitcast=True), mask=place < num_words)


@triton.jit
def _pack_planes_kernel(
    x_ptr,
    threshold_ptr,
    falls_ptr,
    bits_ptr,
    num_pixels,
    channels,
    height,
    width,
    words,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    HAS_THRESHOLD: tl.constexpr,  # noqa: N803  (constants of a Triton kernel are upper case)
    WORD_BITS: tl.constexpr,  # noqa: N803
    BLOCK_PIXELS: tl.constexpr,  # noqa: N803
):
    """A program packs one word of BLOCK_PIXELS pixels."""
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
        is_channel = channel < channels
        value = tl.load(source + channel.to(tl.int64) * stride_c, mask=is_pixel & is_channel, other=-1.0)
        if HAS_THRESHOLD:
            threshold = tl.load(threshold_ptr + channel, mask=is_channel, other=float("inf"))
            ones = _is_reached(value, threshold) ^ (tl.load(falls_ptr + channel, mask=is_channel, other=0) != 0)
        else:
            ones = value >= 0
        packed |= ones.to(tl.uint32) << bit
    tl.store(bits_ptr + pixel * words + word, packed.to(tl.int32, bitcast=True), mask=is_pixel)
