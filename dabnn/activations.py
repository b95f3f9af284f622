"""What stands round a binary convolution: activations with learned shifts, and the forms of binary inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dabnn.gradients import Estimator, sign_ste, two_valued_ste
from dabnn.quantizers import group_means


class RPReLU(nn.Module):
    r"""A PReLU with learned shifts before and after: y = PReLU(x - shift_in) + shift_out, all a channel.

    With s_c the slope of channel c and u = x - shift_in_c: y = u + shift_out_c where u > 0, else s_c u + shift_out_c.
    Input and output (N, C, ...), in the dtype of the input under autocast and of the parameters otherwise. Gradients
    are the exact ones. At the start shift_in = shift_out = 0 and slope = 0.25, which is `nn.PReLU`.

    Source: ReActNet, arXiv 2003.03488, equation 4 and figure 4.

    Attributes:
        shift_in: (C,).
        slope: (C,).
        shift_out: (C,).
    """

    def __init__(self, num_channels: int) -> None:
        """Make the activation of `num_channels` channels."""
        super().__init__()
        self.shift_in = nn.Parameter(torch.zeros(num_channels))
        self.slope = nn.Parameter(torch.full((num_channels,), 0.25))
        self.shift_out = nn.Parameter(torch.zeros(num_channels))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the parent's name, callable by keyword
        """Return the activation of (N, C, ...)."""
        shape = (1, -1) + (1,) * (input.dim() - 2)
        shift_in, shift_out = (shift.to(input.dtype).view(shape) for shift in (self.shift_in, self.shift_out))
        return F.prelu(input - shift_in, self.slope.to(input.dtype)) + shift_out

    def extra_repr(self) -> str:
        """Return the number of channels."""
        return str(len(self.slope))


@dataclass(frozen=True, eq=False)
class InputCode:
    """A binary input as bits and two scalars a sample: offset + scale * sign(real).

    Attributes:
        real: (N, C, H, W), the values whose signs are taken.
        scale: (N, 1, 1, 1) float32, or None for 1.
        offset: (N, 1, 1, 1) float32, or None for 0.
    """

    real: Tensor
    scale: Tensor | None = None
    offset: Tensor | None = None


def input_code(x: Tensor, quantizer: str, shift: Tensor | None = None) -> InputCode:
    r"""Return the code of an input (N, C, H, W); carries no gradient.

    - `sign`: sign(x).
    - `rsign`: sign(x - shift), shift learned, one a channel (ReActNet, arXiv 2003.03488, equation 3).
    - `two_valued`: with u = x - (mean of x over the channels, at each position), each sample has two values: alpha, the
      mean of its u >= 0, and beta, the mean of its u < 0, over all channels and positions (the two-valued activation of
      the reference code of arXiv 1804.02941). scale = (alpha - beta) / 2, offset = (alpha + beta) / 2.

    Args:
        x: floating.
        quantizer: sign, rsign or two_valued.
        shift: (C,), for rsign.
    """
    with torch.no_grad():
        if quantizer == "sign":
            return InputCode(x)
        if quantizer == "rsign":
            return InputCode(_shifted(x, shift))
        real = _channel_centered(x)
        zeros = real.new_zeros(real.shape[0])  # not len, which a tracer would take for a constant
        alpha, beta = (value.view(-1, 1, 1, 1) for value in group_means(real, zeros))
        return InputCode(real, (alpha - beta) / 2, (alpha + beta) / 2)


def binary_input(x: Tensor, quantizer: str, shift: Tensor | None, estimator: Estimator) -> Tensor:
    r"""Return the binary form of an input (N, C, H, W) for training, its shape and dtype, with a gradient.

    Values are those of `input_code`. Gradients, F the estimator's factor (`dabnn.gradients`):

    - `sign`: dL/dx = dL/dy F(x).
    - `rsign`: dL/dx = dL/dy F(x - shift), dL/d shift_c = -sum of it over samples and positions of channel c.
    - `two_valued`: dL/du = dL/dy F(u) + (mean of dL/dy over the entries of the same sample and sign), since alpha and
      beta are means of u, and dL/dx = dL/du - (its mean over the channels). The reference code multiplies F by |alpha|
      or |beta|, gives each entry 1/K of its own gradient in place of the group's mean, and gives the upper entries the
      lower group's factor as well, which is a defect.
    """
    if quantizer == "sign":
        return sign_ste(x, estimator)
    if quantizer == "rsign":
        return sign_ste(_shifted(x, shift), estimator).to(x.dtype)
    real = _channel_centered(x)
    zeros = real.new_zeros(real.shape[0])
    return two_valued_ste(real, zeros, *group_means(real, zeros), estimator).to(x.dtype)


def _shifted(x: Tensor, shift: Tensor | None) -> Tensor:
    return x if shift is None else x - shift.view(1, -1, 1, 1)


def _channel_centered(x: Tensor) -> Tensor:
    real = x.to(torch.promote_types(x.dtype, torch.float32))
    return real - real.mean(1, keepdim=True)
