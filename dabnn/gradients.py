r"""Straight-through estimators: a step function forward, a gradient that we choose backward.

A step has gradient zero almost everywhere, so a network with one would not learn. An estimator lets dL/dy pass to x
with a factor F(u), u = (x - middle) / width, as if the step were a smooth function there (arXiv 1308.3432):

- `clipped`: F = 1 where |u| <= 1, else 0 (Courbariaux et al., arXiv 1602.02830, equation 4). At the boundary the
  gradient passes (the reference code of arXiv 1804.02941 stops it there); the width is rounded to float32.
- `polynomial`: F = max(2 - 2 |u|, 0), the slope of Bi-Real Net's piecewise polynomial (arXiv 1808.00278, equation 6).
- `ede`: F = k t (1 - tanh(t u)^2) with t = 10^(2 p - 1), k = max(1 / t, 1) and p the share of the training done: wide
  at first, close to the step at the end (IR-Net, arXiv 1909.10788, section 3.3, T_min = 0.1, T_max = 10).
- `identity`: F = 1 (arXiv 1308.3432, section 4).

A wider window is not a weaker one: F is not divided by the width. What is left out: which layer uses which, and alpha
and beta (`dabnn.quantizers`).
"""

from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from kernels import two_valued
from kernels.dab_step import dab_step, dab_step_backward


