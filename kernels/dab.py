"""The DAB weight quantizer: the best two-valued approximation of each filter.

Minimises ||w - (alpha * e + beta * (1 - e))||**2 over alpha, beta real and e in {0, 1}^n, for each filter w of n
weights (Distribution-Aware Binarization, Prabhu et al., WACV 2018, arXiv 1804.02941). For a given e the best alpha
and beta are the means of the two groups, and for a given number k of ones the best e holds the k largest weights. So
with the weights in descending order, P_k the sum of the first k and T = P_n, the optimum is

    arg max over k = 1 .. n - 1 of  P_k**2 / k + (T - P_k)**2 / (n - k)
                                    = T**2 / n + n * (P_k - k * T / n)**2 / (k * (n - k)),

which is exact two-means in one dimension. The second form is the one computed: it needs one pass and does not cancel
when the mean is large. Sums and the decision are float64. Left out: gradients and centring, which `dabnn.quantizers`
adds, the cheaper search from a known threshold (`kernels.dab_warm`), and the step of a layer in training, fused
(`kernels.dab_step`).

Versions: CPU tensors go to Numba, which sorts, CUDA tensors to Triton, which does not (`kernels.dab_triton`), all
others, and where these are not installed, to the reference. Their masks and thresholds are equal, except that of splits
whose gains agree to the rounding of float64 sums any may win; alpha and beta differ by that rounding at most, so that
float32 ones are all but always equal to the bit. Weights whose sums are exact in float64 give equal bits throughout.
"""

import importlib.util
from collections.abc import Sequence

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
    _check(weight, "weight")
    threshold, alpha, beta = dab_threshold(weight)
    _refuse_unless_finite(alpha, beta, "weight")
    return weight.detach() >= threshold.view(-1, *[1] * (weight.dim() - 1)), alpha, beta


def quantize_dab_many(weights: Sequence[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Finds what `quantize_dab` finds for each of several weights, such as all of a network's, together.

    On CUDA that is a launch for each width of program that the filters need (at most four, twice that where some
    addresses are odd), where one call a weight takes a launch, a comparison and a wait each.

    Args:
        weights: (F_i, ...) each, floating types that widen to the same of float32 and float64, on one device.

    Returns:
        (mask, alpha, beta) of each weight, as `quantize_dab` returns them. They share memory with each other.

    Raises:
        TypeError: a weight is not of a floating type, or float64 and narrower weights are mixed.
        ValueError: as `quantize_dab`, naming the weight, or the weights lie on several devices.
    """
    if not weights:
        return []
    for index, weight in enumerate(weights):
        _check(weight, f"weights[{index}]")
    reals = [weight.detach().to(torch.promote_types(weight.dtype, torch.float32)) for weight in weights]
    if len({real.dtype for real in reals}) > 1:
        raise TypeError(
            "weights: float64 and narrower types together; their values would need two types, so split them"
        )
    if len({real.device for real in reals}) > 1:
        raise ValueError("weights: on several devices; one launch runs on one, so call once for each device")
    mask, _, alpha, beta = torch.ops.dab.dab_many(reals)
    counts = [len(weight) for weight in weights]
    masks = [
        part.view(weight.shape) for part, weight in zip(mask.split([w.numel() for w in weights]), weights, strict=True)
    ]
    _refuse_unless_finite(alpha, beta, "weights")
    return list(zip(masks, alpha.split(counts), beta.split(counts), strict=True))


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


def has_triton() -> bool:
    """Returns whether the Triton kernels can be imported; without Triton CUDA tensors run the reference."""
    return importlib.util.find_spec("triton") is not None


def has_block_filters(weight: Tensor) -> bool:
    """Returns whether each filter of a weight (F, ...) is one block of memory, in any order that the kernels know."""
    return weight.is_contiguous() or (weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last))


def filter_rows(weight: Tensor) -> Tensor:
    """Returns a weight (F, ...) as (F, n), its filters in the order of memory where each is one block, else copied."""
    size = weight.shape[1:].numel()
    is_block = has_block_filters(weight)
    return weight.as_strided((len(weight), size), (size, 1)) if is_block else weight.flatten(1).contiguous()


def _check(weight: Tensor, name: str) -> None:
    if not weight.is_floating_point():
        raise TypeError(f"{name}: {weight.dtype}; quantize_dab takes a floating type")
    if weight.dim() < 2 or weight[:1].numel() == 0:
        raise ValueError(
            f"{name}: shape {tuple(weight.shape)}; expected (F, ...) with at least one filter and one weight each"
        )


def _refuse_unless_finite(alpha: Tensor, beta: Tensor, name: str) -> None:
    if not (torch.isfinite(alpha) & torch.isfinite(beta)).all():
        raise ValueError(
            f"{name}: holds NaN or infinite values; no threshold separates them, so look for a diverged step"
        )


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


def _dab_threshold_cuda(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if not has_triton():
        return dab_threshold_reference(weight)
    from kernels import dab_triton

    threshold, alpha, beta = _dab_threshold_fake(weight)
    dab_triton.launch(filter_rows(weight), threshold, alpha, beta)
    return threshold, alpha, beta


def _dab_many(weights: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    parts = [torch.ops.dab.dab_threshold(weight) for weight in weights]
    threshold, alpha, beta = (torch.cat(scalars) for scalars in zip(*parts, strict=True))
    rows = zip(weights, parts, strict=True)
    mask = torch.cat([(weight.flatten(1) >= scalars[0].unsqueeze(1)).flatten() for weight, scalars in rows])
    return mask, threshold, alpha, beta


def _dab_many_fake(weights: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mask = weights[0].new_empty(sum(weight.numel() for weight in weights), dtype=torch.bool)
    threshold = weights[0].new_empty(sum(weight.shape[0] for weight in weights))
    return mask, threshold, torch.empty_like(threshold), torch.empty_like(threshold)


def _dab_many_cuda(weights: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not has_triton():
        return _dab_many(weights)
    from kernels import dab_triton

    outputs = _dab_many_fake(weights)
    dab_triton.launch_many([weight.flatten(1).contiguous() for weight in weights], *outputs)
    return outputs


torch.library.define("dab::dab_threshold", "(Tensor weight) -> (Tensor threshold, Tensor alpha, Tensor beta)")
torch.library.impl("dab::dab_threshold", "CompositeExplicitAutograd", dab_threshold_reference)
torch.library.impl("dab::dab_threshold", "CPU", _dab_threshold_cpu)
torch.library.register_fake("dab::dab_threshold", _dab_threshold_fake)
torch.library.impl("dab::dab_threshold", "CUDA", _dab_threshold_cuda)
torch.library.define(
    "dab::dab_many", "(Tensor[] weights) -> (Tensor mask, Tensor threshold, Tensor alpha, Tensor beta)"
)
torch.library.impl("dab::dab_many", "CompositeExplicitAutograd", _dab_many)
torch.library.impl("dab::dab_many", "CUDA", _dab_many_cuda)
torch.library.register_fake("dab::dab_many", _dab_many_fake)
