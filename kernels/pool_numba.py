"""Numba version of `kernels.pool`: the words of a window's rows first, side by side, then those of its columns."""

from collections.abc import Sequence

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.numba_threads import torch_threads

# Words read, from where on threads gain more than they cost to wake.
_PARALLEL_WORDS = 2**20

_Steps = tuple[int, int, int, int, int, int]


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
        out: (N, H', W', words) int32, contiguous, overwritten.
    """
    words, flips = (tensor.contiguous().numpy().view(np.uint32) for tensor in (bits, is_and_bits))
    steps = (*kernel, *stride, *padding)
    target = out.numpy().view(np.uint32)
    if torch.get_num_threads() == 1 or bits.numel() * kernel[0] < _PARALLEL_WORDS:
        _pool(words, flips, steps, target)
        return
    with torch_threads():
        _pool_in_threads(words, flips, steps, target)


@numba.njit(nogil=True, cache=True)
def _pool_row(
    bits: NDArray[np.uint32], flips: NDArray[np.uint32], steps: _Steps, y: int, out: NDArray[np.uint32]
) -> None:
    """Writes row y (W', words) of the pooled image (H, W, words)."""
    height, width, words = bits.shape
    kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w = steps
    top = y * stride_h - padding_h
    line = np.zeros(width * words, np.uint32)
    for row in range(max(top, 0), min(top + kernel_h, height)):
        source = bits[row].reshape(-1)
        if words == 1:
            for index in range(len(line)):
                line[index] |= source[index] ^ flips[0]
        else:
            for x in range(width):
                for word in range(words):
                    line[x * words + word] |= source[x * words + word] ^ flips[word]
    for x in range(len(out)):
        left = x * stride_w - padding_w
        for word in range(words):
            packed = np.uint32(0)
            for column in range(max(left, 0), min(left + kernel_w, width)):
                packed |= line[column * words + word]
            out[x, word] = packed ^ flips[word]


@numba.njit(nogil=True, cache=True)
def _pool(bits: NDArray[np.uint32], flips: NDArray[np.uint32], steps: _Steps, out: NDArray[np.uint32]) -> None:
    for image in range(len(bits)):
        for y in range(out.shape[1]):
            _pool_row(bits[image], flips, steps, y, out[image, y])


@numba.njit(parallel=True, nogil=True, cache=True)
def _pool_in_threads(
    bits: NDArray[np.uint32], flips: NDArray[np.uint32], steps: _Steps, out: NDArray[np.uint32]
) -> None:
    for row in numba.prange(out.shape[0] * out.shape[1]):
        image, y = row // out.shape[1], row % out.shape[1]
        _pool_row(bits[image], flips, steps, y, out[image, y])
