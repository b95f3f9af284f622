"""The DAB weight quantizer: the best two-valued approximation of each filter.

Minimises ||w - (alpha * e + beta * (1 - e))||**2 over alpha, beta real and e in {0, 1}^n, for each filter w of n
weights (Distribution-Aware Binarization, Prabhu et al., WACV 2018, arXiv 1804.02941). For a given e the best alpha
and beta are the means of the two groups, and for a given number k of ones the best e holds the k largest weights. So
with the weights in descending order, P_k the sum of the first k and T = P_n, the optimum is

    arg max over k = 1 .. n - 1 of  P_k**2 / k + (T - P_k)**2 / (n - k)
                                    = T**2 / n + n * (P_k - k * T / n)**2 / (k * (n - k)),

which is exact two-means in one dimension. The second form is the one computed: it needs one pass and does not cancel
when the mean is large. Sums and the decision are float64. Left out: gradients and centring, which `dabnn.quantizers`
adds, and a Triton version (CUDA tensors run the reference).
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
    real = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    mask, alpha, beta = torch.ops.dab.quantize_dab(real)
    if not (torch.isfinite(alpha) & torch.isfinite(beta)).all():
        raise ValueError(
            "weight: holds NaN or infinite values; no threshold separates them, so look for a diverged step"
        )
    return mask, alpha, beta


def quantize_dab_reference(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Plain-torch `quantize_dab` without its checks; a filter with a NaN or infinite weight gets such a scalar."""
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

    mask = flat >= ordered.gather(1, best)
    upper = prefix.gather(1, best)
    num_lower = size - 1 - best
    alpha = upper / (best + 1)
    beta = torch.where(num_lower > 0, (total - upper) / num_lower.clamp_min(1), alpha)
    return mask.view(weight.shape), alpha.squeeze(1).to(weight.dtype), beta.squeeze(1).to(weight.dtype)


def _quantize_dab_fake(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scalars = weight.new_empty(weight.shape[0])
    return weight.new_empty(weight.shape, dtype=torch.bool), scalars, torch.empty_like(scalars)


def _quantize_dab_cpu(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not has_numba():
        return quantize_dab_reference(weight)
    from kernels import dab_numba

    alpha = weight.new_empty(weight.shape[0])
    beta = torch.empty_like(alpha)
    threshold = torch.empty_like(alpha)
    dab_numba.launch(weight, threshold, alpha, beta)
    mask = weight >= threshold.view(-1, *[1] * (weight.dim() - 1))
    return mask, alpha, beta


torch.library.define("dab::quantize_dab", "(Tensor weight) -> (Tensor mask, Tensor alpha, Tensor beta)")
torch.library.impl("dab::quantize_dab", "CompositeExplicitAutograd", quantize_dab_reference)
torch.library.impl("dab::quantize_dab", "CPU", _quantize_dab_cpu)
torch.library.register_fake("dab::quantize_dab", _quantize_dab_fake)
