"""Numba version of `kernels.dense.two_valued`."""

import numba
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kernels.numba_threads import torch_threads


def launch(weight: Tensor, threshold: Tensor, alpha: Tensor, beta: Tensor, dense: Tensor) -> None:
    """Writes the dense form.

    Args:
        weight: (F, ...) on the CPU, float32 or float64.
        threshold: (F,), same type, as alpha and beta.
        alpha: (F,).
        beta: (F,).
        dense: Contiguous, shape and type of `weight`, overwritten.
    """
    rows = weight.flatten(1).contiguous().numpy()
    with torch_threads():
        _expand_rows(rows, threshold.numpy(), alpha.numpy(), beta.numpy(), dense.flatten(1).numpy())


@numba.njit(parallel=True, nogil=True, cache=True)
def _expand_rows(
    rows: NDArray[np.floating],
    threshold: NDArray[np.floating],
    alpha: NDArray[np.floating],
    beta: NDArray[np.floating],
    dense: NDArray[np.floating],
) -> None:
    for row in numba.prange(rows.shape[0]):
        for index in range(rows.shape[1]):
            dense[row, index] = alpha[row] if rows[row, index] >= threshold[row] else beta[row]
