r"""Two-valued weights: each filter w of n weights becomes alpha where it reaches a threshold and beta elsewhere.

`binarize` is the one entry for finished codes; layers in training use its two parts, `subtract_center` (differentiable)
and `split` (no mask, no error figure). Each method is a pure function from weights to (threshold, alpha, beta); the
mathematics of `dab` lies in `kernels` and is not repeated here. Estimators lie in `dabnn.gradients`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from dabnn.choices import unknown_choice
from dabnn.errors import InvalidInputError
from kernels import dab_threshold, dab_threshold_warm, two_valued

CENTERS = ("none", "filter", "tap")
# (threshold, alpha, beta) of each filter, (F,) each and at least float32.
Split = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Code:
    """Weights reduced to one bit each and two scalars a filter.

    Attributes:
        mask: bool, the shape of the weight (F, ...); True where the value is alpha.
        alpha: (F,) upper value of each filter, at least float32.
        beta: (F,) lower value of each filter, same dtype.
        error: (F,) squared error sum((w - dense)^2) against the centred weight, same dtype.
    """

    mask: Tensor
    alpha: Tensor
    beta: Tensor
    error: Tensor

    def dense(self) -> Tensor:
        """Return the two-valued weight, shape of `mask`, dtype of `alpha`: alpha where mask, else beta."""
        return expand(self.mask, self.alpha, self.beta)


def expand(mask: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Return alpha where `mask` (F, ...) holds, else beta; alpha and beta are (F,) and give the dtype."""
    per_filter = (-1,) + (1,) * (mask.dim() - 1)
    return torch.where(mask, alpha.view(per_filter), beta.view(per_filter))


def subtract_center(weight: Tensor, center: str) -> Tensor:
    r"""Return the weight (F, C, ...) less its mean, in the weight's dtype; differentiable.

    - `none`: w unchanged.
    - `filter`: w - mean over the filter. Gradient: g - mean(g) over the filter.
    - `tap`: w - mean over the input channels at each kernel position, as the reference code of arXiv 1804.02941 does
      before every step. Gradient: g - mean(g) over the same channels.

    Raises:
        InvalidInputError: for an unknown center, or one that would turn every weight into zero.
    """
    if center == "none":
        return weight
    if center not in CENTERS:
        raise unknown_choice("binarize.center", center, CENTERS)
    check_center(center, weight.shape)
    dims = (1,) if center == "tap" else tuple(range(1, weight.dim()))
    return cast(Tensor, _SubtractMean.apply(weight, dims))  # type: ignore[no-untyped-call]


def check_center(center: str, weight_shape: torch.Size) -> None:
    """Raise InvalidInputError where subtracting this center would turn every weight of a filter into zero."""
    if center == "tap" and weight_shape[1] == 1:
        raise InvalidInputError(
            "binarize.center: tap subtracts the mean over the input channels, and this layer has one input channel a "
            f"group (weight {tuple(weight_shape)}), so that every weight would become zero. Use center=filter or none."
        )
    if center == "filter" and weight_shape[1:].numel() == 1:
        raise InvalidInputError(
            f"binarize.center: filter subtracts the mean of a filter, and these filters hold one weight (weight "
            f"{tuple(weight_shape)}), so that every weight would become zero. Use center=none."
        )


