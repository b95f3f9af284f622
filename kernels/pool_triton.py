"""Triton version of `kernels.pool`: a block of words of the output a program."""

# Triton compiles its kernels itself; their arguments have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256


def launch(
    bits: Tensor, is_and_bits: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], out: Tensor
) -> None:
    """Pools bits into out.

    Args:
        bits: as in `kernels.pool.pool_bits`, and likewise all up to `padding`.
        is_and_bits: see there.
        kernel: see there.
        stride: see there.
        padding: see there.
        out: (N, H', W', words) int32 on the same device, contiguous, overwritten.
    """
    if out.numel() == 0:
        return
    _pool_kernel[(triton.cdiv(out.numel(), BLOCK),)](
        bits.contiguous(),
        is_and_bits.contiguous(),
        out,
        out.numel(),
        *bits.shape[1:3],
        *out.shape[1:3],
        *stride,
        *padding,
        WORDS=bits.shape[3],
        KERNEL_H=kernel[0],
        KERNEL_W=kernel[1],
        BLOCK=BLOCK,
    )


@triton.jit
def _pool_kernel(
    bits_ptr,
    flips_ptr,
    out_ptr,
    num_words,
    height,
    width,
    out_height,
    out_width,
    stride_h,
    stride_w,
    padding_h,
    padding_w,
    WORDS: tl.constexpr,  # noqa: N803  (constants of a Triton kernel are upper case)
    KERNEL_H: tl.constexpr,  # noqa: N803
    KERNEL_W: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_word = place < num_words
    word = place % WORDS
    pixel = place // WORDS
    left = pixel % out_width * stride_w - padding_w
    top = pixel // out_width % out_height * stride_h - padding_h
    image = pixel // (out_width * out_height)
    flips = tl.load(flips_ptr + word, mask=is_word, other=0)
    packed = tl.full((BLOCK,), 0, dtype=tl.int32)
    for tap_h in range(KERNEL_H):
        for tap_w in range(KERNEL_W):
            row, column = top + tap_h, left + tap_w
            is_inside = is_word & (row >= 0) & (row < height) & (column >= 0) & (column < width)
            source = ((image * height + row) * width + column) * WORDS + word
            bits = tl.load(bits_ptr + source, mask=is_inside, other=0)
            packed |= tl.where(is_inside, bits ^ flips, 0)
    tl.store(out_ptr + place, packed ^ flips, mask=is_word)
