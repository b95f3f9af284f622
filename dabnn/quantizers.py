r"""Two-valued weights: each filter w of n weights becomes alpha where a mask holds and beta elsewhere.

`binarize` is the one entry for finished codes; layers in training use its two parts, `subtract_center` (differentiable)
and `quantize` (no error figure). Each method is a pure function from weights to (mask, alpha, beta); the mathematics of
`dab` lies in `kernels` and is not repeated here. Gradients lie in `dabnn.gradients`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dabnn.choices import unknown_choice
from dabnn.errors import InvalidInputError
from kernels import quantize_dab

CENTERS = ("none", "filter", "tap")
QUANTIZERS = ("dab", "dab_warm", "dab_learned", "xnor", "xnor_centered", "lsbq", "adabin", "sign")


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
    return weight - weight.mean(dims, keepdim=True)


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

    Methods, for one filter w of n weights:

    - `dab`: min over e in {0,1}^n, alpha, beta of ||w - (alpha e + beta (1 - e))||^2, the exact optimum: a threshold on
      w and the two signed group means (Distribution-Aware Binarization, arXiv 1804.02941, section 3). A constant
      filter has e = 1 and alpha = beta = its value.
    - `xnor`: e = [w >= 0], alpha = mean|w|, beta = -alpha (XNOR-Net, arXiv 1603.05279, section 3.1).
    - `sign`: e = [w >= 0], alpha = 1, beta = -1 (BinaryNet, arXiv 1602.02830). In both, zero belongs to alpha.

    Args:
        weight: (F, C, ...) floating, on any device; one filter for each index of the first dimension.
        method: dab, xnor or sign.
        center: what is subtracted first (see `subtract_center`); the code and its error then refer to the centred
            weight.

    Raises:
        InvalidInputError: for an unknown method or center, a weight that is not floating, is empty, has fewer than two
            dimensions or holds NaN or infinity.
    """
    _check_weight(weight)
    with torch.no_grad():
        centered = subtract_center(weight, center)
        mask, alpha, beta = quantize(centered, method)
        error = (centered - expand(mask, alpha, beta)).square().flatten(1).sum(1)
    return Code(mask, alpha, beta, error)


def quantize(weight: Tensor, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return (mask, alpha, beta) of `binarize` for a weight that is centred already, without checks or error figure.

    It serves the training step, which needs neither; gradients do not flow through it.
    """
    check_method(method)
    return _METHODS[method](weight.detach())


def check_method(method: str) -> None:
    """Raise InvalidInputError, naming the nearest, unless `method` is a quantizer."""
    if method not in _METHODS:
        raise unknown_choice("binarize.weights", method, _METHODS)


def _check_weight(weight: Tensor) -> None:
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


def _dab(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    try:
        return quantize_dab(weight.to(_scalar_dtype(weight)))
    except ValueError as error:
        raise InvalidInputError(str(error)) from error


def _xnor(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    alpha = weight.abs().flatten(1).mean(1, dtype=_scalar_dtype(weight))
    return weight >= 0, alpha, -alpha


def _xnor_centered(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mask, _, deviation = _about_the_mean(weight)
    alpha = deviation.abs().mean(1)
    return mask, alpha, -alpha


def _lsbq(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mask, mean, deviation = _about_the_mean(weight)
    spread = deviation.abs().mean(1)
    return mask, mean + spread, mean - spread


def _adabin(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mask, mean, deviation = _about_the_mean(weight)
    spread = deviation.square().mean(1).sqrt()
    return mask, mean + spread, mean - spread


def _about_the_mean(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mask w >= mean, the mean (F,) and w - mean (F, n), the latter two at least in float32."""
    real = weight.to(_scalar_dtype(weight)).flatten(1)
    mean = real.mean(1, keepdim=True)
    deviation = real - mean
    return (deviation >= 0).view(weight.shape), mean.squeeze(1), deviation


def _sign(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    alpha = torch.ones(weight.shape[0], dtype=_scalar_dtype(weight), device=weight.device)
    return weight >= 0, alpha, -alpha


def _scalar_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of alpha and beta: float32 for narrower weights, whose own type would round the means."""
    return torch.promote_types(weight.dtype, torch.float32)


_METHODS: Mapping[str, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]] = {
    "dab": _dab,
    "dab_warm": _dab,
    "dab_learned": _dab,
    "xnor": _xnor,
    "xnor_centered": _xnor_centered,
    "lsbq": _lsbq,
    "adabin": _adabin,
    "sign": _sign,
}