@dataclass(frozen=True)
class Estimator:
    """One straight-through estimator.

    Attributes:
        name: clipped, polynomial, ede or identity.
        width: half width of its window, in units of x.
        progress: share of the training done, 0 to 1; only ede looks at it.
    """

    name: str = "clipped"
    width: float = 1.0
    progress: float = 0.0
    # First float32 above the width: `hardtanh_backward` stops the gradient at its bounds, and here it passes at them.
    _beyond: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Find the end of the window."""
        object.__setattr__(self, "_beyond", float(np.nextafter(np.float32(self.width), np.float32(np.inf))))

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        """Return grad * F(x / width), the shapes and dtypes of `grad`; see the module for F."""
        if self.name == "clipped":
            return cast(Tensor, torch.ops.aten.hardtanh_backward(grad, x, -self._beyond, self._beyond))
        if self.name == "polynomial":
            return (x / self.width).abs_().mul_(-2).add_(2).clamp_min_(0).mul_(grad)
        if self.name == "ede":
            steepness = 10.0 ** (2 * self.progress - 1)
            slope: Tensor = (x * (steepness / self.width)).tanh_().square_().neg_().add_(1)
            return slope.mul_(max(1 / steepness, 1) * steepness).mul_(grad)
        return grad


_CLIPPED = Estimator()


def sign(x: Tensor) -> Tensor:
    """Return +1 where x >= 0 and -1 elsewhere, shape and dtype of x, so that a bit is always defined; no gradient.

    sign(0) = sign(-0.0) = +1, and NaN counts as -1, as in `kernels.pack_signs`.
    """
    if torch.compiler.is_compiling():  # it fuses these, and takes no `out` that is channels-last
        return (x.detach() >= 0).to(x.dtype) * 2 - 1
    # Compared straight into x's dtype, one pass; a bool tensor in between costs two more.
    is_upper = torch.ge(x.detach(), 0, out=torch.empty_like(x))
    return is_upper.mul_(2).sub_(1)


def sign_ste(x: Tensor, estimator: Estimator = _CLIPPED) -> Tensor:
    r"""Return sign(x) in {-1, +1}, shape and dtype of x, with a straight-through gradient.

    - forward: y = +1 where x >= 0, else -1.
    - gradient: dL/dx = dL/dy * F(x / width); by default dL/dy * 1[|x| <= 1].
    """
    return cast(Tensor, _SignSTE.apply(x, estimator))  # type: ignore[no-untyped-call]


def two_valued_ste(
    real: Tensor,
    threshold: Tensor,
    alpha: Tensor,
    beta: Tensor,
    estimator: Estimator = _CLIPPED,
    middle: Tensor | None = None,
) -> Tensor:
    r"""Return alpha where real >= threshold, else beta, with gradients to all that carry one.

    For each row (filter), with e = 1[real >= threshold] held fixed:

    - forward: y = alpha e + beta (1 - e), in the dtype of `real`.
    - gradient: dL/d real = dL/dy * F((real - middle) / width), dL/d alpha = sum(dL/dy * e),
      dL/d beta = sum(dL/dy * (1 - e)); none to threshold and middle. Where alpha and beta are functions of `real`,
      autograd adds their share to dL/d real.

    Args:
        real: (F, ...) the (centred) latent weight.
        threshold: (F,).
        alpha: (F,).
        beta: (F,).
        estimator: F and its width.
        middle: (F,) of the windows; None for zero.
    """
    arguments = (real, threshold.detach(), alpha, beta, estimator, None if middle is None else middle.detach())
    return cast(Tensor, _TwoValuedSTE.apply(*arguments))  # type: ignore[no-untyped-call]


def two_valued_reference(weight: Tensor, real: Tensor, threshold: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    r"""Return alpha where real >= threshold, else beta, with the gradient of the reference code of arXiv 1804.02941.

    For a filter of n weights on C input channels, K of them at or above the threshold:

        dL/dw = dL/dy * (1 - 1/C) * (|alpha| 1[|real| < 1] + 1/K)        where real >= threshold
        dL/dw = dL/dy * (1 - 1/C) * (|beta| 1[|real| < 1] + 1/(n - K))   elsewhere

    It is element-wise: 1/K stands in for the derivative of the group mean, which would spread sum(dL/dy)/K over the
    group, and 1 - 1/C for that of centring, whose own derivative is therefore left out. The reference code counts
    weights of exactly zero, which are in the upper group where the threshold is below zero, in n - K instead.

    Args:
        weight: (F, C, ...) the latent weight, which gets the gradient.
        real: the centred weight, same shape; none.
        threshold: (F,), none.
        alpha: (F,), none.
        beta: (F,), none.
    """
    arguments = (weight, real.detach(), threshold.detach(), alpha.detach(), beta.detach())
    return cast(Tensor, _TwoValuedReference.apply(*arguments))  # type: ignore[no-untyped-call]


def has_dab_ste(weight: Tensor, estimator: Estimator, gradient: str) -> bool:
    """Return whether `dab_ste` is the way to train this weight: on a GPU, and with a rule that it knows."""
    has_rule = estimator.name in ("clipped", "identity") and gradient in ("straight_through", "means")
    return weight.is_cuda and weight.dtype in (torch.float32, torch.float64) and has_rule


def dab_ste(weight: Tensor, center: str, estimator: Estimator, *, is_about_threshold: bool, has_means: bool) -> Tensor:
    r"""Return the DAB form of a weight, centring, search and gradient in one operator each way (`kernels.dab_step`).

    With c = `dabnn.quantizers.subtract_center(weight, center)` and (t, alpha, beta) its exact optimum:

    - forward: y = alpha where c >= t, else beta.
    - gradient: that of `two_valued_ste(c, t, alpha, beta, estimator, middle)`, followed by the chain rule of centring.

    Args:
        weight: (F, C, ...), float32 or float64.
        center: none, filter or tap.
        estimator: clipped or identity.
        is_about_threshold: whether the middle of the windows is (alpha + beta) / 2 of the filter rather than 0.
        has_means: whether alpha and beta are functions of the weight (the rule `means` of `dabnn.layers`).
    """
    arguments = (weight, center, estimator, is_about_threshold, has_means)
    return cast(Tensor, _DabSTE.apply(*arguments))  # type: ignore[no-untyped-call]


class _SignSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, estimator: Estimator) -> Tensor:
        ctx.save_for_backward(x)
        ctx.estimator = estimator
        return sign(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x: Tensor = ctx.saved_tensors[0]
        return ctx.estimator.backward(grad, x), None


class _TwoValuedSTE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        real: Tensor,
        threshold: Tensor,
        alpha: Tensor,
        beta: Tensor,
        estimator: Estimator,
        middle: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(real, threshold, middle)
        ctx.estimator = estimator
        return _dense(real, threshold, alpha, beta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        real, threshold, middle = ctx.saved_tensors
        x = real if middle is None else real - _per_row(middle.to(real.dtype), real)
        to_real = ctx.estimator.backward(grad, x) if ctx.needs_input_grad[0] else None
        if not (ctx.needs_input_grad[2] or ctx.needs_input_grad[3]):
            return to_real, None, None, None, None, None
        sums = grad.to(threshold.dtype).flatten(1)
        is_upper = real.to(threshold.dtype) >= _per_row(threshold, real)
        to_alpha = (sums * is_upper.flatten(1)).sum(1)
        return to_real, None, to_alpha, sums.sum(1) - to_alpha, None, None


class _DabSTE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, center: str, estimator: Estimator, is_about_threshold: bool, has_means: bool
    ) -> Tensor:
        dense, *saved = dab_step(weight, center)
        ctx.save_for_backward(*saved)
        ctx.options = {
            "center": center,
            "width": estimator.width if estimator.name == "clipped" else float("inf"),
            "is_about_threshold": is_about_threshold,
            "has_means": has_means,
        }
        return dense

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return dab_step_backward(grad, *ctx.saved_tensors, **ctx.options), None, None, None, None


class _TwoValuedReference(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, real: Tensor, threshold: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:  # noqa: ARG004
        ctx.save_for_backward(real, threshold, alpha, beta)
        return _dense(real, threshold, alpha, beta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        real, threshold, alpha, beta = ctx.saved_tensors
        is_upper = real.to(threshold.dtype) >= _per_row(threshold, real)
        ones = is_upper.flatten(1).sum(1)
        num_lower = real[0].numel() - ones
        is_inside = real.abs() < 1
        upper, lower = (
            _per_row(value.abs(), real) * is_inside + _per_row(1 / count.clamp_min(1), real)
            for value, count in ((alpha, ones), (beta, num_lower))
        )
        factor = torch.where(is_upper, upper, lower) * (1 - 1 / real.shape[1])
        return (grad * factor).to(grad.dtype), None, None, None, None


def _dense(real: Tensor, threshold: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """Return the two-valued form in the dtype of `real`, decided and computed in that of the threshold."""
    dtype = threshold.dtype
    return two_valued(real.to(dtype), threshold, alpha.to(dtype), beta.to(dtype)).to(real.dtype)


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    return values.view((-1,) + (1,) * (like.dim() - 1))
