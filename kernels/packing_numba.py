"""Numba version of `kernels.packing.pack_signs`: one image row a task.

Where the channels of a pixel lie side by side (channels-last), 32 of them are compared and become a word at once; else
the loop runs over the pixels of the row.
"""

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.numba_threads import torch_threads
from kernels.packing import WORD_BITS
from kernels.vector_ir import signs_of_32

# From here on threads gain more than they cost to wake.
_PARALLEL_VALUES = 2**20


def launch(x: Tensor, bits: Tensor) -> None:
    """Packs the signs of x into bits.

    Args:
        x: (N, C, H, W) on the CPU, a floating type.
        bits: (N, H, W, ceil(C / 32)) int32, contiguous, overwritten.
    """
    # float64 stays as it is: a negative value under float32's range would become -0.0, which counts as >= 0.
    real = x if x.dtype == torch.float64 else x.to(torch.float32)
    rows = real.permute(0, 2, 3, 1)
    if not rows.is_contiguous() or real.dtype != torch.float32:
        with torch_threads():
            _pack_rows(real.contiguous().numpy(), bits.numpy().view(np.uint32))
    elif torch.get_num_threads() == 1 or x.numel() < _PARALLEL_VALUES:
        _pack_pixels(rows.numpy(), bits.numpy().view(np.uint32))
    else:
        with torch_threads():
            _pack_pixels_in_threads(rows.numpy(), bits.numpy().view(np.uint32))


@numba.njit(nogil=True, cache=True)
def _pack_line(pixels: NDArray[np.float32], words: NDArray[np.uint32]) -> None:
    channels = pixels.shape[1]
    address = np.int64(pixels.ctypes.data)
    for column in range(len(pixels)):
        for word in range(channels // WORD_BITS):
            words[column, word] = signs_of_32(address + (column * channels + word * WORD_BITS) * 4)
        for word in range(channels // WORD_BITS, words.shape[1]):  # the last one, where it is not full
            packed = np.uint32(0)
            for channel in range(word * WORD_BITS, channels):
                packed |= np.uint32(pixels[column, channel] >= 0) << np.uint32(channel - word * WORD_BITS)
            words[column, word] = packed


@numba.njit(nogil=True, cache=True)
def _pack_pixels(x: NDArray[np.float32], bits: NDArray[np.uint32]) -> None:
    for image in range(len(x)):
        for y in range(x.shape[1]):
            _pack_line(x[image, y], bits[image, y])


@numba.njit(parallel=True, nogil=True, cache=True)
def _pack_pixels_in_threads(x: NDArray[np.float32], bits: NDArray[np.uint32]) -> None:
    for row in numba.prange(x.shape[0] * x.shape[1]):
        _pack_line(x[row // x.shape[1], row % x.shape[1]], bits[row // x.shape[1], row % x.shape[1]])


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
