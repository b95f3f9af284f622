"""Triton version of `kernels.conv.packed_conv2d`: a block of output pixels by a block of filters a program.

The portable GPU path: ordinary integer instructions, which LLVM turns into one `popc` a word, and the same source
runs on NVIDIA's and AMD's GPUs and in Triton's interpreter. A popcount is far slower than a tensor core's 1-bit
product, so this path is exact but not a speed-up over a float convolution (see `kernels.gpu_path`).
"""

# Triton compiles its kernels itself; their arguments have no Python types.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from kernels.conv_layer import Filters, Geometry
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
        out: (N, F, H', W') float32, bfloat16 or float16, its dimensions in any order in memory, overwritten.
    """
    scalars = (alpha, beta, bias, None, None)
    _run(bits, weight_bits, scalars, in_channels, (*stride, *padding), (out.shape[2], out.shape[3]), out, out.stride())


def launch_signs(
    bits: Tensor,
    weight_bits: Tensor,
    alpha: Tensor,
    beta: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    falls: Tensor,
    in_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    out: Tensor,
) -> None:
    """Writes the packed signs of the convolution into out.

    Args:
        bits: as in `kernels.conv.packed_conv2d_signs`, and likewise all up to `padding`.
        weight_bits: see there.
        alpha: see there.
        beta: see there.
        bias: see there.
        threshold: see there.
        falls: see there.
        in_channels: see there.
        stride: (vertical, horizontal).
        padding: (vertical, horizontal).
        out: (N, H', W', ceil(F / 32)) int32, contiguous, overwritten.
    """
    scalars = (alpha, beta, bias, threshold, falls)
    image, row, column, word = out.stride()
    strides = (image, word, row, column)
    _run(bits, weight_bits, scalars, in_channels, (*stride, *padding), (out.shape[1], out.shape[2]), out, strides)


def launch_layer(bits: Tensor, filters: Filters, geometry: Geometry, out: Tensor) -> None:
    """Writes the convolution, or the signs of it, into out.

    Args:
        bits: (N, H, W, words) int32.
        filters: The filters.
        geometry: The layer.
        out: (N, H', W', F) of a floating type, or (N, H', W', ceil(F / 32)) int32 of packed results; overwritten.
    """
    f, g = filters, geometry
    scalars = (f.alpha, f.beta, f.bias, f.threshold, f.falls)
    image, row, column, last = out.stride()
    window = (g.stride_h, g.stride_w, g.pad_h, g.pad_w)
    size = (g.out_height, g.out_width)
    _run(bits, f.weight_bits, scalars, g.channels, window, size, out, (image, last, row, column))


def _run(
    bits: Tensor,
    weight_bits: Tensor,
    scalars: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
    in_channels: int,
    window: tuple[int, ...],
    out_size: tuple[int, int],
    out: Tensor,
    out_strides: Sequence[int],
) -> None:
    if out.numel() == 0:
        return
    alpha, beta, bias, threshold, falls = scalars
    num_filters, kernel_h, kernel_w, words = weight_bits.shape
    num_pixels = bits.shape[0] * out_size[0] * out_size[1]
    grid = (triton.cdiv(num_pixels, BLOCK_PIXELS), triton.cdiv(num_filters, BLOCK_FILTERS))
    last_channels = in_channels - (words - 1) * WORD_BITS
    _conv_kernel[grid](
        bits.contiguous(),
        weight_bits.contiguous(),
        alpha.contiguous(),
        beta.contiguous(),
        beta if bias is None else bias.contiguous(),
        beta if threshold is None else threshold.contiguous(),
        beta if falls is None else falls.contiguous(),
        out,
        num_pixels,
        num_filters,
        in_channels,
        bits.shape[1],
        bits.shape[2],
        *out_size,
        *window,
        kernel_h,
        kernel_w,
        words,
        *out_strides,
        TAIL=-1 if last_channels == WORD_BITS else (1 << last_channels) - 1,
        HAS_BIAS=bias is not None,
        IS_PACKED=threshold is not None,
        IS_SMALL=max(bits.numel(), weight_bits.numel(), out.numel(), num_pixels + BLOCK_PIXELS) < 2**31,
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
    alpha_ptr,
    beta_ptr,
    bias_ptr,
    threshold_ptr,
    falls_ptr,
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
    out_stride_n,
    out_stride_f,
    out_stride_h,
    out_stride_w,
    TAIL: tl.constexpr,  # noqa: N803  (constants of a Triton kernel are upper case)
    HAS_BIAS: tl.constexpr,  # noqa: N803
    IS_PACKED: tl.constexpr,  # noqa: N803
    IS_SMALL: tl.constexpr,  # noqa: N803
    BLOCK_PIXELS: tl.constexpr,  # noqa: N803
    BLOCK_FILTERS: tl.constexpr,  # noqa: N803
):
    pixel = tl.program_id(0).to(tl.int64) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    feature = tl.program_id(1).to(tl.int64) * BLOCK_FILTERS + tl.arange(0, BLOCK_FILTERS)
    if IS_SMALL:  # 64-bit numbers take twice the registers, and dividing them is a function call
        pixel = pixel.to(tl.int32)
        feature = feature.to(tl.int32)
    is_pixel = pixel < num_pixels
    is_feature = feature < num_filters
    image = pixel // (out_height * out_width)
    y = pixel // out_width % out_height
    x = pixel % out_width
    top = y * stride_h - pad_h
    left = x * stride_w - pad_w

    # A tap inside the image adds 2 * popc(b & e) - popc(e) to E and 2 * popc(b) - channels to S, others nothing. The
    # twos come last: LLVM does not know a population count again once it is multiplied.
    # tl.full and not tl.zeros, a jitted function: interpreted or not is settled when triton loads.
    both = tl.full((BLOCK_PIXELS, BLOCK_FILTERS), 0, dtype=tl.int32)
    inside = tl.full((BLOCK_PIXELS, BLOCK_FILTERS), 0, dtype=tl.int32)
    ones = tl.full((BLOCK_PIXELS,), 0, dtype=tl.int32)
    taps = tl.full((BLOCK_PIXELS,), 0, dtype=tl.int32)
    for tap in range(kernel_h * kernel_w):
        row = top + tap // kernel_w
        column = left + tap % kernel_w
        is_valid = is_pixel & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        source = bits_ptr + ((image * height + row) * width + column) * words
        weights = weight_ptr + (feature * kernel_h * kernel_w + tap) * words
        taps += tl.where(is_valid, 1, 0)
        for word in range(words):
            channels = tl.where(word == words - 1, TAIL, -1)
            signs = tl.load(source + word, mask=is_valid, other=0) & channels
            mask = tl.load(weights + word, mask=is_feature, other=0) & channels
            ones += _popcount(signs)
            both += _popcount(signs[:, None] & mask[None, :])
            inside += tl.where(is_valid[:, None], _popcount(mask)[None, :], 0)

    beta = tl.load(beta_ptr + feature, mask=is_feature, other=0.0)
    scale = tl.load(alpha_ptr + feature, mask=is_feature, other=0.0) - beta
    selected = (2 * both - inside).to(tl.float32)
    total = (2 * ones - in_channels * taps).to(tl.float32)
    result = scale[None, :] * selected + beta[None, :] * total[:, None]
    if HAS_BIAS:
        result += tl.load(bias_ptr + feature, mask=is_feature, other=0.0)[None, :]
    target = out_ptr + (image * out_stride_n + y * out_stride_h + x * out_stride_w)
    if IS_PACKED:
        threshold = tl.load(threshold_ptr + feature, mask=is_feature, other=float("inf"))
        falls = tl.load(falls_ptr + feature, mask=is_feature, other=0) != 0
        reached = ((result >= threshold[None, :]) ^ falls[None, :]).to(tl.uint32)
        packed = tl.sum(reached << tl.arange(0, BLOCK_FILTERS)[None, :].to(tl.uint32), axis=1)
        tl.store(
            target + tl.program_id(1) * out_stride_f, packed.to(tl.uint32).to(tl.int32, bitcast=True), mask=is_pixel
        )
    else:
        place = target[:, None] + feature[None, :] * out_stride_f
        tl.store(place, result.to(out_ptr.dtype.element_ty), mask=is_pixel[:, None] & is_feature[None, :])