def binarize(weight: Tensor, method: str, center: str = "none") -> Code:
    r"""Return the two-valued code of each filter of a weight; carries no gradient.

    Methods, for one filter w of n weights with mean m:

    - `dab`: min over e in {0,1}^n, alpha, beta of ||w - (alpha e + beta (1 - e))||^2, the exact optimum: a threshold on
      w and the two signed group means (Distribution-Aware Binarization, arXiv 1804.02941, section 3). A constant
      filter has e = 1 and alpha = beta = its value.
    - `dab_warm`, `dab_learned`: the same optimum. They differ in training layers only, which start the search from the
      last step's threshold, or learn alpha and beta from there on (`dabnn.layers`).
    - `xnor`: e = [w >= 0], alpha = mean|w|, beta = -alpha (XNOR-Net, arXiv 1603.05279, section 3.1).
    - `xnor_centered`: e = [w >= m], alpha = mean|w - m|, beta = -alpha: xnor of w - m, and m is not added back, so the
      error against w holds n m^2 more than that of xnor on w - m.
    - `lsbq`: e = [w >= m], alpha, beta = m +- mean|w - m| (Least squares binary quantization, arXiv 2001.02786).
    - `adabin`: e = [w >= m], alpha, beta = m +- sqrt(mean (w - m)^2) (AdaBin, arXiv 2208.08084, section 3.2).
    - `sign`: e = [w >= 0], alpha = 1, beta = -1 (BinaryNet, arXiv 1602.02830).

    A weight equal to its threshold belongs to alpha, zero of either sign included. Filters of one weight: dab, lsbq
    and adabin return it, xnor its magnitude with its sign, xnor_centered zero.

    Args:
        weight: (F, C, ...) floating, on any device; one filter for each index of the first dimension.
        method: one of `QUANTIZERS`.
        center: what is subtracted first (see `subtract_center`); the code and its error then refer to the centred
            weight.

    Raises:
        InvalidInputError: for an unknown method or center, a weight that is not floating, is empty, has fewer than two
            dimensions or holds NaN or infinity.
    """
    check_weight(weight)
    with torch.no_grad():
        centered = subtract_center(weight, center)
        return encode(centered, split(centered, method))


def encode(centered: Tensor, parts: Split) -> Code:
    """Return the code of a centred weight (F, ...) for given thresholds and values; carries no gradient."""
    with torch.no_grad():
        threshold, alpha, beta = parts
        real = centered.to(threshold.dtype)
        error = (real - two_valued(real, threshold, alpha, beta)).square().flatten(1).sum(1)
        return Code(real >= threshold.view((-1,) + (1,) * (real.dim() - 1)), alpha, beta, error)


def split(weight: Tensor, method: str) -> Split:
    """Return (threshold, alpha, beta) of `binarize` for a weight that is centred already; carries no gradient.

    It serves the training step: no mask, no error figure, and no wait for an accelerator.

    Raises:
        InvalidInputError: for an unknown method, or a weight on the CPU, not compiled, that holds NaN or infinity.
    """
    check_method(method)
    with torch.no_grad():
        parts = _METHODS[method](weight.detach())
    return _checked(parts)


def split_warm(weight: Tensor, start: Tensor) -> Split:
    """Return (threshold, alpha, beta) as `split` with `dab`, searched for from `start` (F,); see `kernels.dab_warm`."""
    return _checked(dab_threshold_warm(weight, start))


def split_learned(weight: Tensor, alpha: Tensor, beta: Tensor) -> Split:
    """Return (threshold, alpha, beta) for given values (F,): each weight takes the nearer of the two, if alpha > beta.

    Gradients of alpha and beta are kept. A weight on the CPU that is not finite is refused as by `split`.
    """
    middle = (alpha.detach() + beta.detach()) / 2
    _checked((middle, weight.detach().flatten(1).sum(1), middle))
    return middle, alpha, beta


def with_gradient(weight: Tensor, method: str, parts: Split) -> Split:
    r"""Return the same (threshold, alpha, beta), with alpha and beta differentiable functions of the weight.

    The mask e is held fixed. For dab: alpha = w.e / K and beta = w.(1 - e) / (n - K), K = sum(e), so d alpha/dw = e / K
    and d beta/dw = (1 - e) / (n - K). For the others, the formulas of `binarize`; for `sign` there is nothing to
    differentiate.

    Args:
        weight: (F, C, ...) centred.
        method: what made `parts`.
        parts: from `split` or `split_warm`.
    """
    threshold, *values = parts
    is_dab = method in _DAB
    means = group_means(weight.to(threshold.dtype), threshold) if is_dab else _METHODS[method](weight)[1:]
    # The values stay those of the forward rule to the last bit; only the gradient is the formula's.
    alpha, beta = (mean + (value - mean).detach() for mean, value in zip(means, values, strict=True))
    return threshold, alpha, beta


