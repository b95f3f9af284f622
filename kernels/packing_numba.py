"""Numba version of `kernels.packing.pack_signs`: one image row a task, vectorised over the pixels of the row."""

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.numba_threads import torch_threads
from kernels.packing import WORD_BITS


def launch(x: Tensor, bits: Tensor) -> None:
    """Packs the signs of x into bits.

    Args:
        x: (N, C, H, W) on the CPU, a floating type.
        bits: (N, H, W, ceil(C / 32)) int32, contiguous, overwritten.
    """
    # float64 stays as it is: a negative value under float32's range would become -0.0, which counts as >= 0.
    real = x if x.dtype == torch.float64 else x.to(torch.float32)
    with torch_threads():
        _pack_rows(real.contiguous().numpy(), bits.numpy().view(np.uint32))


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
