"""The DAB quantizer started from a known threshold: a few passes of Lloyd's algorithm instead of a sort.

Weights move little from one training step to the next, and so do their thresholds. From a threshold t, one pass takes
the two group means alpha(t), beta(t) and moves to their midpoint; no pass increases the squared error (Lloyd, Least
squares quantization in PCM, 1982). With w the weights, E(w) the squared error found, E*(w) the exact optimum's:

    sqrt(E(w)) <= sqrt(E(v)) + ||w - v||       if the start is the midpoint (alpha + beta) / 2 found for weights v,
    sqrt(E(w)) <= sqrt(E*(w)) + 2 ||w - v||    if that start was the exact optimum of v,

since the error of a fixed mask is the distance to a linear space, the midpoint assigns each weight to the nearer of the
two values, and distances change by ||w - v|| at most. So over steps the gap to the optimum grows by twice each step's
length at most; where there is a single locally optimal threshold, passes close it. Left out: the exact search
(`kernels.dab`), and where the threshold is kept (`dabnn.layers`).
"""

import torch
from torch import Tensor

from kernels.dab import filter_rows, has_triton
from kernels.packing import has_numba

# Each pass shrinks the distance to a local optimum to about 0.64 of itself on Gaussian weights (2 / pi).
NUM_PASSES = 4


def dab_threshold_warm(weight: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Finds a locally best two-valued approximation of each filter, near `start`.

    Where `start` leaves a group empty, the mean of the filter takes its place, and a filter of equal weights has all of
    them in the upper group. Sums are float64. No gradient.

    Args:
        weight: (F, ...), a floating type, at least one weight a filter.
        start: (F,) thresholds, any floating type.

    Returns:
        threshold: (F,) in weight's type or float32, whichever is wider; the mask is `weight >= threshold`.
        alpha: (F,) mean of the upper group, same type; alpha or beta is not finite where a weight of the filter is not.
        beta: (F,) mean of the lower group, same type. (alpha + beta) / 2 is the start of the next step.
    """
    real = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    threshold, alpha, beta = torch.ops.dab.dab_threshold_warm(real, start.detach().to(real.dtype))
    return threshold, alpha, beta


def dab_threshold_warm_reference(weight: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Plain-torch `dab_threshold_warm`."""
    flat = weight.flatten(1)
    size = flat.shape[1]
    total = flat.sum(1, dtype=torch.float64)
    middle = start
    for _ in range(NUM_PASSES):
        threshold, ones, upper = _split(flat, middle, (total / size).to(flat.dtype))
        alpha = upper / ones.clamp_min(1)
        beta = (total - upper) / (size - ones).clamp_min(1)
        middle = ((alpha + beta) / 2).to(flat.dtype)
    is_split = (ones > 0) & (ones < size)
    mean = total / size
    lowest = torch.full_like(threshold, -torch.inf)
    return (
        torch.where(is_split, threshold, lowest),
        torch.where(is_split, alpha, mean).to(flat.dtype),
        torch.where(is_split, beta, mean).to(flat.dtype),
    )


def _split(flat: Tensor, middle: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return threshold, size and sum of the upper group, split at `middle`, or at the mean where that is empty."""
    ones = (flat >= middle.unsqueeze(1)).sum(1)
    threshold = torch.where((ones > 0) & (ones < flat.shape[1]), middle, mean)
    is_upper = flat >= threshold.unsqueeze(1)
    return threshold, is_upper.sum(1), torch.where(is_upper, flat, 0).sum(1, dtype=torch.float64)


def _dab_threshold_warm_fake(_weight: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scalars = torch.empty_like(start)
    return scalars, torch.empty_like(scalars), torch.empty_like(scalars)


def _dab_threshold_warm_cpu(weight: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not has_numba():
        return dab_threshold_warm_reference(weight, start)
    from kernels import dab_warm_numba

    threshold, alpha, beta = _dab_threshold_warm_fake(weight, start)
    dab_warm_numba.launch(weight, start, threshold, alpha, beta)
    return threshold, alpha, beta


def _dab_threshold_warm_cuda(weight: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not has_triton():
        return dab_threshold_warm_reference(weight, start)
    from kernels import dab_warm_triton

    threshold, alpha, beta = _dab_threshold_warm_fake(weight, start)
    dab_warm_triton.launch(filter_rows(weight), start.contiguous(), threshold, alpha, beta)
    return threshold, alpha, beta


torch.library.define(
    "dab::dab_threshold_warm", "(Tensor weight, Tensor start) -> (Tensor threshold, Tensor alpha, Tensor beta)"
)
torch.library.impl("dab::dab_threshold_warm", "CompositeExplicitAutograd", dab_threshold_warm_reference)
torch.library.impl("dab::dab_threshold_warm", "CPU", _dab_threshold_warm_cpu)
torch.library.impl("dab::dab_threshold_warm", "CUDA", _dab_threshold_warm_cuda)
torch.library.register_fake("dab::dab_threshold_warm", _dab_threshold_warm_fake)
