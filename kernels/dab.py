"""The DAB weight quantizer: the best two-valued approximation of each filter.

Minimises ||w - (alpha * e + beta * (1 - e))||**2 over alpha, beta real and e in {0, 1}^n, for each filter w of n
weights (Distribution-Aware Binarization, Prabhu et al., WACV 2018, arXiv 1804.02941). For a given e the best alpha
and beta are the means of the two groups, and for a given number k of ones the best e holds the k largest weights. So
with the weights in descending order, P_k the sum of the first k and T = P_n, the optimum is

    arg max over k = 1 .. n - 1 of  P_k**2 / k + (T - P_k)**2 / (n - k)
                                    = T**2 / n + n * (P_k - k * T / n)**2 / (k * (n - k)),

which is exact two-means in one dimension. The second form is the one computed: it needs one pass and does not cancel
when the mean is large. Sums and the decision are float64. Left out: gradients and centring, which `dabnn.quantizers`
adds, the cheaper search from a known threshold (`kernels.dab_warm`), and a Triton version (CUDA tensors run the
reference).
"""

import torch
from torch import Tensor

from kernels.packing import has_numba


def quantize_dab(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Finds the exact least-squares two-valued approximation of each filter.

    Equal weights are never split over the groups, so the mask is a threshold on w. Among equally good splits the one
    with the fewest ones wins. A filter of equal weights (one weight included) has mask all True and alpha = beta =
    its mean. No gradient.

    Args:
        weight: (F, ...), a floating type.

    Returns:
        mask: bool, the shape of `weight`; True where the value is alpha.
        alpha: (F,) mean of the upper group, in weight's type or float32, whichever is wider.
        beta: (F,) mean of the lower group, same type; beta <= alpha.

    Raises:
        TypeError: weight is not of a floating type.
        ValueError: a weight is NaN or infinite, or a filter has no weights.
    """
    if not weight.is_floating_point():
        raise TypeError(f"weight: {weight.dtype}; quantize_dab takes a floating type")
    if weight.dim() < 2 or weight[:1].numel() == 0:
        raise ValueError(
            f"weight: shape {tuple(weight.shape)}; expected (F, ...) with at least one filter and one weight each"
        )
    threshold, alpha, beta = dab_threshold(weight)
    if not (torch.isfinite(alpha) & torch.isfinite(beta)).all():
        raise ValueError(
            "weight: holds NaN or infinite values; no threshold separates them, so look for a diverged step"
        )
    return weight.detach() >= threshold.view(-1, *[1] * (weight.dim() - 1)), alpha, beta


def dab_threshold(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Finds the same optimum, its mask given as a threshold, without a look at the values: nothing waits for a device.

    Args:
        weight: (F, ...), a floating type, at least one weight a filter.

    Returns:
        threshold: (F,) smallest weight of the upper group, in weight's type or float32, whichever is wider; the mask
            is `weight >= threshold`.
        alpha: (F,) as `quantize_dab`; alpha or beta is not finite where a weight of the filter is not.
        beta: (F,) as `quantize_dab`.
    """
    real = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    threshold, alpha, beta = torch.ops.dab.dab_threshold(real)
    return threshold, alpha, beta


def quantize_dab_reference(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Plain-torch `quantize_dab` without its checks; a filter with a NaN or infinite weight gets such a scalar."""
    threshold, alpha, beta = dab_threshold_reference(weight)
    return weight >= threshold.view(-1, *[1] * (weight.dim() - 1)), alpha, beta


def dab_threshold_reference(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Plain-torch `dab_threshold`."""
    flat = weight.flatten(1)
    size = flat.shape[1]
    ordered = flat.sort(dim=1, descending=True).values
    prefix = ordered.double().cumsum(dim=1)
    total = prefix[:, -1:]
    ones = torch.arange(1, size + 1, dtype=torch.float64, device=weight.device)
    gain = (prefix - ones * (total / size)).square() / (ones * (size - ones)).clamp_min(1)
    is_edge = torch.zeros_like(ordered, dtype=torch.bool)
    is_edge[:, :-1] = ordered[:, :-1] > ordered[:, 1:]
    best = gain.masked_fill(~is_edge, -1.0).argmax(dim=1, keepdim=True)
    best = torch.where(is_edge.any(dim=1, keepdim=True), best, size - 1)

    upper = prefix.gather(1, best)
    num_lower = size - 1 - best
    alpha = upper / (best + 1)
    beta = torch.where(num_lower > 0, (total - upper) / num_lower.clamp_min(1), alpha)
    scalars = [value.squeeze(1).to(weight.dtype) for value in (ordered.gather(1, best), alpha, beta)]
    return scalars[0], scalars[1], scalars[2]


def _dab_threshold_fake(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scalars = weight.new_empty(weight.shape[0])
    return scalars, torch.empty_like(scalars), torch.empty_like(scalars)


def _dab_threshold_cpu(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not has_numba():
        return dab_threshold_reference(weight)
    from kernels import dab_numba

    threshold, alpha, beta = _dab_threshold_fake(weight)
    dab_numba.launch(weight, threshold, alpha, beta)
    return threshold, alpha, beta


torch.library.define("dab::dab_threshold", "(Tensor weight) -> (Tensor threshold, Tensor alpha, Tensor beta)")
torch.library.impl("dab::dab_threshold", "CompositeExplicitAutograd", dab_threshold_reference)
torch.library.impl("dab::dab_threshold", "CPU", _dab_threshold_cpu)
torch.library.register_fake("dab::dab_threshold", _dab_threshold_fake)
