r"""Straight-through estimators: a step function forward, a gradient that we choose backward.

A sign has gradient zero almost everywhere, so a network with one would not learn; the estimators here let the gradient
pass where the real value is small and stop it where a further push could not change the sign any more (Bengio et al.,
arXiv 1308.3432; the clipped form is Courbariaux et al., arXiv 1602.02830, equation 4).

At the boundary |x| = clip the gradient passes (the reference code of arXiv 1804.02941 stops it there: strict window).
"""

from typing import Any, cast

import torch
from torch import Tensor


def sign(x: Tensor) -> Tensor:
    """Return +1 where x >= 0 and -1 elsewhere, shape and dtype of x, so that a bit is always defined; no gradient.

    sign(0) = sign(-0.0) = +1, and NaN counts as -1, as in `kernels.pack_signs`.
    """
    return (x >= 0).to(x.dtype).mul_(2).sub_(1)


def sign_ste(x: Tensor) -> Tensor:
    r"""Return sign(x) in {-1, +1}, shape and dtype of x, with the clipped straight-through gradient.

    - forward: y = +1 where x >= 0, else -1.
    - gradient: dL/dx = dL/dy * 1[|x| <= 1].

    Source: arXiv 1602.02830, equation 4.
    """
    return cast(Tensor, _SignSTE.apply(x))  # type: ignore[no-untyped-call]


def clipped_ste(real: Tensor, quantized: Tensor, clip: float) -> Tensor:
    r"""Return `quantized`, with the gradient sent to `real` where it is within the clip.

    - forward: y = quantized, in the dtype of `real`.
    - gradient: dL/d real = dL/dy * 1[|real| <= clip]; `quantized` gets none.

    Args:
        real: the latent (centred) weight, any shape.
        quantized: its quantized form, same shape.
        clip: half width of the window, in units of the weight.

    Source: arXiv 1602.02830, section 1.3, which clips the latent weight in place instead; the window is the same.
    """
    return cast(Tensor, _ClippedSTE.apply(real, quantized, clip))  # type: ignore[no-untyped-call]


class _SignSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return sign(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x: Tensor = ctx.saved_tensors[0]
        return grad * (x.abs() <= 1)


class _ClippedSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, real: Tensor, quantized: Tensor, clip: float) -> Tensor:
        ctx.save_for_backward(real)
        ctx.clip = clip
        return quantized.to(real.dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        real: Tensor = ctx.saved_tensors[0]
        return grad * (real.abs() <= ctx.clip), None, None