def group_means(rows: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means (F,) of the values at or above the threshold (F,), and below; differentiable, 0 where none is.

    Args:
        rows: (F, ...) floating.
        threshold: (F,).
    """
    flat = rows.flatten(1)
    is_upper = flat.detach() >= threshold.unsqueeze(1)
    ones = is_upper.sum(1)
    upper = torch.where(is_upper, flat, 0).sum(1)
    lower = torch.where(is_upper, 0, flat).sum(1)
    return upper / ones.clamp_min(1), lower / (flat.shape[1] - ones).clamp_min(1)


class _SubtractMean(torch.autograd.Function):
    """w - mean(w), which is its own derivative; autograd would negate the whole gradient first."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dims: tuple[int, ...]) -> Tensor:
        ctx.dims = dims
        return weight - weight.mean(dims, keepdim=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad - grad.mean(ctx.dims, keepdim=True), None


def check_method(method: str) -> None:
    """Raise InvalidInputError, naming the nearest, unless `method` is a quantizer."""
    if method not in _METHODS:
        raise unknown_choice("binarize.weights", method, _METHODS)


def check_weight(weight: Tensor) -> None:
    """Raise InvalidInputError unless the weight is floating, (F, C, ...), not empty and finite."""
    if not weight.is_floating_point() or weight.dim() < 2 or weight.numel() == 0:
        raise InvalidInputError(
            f"weight: a {weight.dtype} tensor of shape {tuple(weight.shape)} cannot be binarized. It must be floating, "
            "of shape (filters, input channels, ...) and not empty."
        )
    if not bool(torch.isfinite(weight).all()):
        bad = int((~torch.isfinite(weight)).sum())
        raise InvalidInputError(
            f"weight: {bad} of {weight.numel()} values are NaN or infinite, and no two values approximate those. The "
            "training that made this weight has diverged; go back to an earlier checkpoint."
        )


def _checked(parts: Split) -> Split:
    """Return the parts, refused on the CPU unless finite.

    On an accelerator the look would wait for the device every step, and in a compiled network it would break the graph
    at every layer.
    """
    _, alpha, beta = parts
    looks = alpha.device.type == "cpu" and not torch.compiler.is_compiling()
    if looks and not bool((torch.isfinite(alpha) & torch.isfinite(beta)).all()):
        raise InvalidInputError(
            "weight: holds NaN or infinite values; no threshold separates them, so look for a diverged step."
        )
    return parts


def _xnor(weight: Tensor) -> Split:
    alpha = weight.abs().flatten(1).mean(1, dtype=_scalar_dtype(weight))
    return torch.zeros_like(alpha), alpha, -alpha


def _xnor_centered(weight: Tensor) -> Split:
    mean, deviation = _about_the_mean(weight)
    alpha = deviation.abs().mean(1)
    return mean.detach(), alpha, -alpha


def _lsbq(weight: Tensor) -> Split:
    mean, deviation = _about_the_mean(weight)
    spread = deviation.abs().mean(1)
    return mean.detach(), mean + spread, mean - spread


def _adabin(weight: Tensor) -> Split:
    mean, deviation = _about_the_mean(weight)
    # A norm, whose gradient at a constant filter is 0 where that of a square root is not finite.
    spread = torch.linalg.vector_norm(deviation, dim=1) / deviation.shape[1] ** 0.5
    return mean.detach(), mean + spread, mean - spread


def _sign(weight: Tensor) -> Split:
    alpha = torch.ones(weight.shape[0], dtype=_scalar_dtype(weight), device=weight.device)
    return torch.zeros_like(alpha), alpha, -alpha


def _about_the_mean(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (F,) and w - mean (F, n), at least in float32."""
    real = weight.to(_scalar_dtype(weight)).flatten(1)
    mean = real.mean(1)
    return mean, real - mean.unsqueeze(1)


def _scalar_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of alpha and beta: float32 for narrower weights, whose own type would round the means."""
    return torch.promote_types(weight.dtype, torch.float32)


_METHODS: Mapping[str, Callable[[Tensor], Split]] = {
    "dab": dab_threshold,
    "dab_warm": dab_threshold,
    "dab_learned": dab_threshold,
    "xnor": _xnor,
    "xnor_centered": _xnor_centered,
    "lsbq": _lsbq,
    "adabin": _adabin,
    "sign": _sign,
}
QUANTIZERS = tuple(_METHODS)
_DAB = ("dab", "dab_warm", "dab_learned")
