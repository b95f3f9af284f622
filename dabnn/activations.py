"""What stands round a binary convolution: activations with learned shifts, and the forms of binary inputs."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
