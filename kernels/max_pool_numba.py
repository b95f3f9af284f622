"""Numba version of `kernels.max_pool`: the rows of a window first, side by side, then its columns."""

from collections.abc import Sequence

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.numba_threads import torch_threads

# Values read, from where on threads gain more than they cost to wake.
_PARALLEL_VALUES = 2**22

_Steps = tuple[int, int, int, int, int, int]


def launch(rows: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], out: Tensor) -> None:
    """Pools values into out.

    Args:
        rows: (N, H, W, C) float32 on the CPU, contiguous.
        kernel: height and width of the window.
        stride: its steps, (vertical, horizontal).
        padding: rows and columns at each side that count for nothing.
        out: (N, H', W', C) float32, contiguous, overwritten.
    """
    steps = (kernel[0], kernel[1], stride[0], stride[1], padding[0], padding[1])
    if torch.get_num_threads() == 1 or rows.numel() < _PARALLEL_VALUES:
        _pool(rows.numpy(), steps, out.numpy())
        return
    with torch_threads():
        _pool_in_threads(rows.numpy(), steps, out.numpy())


@numba.njit(nogil=True, cache=True)
def _pool_row(
    image: NDArray[np.float32], steps: _Steps, y: int, line: NDArray[np.float32], out: NDArray[np.float32]
) -> None:
    """Writes row y (W', C) of the pooled image (H, W, C); line (W, C) is room for the largest of each column."""
    kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w = steps
    height, width, channels = image.shape
    top = y * stride_h - padding_h
    rows, flat = image.reshape(height, width * channels), line.reshape(-1)
    first = max(top, 0)
    for index in range(len(flat)):
        flat[index] = rows[first, index]
    for row in range(first + 1, min(top + kernel_h, height)):
        for index in range(len(flat)):
            old, new = flat[index], rows[row, index]
            flat[index] = old if (old >= new) | (old != old) else new  # NaN wins, as torch has it
    for x in range(len(out)):
        left = x * stride_w - padding_w
        first = max(left, 0)
        for channel in range(channels):
            out[x, channel] = line[first, channel]
        for column in range(first + 1, min(left + kernel_w, width)):
            for channel in range(channels):
                old, new = out[x, channel], line[column, channel]
                out[x, channel] = old if (old >= new) | (old != old) else new


@numba.njit(nogil=True, cache=True)
def _pool(rows: NDArray[np.float32], steps: _Steps, out: NDArray[np.float32]) -> None:
    line = np.empty_like(rows[0, 0]) if len(rows) else np.empty((0, 0), np.float32)
    for image in range(len(rows)):
        for y in range(out.shape[1]):
            _pool_row(rows[image], steps, y, line, out[image, y])


@numba.njit(parallel=True, nogil=True, cache=True)
def _pool_in_threads(rows: NDArray[np.float32], steps: _Steps, out: NDArray[np.float32]) -> None:
    for task in numba.prange(out.shape[0] * out.shape[1]):
        image, y = task // out.shape[1], task % out.shape[1]
        _pool_row(rows[image], steps, y, np.empty_like(rows[image, 0]), out[image, y])
