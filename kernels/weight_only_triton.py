"""Triton version of `kernels.weight_only`: bits become zeros and ones in registers, and those an operand of `tl.dot`.

An implicit matrix product: the weights are the left operand, unpacked from one word a filter and 32 channels; the
inputs are the right one, gathered tap by tap. Zeros and ones are exact in every type. A float32 input is the sum of
three bfloat16 numbers of 8 bits each, so that three products of tensor cores give what float32 holds. Ordinary Triton:
the same source for CUDA, AMD and the interpreter.

Not measured yet: there was no GPU at hand.
"""

# Triton compiles its kernels itself; their arguments have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.derived import derived

# Programs that fill a large GPU; with fewer of them smaller blocks of filters run on more of it.
_PROGRAMS = 132


def launch(
    x: Tensor,
    weight_bits: Tensor,
    alpha: Tensor,
    beta: Tensor,
    bias: Tensor | None,
    steps: Sequence[int],
    groups: int,
    out: Tensor,
) -> None:
    """Writes the convolution into out.

    Args:
        x: (N, C, H, W) float32, float16 or bfloat16, any strides; fastest where channels lie side by side.
        weight_bits: as in `kernels.weight_only.packed_weight_conv2d`, and likewise all up to `bias`.
        alpha: see there.
        beta: see there.
        bias: see there.
        steps: stride, padding and dilation, (vertical, horizontal) each.
        groups: see there.
        out: (N, H', W', F) in the type of x or float32, contiguous, overwritten.
    """
    if out.numel() == 0:
        return
    tensors = [tensor for tensor in (alpha, beta, bias) if tensor is not None]
    scalars = derived("weight_only_triton", tensors, bias is None, lambda: _scalars(alpha, beta, bias))
    filters, kernel_h, kernel_w, words = weight_bits.shape
    num_windows = out.numel() // filters
    shape = (num_windows, filters // groups, words)
    block_filters, block_windows, step_words, num_warps = blocks(*shape, x.dtype == torch.float32)
    grid = (triton.cdiv(num_windows, block_windows), triton.cdiv(filters // groups, block_filters), groups)
    _conv_kernel[grid](
        x,
        weight_bits.contiguous(),
        *scalars,
        out,
        num_windows,
        filters // groups,
        filters,
        x.shape[1] // groups,
        x.shape[2],
        x.shape[3],
        *x.stride(),
        out.shape[1],
        out.shape[2],
        *steps,
        kernel_h,
        kernel_w,
        words,
        HAS_BIAS=bias is not None,
        DOT=_dot_type(x.dtype),
        STEP_WORDS=step_words,
        BLOCK_FILTERS=block_filters,
        BLOCK_WINDOWS=block_windows,
        num_warps=num_warps,
    )


def blocks(num_windows: int, num_filters: int, words: int, is_float32: bool) -> tuple[int, int, int, int]:
    """Returns the filters and windows of a program, the words of a step, and its warps.

    They are large unless the GPU were half empty, and no larger than registers hold, float32 needing more of them.
    """
    if num_filters > 64 and num_windows * num_filters >= 128 * 128 * _PROGRAMS:
        return 128, 64 if is_float32 else 128, 1 if words == 1 else 2, 8
    windows = 64 if num_windows > 32 else 16
    filters = 64
    while filters > 16 and (
        filters >= 2 * num_filters or triton.cdiv(num_windows, windows) * triton.cdiv(num_filters, filters) < _PROGRAMS
    ):
        filters //= 2
    return filters, windows, 1 if words == 1 or is_float32 else 2, 4


def _dot_type(dtype: torch.dtype) -> tl.dtype:
    """Returns the type of the products for inputs of a type; Triton's interpreter has none of bfloat16."""
    if not isinstance(_conv_kernel, triton.JITFunction):
        return tl.float32
    return tl.float16 if dtype == torch.float16 else tl.bfloat16


def _scalars(alpha: Tensor, beta: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns, for each filter, what its sum is multiplied with, the value of its zeros, its bias, and its turn.

    The turn is a word of ones where alpha and beta change places, so that the zeros stand for the smaller magnitude.
    """
    is_turned = alpha.abs() < beta.abs()
    high, low = torch.where(is_turned, beta, alpha), torch.where(is_turned, alpha, beta)
    return high - low, low, low if bias is None else bias.contiguous(), -is_turned.to(torch.int32)


@triton.jit
def _upper(x):
    """The part of a float32 that bfloat16 holds; with the rest it adds up to x exactly."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _conv_kernel(
    x_ptr,
    bits_ptr,
    scale_ptr,
    base_ptr,
    bias_ptr,
    turn_ptr,
    out_ptr,
    num_windows,
    num_filters,
    row_filters,
    num_channels,
    height,
    width,
    x_stride_n,
    x_stride_c,
    x_stride_h,
    x_stride_w,
    out_height,
    out_width,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dilation_h,
    dilation_w,
    kernel_h,
    kernel_w,
    words,
    HAS_BIAS: tl.constexpr,  # noqa: N803  (constants of a Triton kernel are upper case)
    DOT: tl.constexpr,  # noqa: N803
    STEP_WORDS: tl.constexpr,  # noqa: N803
    BLOCK_FILTERS: tl.constexpr,  # noqa: N803
    BLOCK_WINDOWS: tl.constexpr,  # noqa: N803
):
    window = tl.program_id(0).to(tl.int64) * BLOCK_WINDOWS + tl.arange(0, BLOCK_WINDOWS)
    own = tl.program_id(1) * BLOCK_FILTERS + tl.arange(0, BLOCK_FILTERS)
    group = tl.program_id(2)
    feature = group.to(tl.int64) * num_filters + own
    is_window, is_feature = window < num_windows, own < num_filters
    image = window // (out_height * out_width)
    top = (window // out_width % out_height) * stride_h - pad_h
    left = (window % out_width) * stride_w - pad_w
    turn = tl.load(turn_ptr + feature, mask=is_feature, other=0)

    # tl.full and not tl.zeros, a jitted function: interpreted or not is settled when triton loads.
    selected = tl.full((BLOCK_FILTERS, BLOCK_WINDOWS), 0.0, dtype=tl.float32)
    total = tl.full((BLOCK_WINDOWS,), 0.0, dtype=tl.float32)
    channel = tl.arange(0, 32 * STEP_WORDS)
    for tap in range(kernel_h * kernel_w):
        row = top + tap // kernel_w * dilation_h
        column = left + tap % kernel_w * dilation_w
        is_valid = is_window & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        pixel = x_ptr + image * x_stride_n + row * x_stride_h + column * x_stride_w
        first_word = bits_ptr + (feature * kernel_h * kernel_w + tap) * words
        for start in range(0, words, STEP_WORDS):
            place = start * 32 + channel
            is_channel = place < num_channels
            source = pixel[:, None] + (group * num_channels + place).to(tl.int64)[None, :] * x_stride_c
            x = tl.load(source, mask=is_valid[:, None] & is_channel[None, :], other=0.0)
            word = start + tl.arange(0, STEP_WORDS)
            is_word = is_feature[:, None] & (word < words)[None, :]
            bits = tl.load(first_word[:, None] + word[None, :], mask=is_word, other=0) ^ turn[:, None]
            # (filters, words, 32) and then (filters, channels): bit i of word j is channel 32 j + i.
            planes = (bits[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
            ones = tl.reshape(planes, (BLOCK_FILTERS, 32 * STEP_WORDS))
            total += tl.sum(x.to(tl.float32), 1)
            mask = ones.to(DOT)
            if x.dtype == tl.float32:
                # The upper 8 bits of the 24, those below, and the rest: each difference is exact.
                high = _upper(x)
                middle = _upper(x - high)
                selected = tl.dot(mask, tl.trans((x - high - middle).to(DOT)), selected)
                selected = tl.dot(mask, tl.trans(middle.to(DOT)), selected)
                selected = tl.dot(mask, tl.trans(high.to(DOT)), selected)
            else:
                selected = tl.dot(mask, tl.trans(x.to(DOT)), selected)

    scale = tl.load(scale_ptr + feature, mask=is_feature, other=0.0)
    base = tl.load(base_ptr + feature, mask=is_feature, other=0.0)
    result = scale[:, None] * selected + base[:, None] * total[None, :]
    if HAS_BIAS:
        result += tl.load(bias_ptr + feature, mask=is_feature, other=0.0)[:, None]
    target = out_ptr + window[None, :] * row_filters + feature[:, None]
    tl.store(target, result.to(out_ptr.dtype.element_ty), mask=is_feature[:, None] & is_window[None, :])
