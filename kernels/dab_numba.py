"""Numba version of `kernels.dab.quantize_dab`: numpy's vector sort, then one pass over each filter.

The threshold needs no sorting indices, and without them `numpy.sort` takes 5 ms where `torch.sort` takes 68 ms
(512 rows of 4608 float32, 2 cores of an AMD EPYC with AVX-512).
"""

import numba
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kernels.numba_threads import torch_threads


def launch(weight: Tensor, threshold: Tensor, alpha: Tensor, beta: Tensor) -> None:
    """Writes each filter's optimum.

    Args:
        weight: (F, ...) on the CPU, float32 or float64.
        threshold: (F,), overwritten: the smallest weight of the upper group.
        alpha: (F,), overwritten; alpha or beta is not finite where a weight of the filter is not.
        beta: (F,), overwritten.
    """
    ascending = np.sort(weight.flatten(1).numpy(), axis=1)
    with torch_threads():
        _split_rows(ascending, threshold.numpy(), alpha.numpy(), beta.numpy())


@numba.njit(parallel=True, nogil=True, cache=True)
def _split_rows(
    ascending: NDArray[np.floating],
    threshold: NDArray[np.floating],
    alpha: NDArray[np.floating],
    beta: NDArray[np.floating],
) -> None:
    num_filters, size = ascending.shape
    for row in numba.prange(num_filters):
        values = ascending[row]
        total = 0.0
        for index in range(size):
            total += np.float64(values[size - 1 - index])
        ones, upper = _best_split(values, total)
        threshold[row] = values[size - ones]
        alpha[row] = upper / ones
        beta[row] = (total - upper) / (size - ones) if ones < size else alpha[row]


@numba.njit(nogil=True, cache=True)
def _best_split(values: NDArray[np.floating], total: float) -> tuple[int, float]:
    """Size and sum of the upper group of a filter given in ascending order; all of it where the weights are equal."""
    size = values.shape[0]
    mean = total / size
    best_gain, best_ones, best_upper = -1.0, size, total
    prefix = 0.0
    for ones in range(1, size):
        prefix += np.float64(values[size - ones])
        if values[size - ones] > values[size - ones - 1]:
            between = prefix - ones * mean
            gain = between * between / (np.float64(ones) * np.float64(size - ones))
            if gain > best_gain:
                best_gain, best_ones, best_upper = gain, ones, prefix
    return best_ones, best_upper
