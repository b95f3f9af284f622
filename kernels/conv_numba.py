"""Numba version of `kernels.conv.packed_conv2d`: one output row a task.

A task gathers the windows of its row once, as 64-bit words with zeros at padded taps, and the sum of signs of each
window; then every filter is one loop over the row. The count of a filter's ones on the valid taps of a border window
is read from a two-dimensional prefix sum, since valid taps always form a rectangle. No fast-math, so each float32
operation rounds on its own.

Measured at batch 1 on an AMD EPYC with AVX-512, 2026-11-23, other work running: on one thread 1.1 to 4.1 times as
fast as torch's float32 on the 3x3 layers of ResNet-18 (64 to 512 channels), on two threads 0.6 to 1.9 times; without
packing, see benchmarks/results/packed_conv_cpu.json.
"""

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray
from torch import Tensor

from kernels.numba_threads import torch_threads
from kernels.packing import WORD_BITS


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
    tail = np.uint32(0xFFFFFFFF >> (-in_channels % WORD_BITS))
    masked = weight_bits.contiguous().numpy().view(np.uint32).copy()
    masked[..., -1] &= tail
    with torch_threads():
        _conv_rows(
            bits.contiguous().numpy().view(np.uint32),
            _as_long_words(masked),
            _ones_before(masked),
            (alpha - beta).numpy(),
            beta.contiguous().numpy(),
            np.empty(0, np.float32) if bias is None else bias.contiguous().numpy(),
            (in_channels, tail, stride[0], stride[1], padding[0], padding[1]),
            out.numpy(),
        )


def _as_long_words(words: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """(F, kh, kw, words) to (F, ceil(kh * kw * words / 2)): a filter's words in pairs, filled up with a zero word."""
    flat = words.reshape(words.shape[0], -1)
    return np.ascontiguousarray(np.pad(flat, ((0, 0), (0, flat.shape[1] % 2)))).view(np.uint64)


def _type_popcount(_context: Any, _word: Any) -> Any:
    """Types and builds the number of ones in a 64-bit word as LLVM's `ctpop`, which vectorises."""

    def build(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.ctpop(arguments[0])

    return types.int64(types.uint64), build


_popcount: Any = intrinsic(_type_popcount)


@numba.njit(nogil=True, cache=True)
def _ones_before(words: NDArray[np.uint32]) -> NDArray[np.int32]:
    """(F, kh + 1, kw + 1): ones of the filter at the taps above and left of each corner."""
    filters, height, width, num_words = words.shape
    ones = np.zeros((filters, height + 1, width + 1), np.int32)
    for index in range(filters):
        for ky in range(height):
            in_row = 0
            for kx in range(width):
                for word in range(num_words):
                    in_row += _popcount(np.uint64(words[index, ky, kx, word]))
                ones[index, ky + 1, kx + 1] = ones[index, ky, kx + 1] + in_row
    return ones


@numba.njit(nogil=True, cache=True)
def _valid_taps(position: int, stride: int, padding: int, kernel: int, size: int) -> tuple[int, int]:
    """First and one past the last tap of the window at an output position that lie inside the image."""
    start = position * stride - padding
    first = min(max(0, -start), kernel)
    return first, max(first, min(kernel, size - start))


@numba.njit(nogil=True, cache=True)
def _gather_window(
    bits: NDArray[np.uint32],
    image: int,
    corner: tuple[int, int],
    taps: tuple[int, int, int, int],
    kernel_w: int,
    tail: np.uint32,
    window: NDArray[np.uint32],
) -> None:
    words = bits.shape[3]
    for ky in range(taps[0], taps[1]):
        for kx in range(taps[2], taps[3]):
            start = (ky * kernel_w + kx) * words
            for word in range(words):
                window[start + word] = bits[image, corner[0] + ky, corner[1] + kx, word]
            window[start + words - 1] &= tail


@numba.njit(nogil=True, cache=True)
def _filter_row(
    windows: NDArray[np.uint64],
    sums: NDArray[np.int64],
    columns: NDArray[np.int64],
    rows: tuple[int, int],
    weight: NDArray[np.uint64],
    ones_before: NDArray[np.int32],
    scalars: tuple[np.float32, np.float32],
    out: NDArray[np.float32],
) -> None:
    last = ones_before.shape[1] - 1
    inside = ones_before[rows[1], last] - ones_before[rows[0], last]
    for column in range(out.shape[0]):
        count = 0
        for word in range(weight.shape[0]):
            count += _popcount(windows[column, word] & weight[word])
        ones, left, right = inside, columns[column, 0], columns[column, 1]
        if right - left < last:
            ones = ones_before[rows[1], right] - ones_before[rows[0], right]
            ones -= ones_before[rows[1], left] - ones_before[rows[0], left]
        out[column] = scalars[0] * np.float32(2 * count - ones) + scalars[1] * np.float32(sums[column])


@numba.njit(parallel=True, nogil=True, cache=True)
def _conv_rows(
    bits: NDArray[np.uint32],
    weights: NDArray[np.uint64],
    ones_before: NDArray[np.int32],
    scale: NDArray[np.float32],
    beta: NDArray[np.float32],
    bias: NDArray[np.float32],
    geometry: tuple[int, np.uint32, int, int, int, int],
    out: NDArray[np.float32],
) -> None:
    in_channels, tail, stride_h, stride_w, pad_h, pad_w = geometry
    kernel_h, kernel_w = ones_before.shape[1] - 1, ones_before.shape[2] - 1
    num_filters, out_height, out_width = out.shape[1], out.shape[2], out.shape[3]
    for row in numba.prange(out.shape[0] * out_height):
        image, y = row // out_height, row % out_height
        rows = _valid_taps(y, stride_h, pad_h, kernel_h, bits.shape[1])
        windows = np.zeros((out_width, weights.shape[1]), np.uint64)
        sums = np.zeros(out_width, np.int64)
        columns = np.empty((out_width, 2), np.int64)
        for x in range(out_width):
            left, right = _valid_taps(x, stride_w, pad_w, kernel_w, bits.shape[2])
            columns[x, 0], columns[x, 1] = left, right
            corner = (y * stride_h - pad_h, x * stride_w - pad_w)
            _gather_window(
                bits, image, corner, (rows[0], rows[1], left, right), kernel_w, tail, windows[x].view(np.uint32)
            )
            for word in windows[x]:
                sums[x] += 2 * _popcount(word)
            sums[x] -= in_channels * (rows[1] - rows[0]) * (right - left)
        for index in range(num_filters):
            target = out[image, index, y]
            scalars = (scale[index], beta[index])
            _filter_row(windows, sums, columns, rows, weights[index], ones_before[index], scalars, target)
            if bias.size:
                target += bias[index]
