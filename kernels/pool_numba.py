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
    steps = (kernel[0], kernel[1], stride[0], stride[1], padding[0], padding[1])
    target = out.numpy().view(np.uint32)
    if torch.get_num_threads() == 1 or bits.numel() * kernel[0] < _PARALLEL_WORDS:
        _pool(words, flips, steps, target)
        return
    with torch_threads():
        _pool_in_threads(words, flips, steps, target)


@numba.njit(nogil=True, cache=True)
def _pool_rows(
    bits: NDArray[np.uint32], line_flips: NDArray[np.uint32], first: int, count: int, line: NDArray[np.uint32]
) -> None:
    """Writes into line (W * words,) the OR of rows of bits (H, W * words), each with the flips of a whole line."""
    line[:] = 0
    for row in range(max(first, 0), min(first + count, len(bits))):
        source = bits[row]
        for index in range(len(line)):
            line[index] |= source[index] ^ line_flips[index]


@numba.njit(nogil=True, cache=True)
def _pool_columns(line: NDArray[np.uint32], flips: NDArray[np.uint32], steps: _Steps, out: NDArray[np.uint32]) -> None:
    """Writes row (W', words) of the output from the pooled rows (W * words,)."""
    words = len(flips)
    width = len(line) // words
    for x in range(len(out)):
        left = x * steps[3] - steps[5]
        begin, end = max(left, 0) * words, min(left + steps[1], width) * words
        for word in range(words):
            packed = np.uint32(0)
            for place in range(begin + word, end, words):
                packed |= line[place]
            out[x, word] = packed ^ flips[word]


@numba.njit(nogil=True, cache=True)
def _line_flips(flips: NDArray[np.uint32], width: int) -> NDArray[np.uint32]:
    line = np.empty((width, len(flips)), np.uint32)
    line[:] = flips
    return line.reshape(-1)


@numba.njit(nogil=True, cache=True)
def _pool(bits: NDArray[np.uint32], flips: NDArray[np.uint32], steps: _Steps, out: NDArray[np.uint32]) -> None:
    line_flips = _line_flips(flips, bits.shape[2])
    line = np.empty_like(line_flips)
    for image in range(len(bits)):
        rows = bits[image].reshape(bits.shape[1], -1)
        for y in range(out.shape[1]):
            _pool_rows(rows, line_flips, y * steps[2] - steps[4], steps[0], line)
            _pool_columns(line, flips, steps, out[image, y])


@numba.njit(parallel=True, nogil=True, cache=True)
def _pool_in_threads(
    bits: NDArray[np.uint32], flips: NDArray[np.uint32], steps: _Steps, out: NDArray[np.uint32]
) -> None:
    line_flips = _line_flips(flips, bits.shape[2])
    for task in numba.prange(out.shape[0] * out.shape[1]):
        image, y = task // out.shape[1], task % out.shape[1]
        line = np.empty_like(line_flips)
        _pool_rows(bits[image].reshape(bits.shape[1], -1), line_flips, y * steps[2] - steps[4], steps[0], line)
        _pool_columns(line, flips, steps, out[image, y])
