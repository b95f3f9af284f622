"""Numba version of `kernels.packing.pack_signs`: one image row a task.

Where the channels of a pixel lie side by side (channels-last), 32 of them are compared and become a word at once; else
the loop runs over the pixels of the row.
"""

from functools import lru_cache

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.compiled import compiled, versioned
from kernels.derived import derived
from kernels.numba_threads import torch_threads
from kernels.packing import WORD_BITS
from kernels.vector_ir import reached_of_32

# From here on threads gain more than they cost to wake.
_PARALLEL_VALUES = 2**20


def launch(x: Tensor, bits: Tensor) -> None:
    """Packs the signs of x into bits.

    Args:
        x: (N, C, H, W) on the CPU, a floating type.
        bits: (N, H, W, ceil(C / 32)) int32, contiguous, overwritten.
    """
    # float64 stays as it is: a negative value under float32's range would become -0.0, which counts as >= 0.
    real = x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)
    rows = real.permute(0, 2, 3, 1)
    if rows.is_contiguous() and real.dtype == torch.float32:
        _launch_pixels(rows, *_zeros(x.shape[1]), bits)
        return
    with torch_threads():
        _pack_rows(real.contiguous().numpy(), bits.numpy().view(np.uint32))


def launch_reached(x: Tensor, threshold: Tensor, falls: Tensor, bits: Tensor) -> None:
    """Packs where x reaches a threshold into bits.

    Args:
        x: (N, C, H, W) on the CPU, a floating type; read without a copy where it is channels-last float32.
        threshold: (C,) in the type of x.
        falls: (C,) bool.
        bits: (N, H, W, ceil(C / 32)) int32, contiguous, overwritten.
    """
    if x.dtype != torch.float32:
        launch(torch.where((x >= threshold.view(-1, 1, 1)) ^ falls.view(-1, 1, 1), 1.0, -1.0), bits)
        return
    rows = x.permute(0, 2, 3, 1).contiguous()
    words = derived("packing_numba", [falls], None, lambda: _fall_words(falls))
    _launch_pixels(rows, threshold.contiguous().numpy(), words, bits)


@lru_cache(maxsize=64)
def _zeros(channels: int) -> tuple[NDArray[np.float32], NDArray[np.uint32]]:
    """Returns thresholds and falls of signs: for whole words those of one word, which is as good as all."""
    channels = channels if channels % WORD_BITS else WORD_BITS
    return np.zeros(channels, np.float32), np.zeros(-(-channels // WORD_BITS), np.uint32)


def _fall_words(falls: Tensor) -> NDArray[np.uint32]:
    flags = np.zeros((-(-len(falls) // WORD_BITS), WORD_BITS), np.uint64)
    flags.reshape(-1)[: len(falls)] = falls.numpy()
    words: NDArray[np.uint64] = (flags << np.arange(WORD_BITS, dtype=np.uint64)).sum(1)
    return words.astype(np.uint32)


def _launch_pixels(rows: Tensor, thresholds: NDArray[np.float32], falls: NDArray[np.uint32], bits: Tensor) -> None:
    arguments = (rows.numpy(), thresholds, falls, bits.numpy())
    if torch.get_num_threads() == 1 or rows.numel() < _PARALLEL_VALUES:
        _pack_pixels(*arguments)
        return
    with torch_threads():
        _pack_pixels_in_threads(*arguments)


@compiled
def _pack_line(
    pixels: NDArray[np.float32], thresholds: NDArray[np.float32], falls: NDArray[np.uint32], words: NDArray[np.uint32]
) -> None:
    channels = pixels.shape[1]
    address, least = np.int64(pixels.ctypes.data), np.int64(thresholds.ctypes.data)
    if channels % WORD_BITS == 0:
        period, flat = len(falls), words.reshape(-1)
        for first in range(0, len(flat), period):
            for word in range(period):
                place = (first + word) * WORD_BITS * 4
                flat[first + word] = reached_of_32(address + place, least + word * WORD_BITS * 4) ^ falls[word]
        return
    for column in range(len(pixels)):
        for word in range(channels // WORD_BITS):
            start = word * WORD_BITS
            packed = reached_of_32(address + (column * channels + start) * 4, least + start * 4)
            words[column, word] = packed ^ falls[word]
        for word in range(channels // WORD_BITS, words.shape[1]):  # the last one, where it is not full
            packed = falls[word]
            for channel in range(word * WORD_BITS, channels):
                reached = np.uint32(pixels[column, channel] >= thresholds[channel])
                packed ^= reached << np.uint32(channel - word * WORD_BITS)
            words[column, word] = packed


@compiled
def _pack_pixels(
    x: NDArray[np.float32], thresholds: NDArray[np.float32], falls: NDArray[np.uint32], bits: NDArray[np.int32]
) -> None:
    pixels, words = x.reshape(-1, x.shape[3]), bits.view(np.uint32).reshape(-1, bits.shape[3])
    _pack_line(pixels, thresholds, falls, words)


@numba.njit(parallel=True, nogil=True, cache=True)
@versioned
def _pack_pixels_in_threads(
    x: NDArray[np.float32], thresholds: NDArray[np.float32], falls: NDArray[np.uint32], bits: NDArray[np.int32]
) -> None:
    for row in numba.prange(x.shape[0] * x.shape[1]):
        image, y = row // x.shape[1], row % x.shape[1]
        _pack_line(x[image, y], thresholds, falls, bits[image, y].view(np.uint32))


@numba.njit(parallel=True, nogil=True, cache=True)
def _pack_rows(x: NDArray[np.floating], bits: NDArray[np.uint32]) -> None:
    batch, channels, height, width = x.shape
    for row in numba.prange(batch * height):
        image, y = row // height, row % height
        packed = np.empty(width, np.uint32)
        for word in range(bits.shape[3]):
            packed[:] = 0
            first = word * WORD_BITS
            for channel in range(first, min(channels, first + WORD_BITS)):
                shift = np.uint32(channel - first)
                for column in range(width):
                    packed[column] |= np.uint32(x[image, channel, y, column] >= 0) << shift
            for column in range(width):
                bits[image, y, column, word] = packed[column]
