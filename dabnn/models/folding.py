"""Batch normalisation as a packed model keeps it: a threshold where only its sign is read, else a scale and a shift.

In evaluation BN is s x + t with s = weight / sqrt(var + eps) and t = bias - mean s, a channel: two numbers for four.
Both are read off torch's own BN, so that the folded one gives the same bits on the CPU (a GPU may round otherwise).
Before a sign one number and a direction do: sign(s x + t) is monotone in x, so there is a least float32 x from where it
is +1 (s > 0) or -1 (s < 0). It is found by bisection on the BN itself, so that its rounding is part of the answer.
"""

import copy
import itertools
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dabnn.layers import BinaryConv2d
from dabnn.models.blocks import Chain, Shortcut

# Positions a channel, since torch's evaluation of single ones takes another path.
_MAP = (4, 4)
_LARGEST = torch.finfo(torch.float32).max
# Added to a variance of 1 it is nothing, in double precision too; torch 2.11 takes no 0.
_NO_EPS = 2.0**-100


class SignThreshold(nn.Module):
    """The sign of a folded BN: x (N, C, H, W) -> +-1, in the dtype of x; no gradient.

    y = +1 where x >= threshold, else -1; the other way round in channels that fall.

    Attributes:
        threshold: (C,) float32; -inf for always, inf for never.
        falls: (C,) bool.
    """

    threshold: Tensor
    falls: Tensor

    def __init__(self, threshold: Tensor, falls: Tensor) -> None:
        super().__init__()
        self.register_buffer("threshold", threshold)
        self.register_buffer("falls", falls)

    def forward(self, x: Tensor) -> Tensor:
        """Return the signs."""
        reached = x >= self.threshold.view(-1, 1, 1)
        return (reached ^ self.falls.view(-1, 1, 1)).to(x.dtype).mul_(2).sub_(1)


def sign_norms(net: nn.Module) -> set[str]:
    """Return the paths of the BN of which nothing but the sign is read: by the binary convolution right after it."""
    paths = set()
    for path, chain in net.named_modules():
        if not isinstance(chain, Chain):
            continue
        starts = {module.start for module in chain if isinstance(module, Shortcut)}
        for (name, norm), (next_name, conv) in itertools.pairwise(chain.named_children()):
            if isinstance(norm, nn.BatchNorm2d) and _reads_sign(conv) and next_name not in starts:
                paths.add(f"{path}.{name}" if path else name)
    return paths


def _reads_sign(module: nn.Module) -> bool:
    return isinstance(module, BinaryConv2d) and module.binary_input and module.options.input_quantizer == "sign"


@torch.no_grad()
def fold(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return scale and shift (C,) float32 of a BN in evaluation, as torch itself rounds them."""
    unshifted = copy.deepcopy(norm)
    unshifted.running_mean = torch.zeros_like(_statistics(norm)[0])
    unshifted.bias = None  # type: ignore[assignment] # torch declares it as never None, and has it None without affine
    ones = torch.ones_like(_statistics(norm)[0])
    return _evaluation(unshifted)(ones), _evaluation(norm)(torch.zeros_like(ones))


def unfold(scale: Tensor, shift: Tensor) -> nn.BatchNorm2d:
    """Return a BN that computes scale * x + shift in evaluation; both (C,) float32."""
    norm = nn.BatchNorm2d(len(scale), eps=_NO_EPS)
    norm.weight, norm.bias = nn.Parameter(scale), nn.Parameter(shift)
    return norm


@torch.no_grad()
def find_threshold(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return (threshold (C,) float32, falls (C,) bool) of the sign of a BN in evaluation, as in `SignThreshold`."""
    scale, _ = fold(norm)
    falls = scale < 0
    evaluate = _evaluation(norm)
    return least_reached(lambda x: (evaluate(x) >= 0) ^ falls, torch.full_like(scale, _LARGEST)), falls


@torch.no_grad()
def least_reached(is_reached: Callable[[Tensor], Tensor], largest: Tensor) -> Tensor:
    """Return the least float32 a channel from where a condition holds, by bisection over all of them.

    Args:
        is_reached: (C,) float32 to (C,) bool; once true in a channel, it stays so for all that is larger.
        largest: (C,) float32, one value: search from its negative to it.

    Returns:
        (C,) float32; -inf where the condition always holds, inf where it never does.
    """
    highest = torch.full_like(largest, _key(largest[0]), dtype=torch.int64)
    low, high = -highest, highest + 1
    always = is_reached(_float(low))
    while bool((high - low > 1).any()):
        middle = (low + high) // 2
        reached = is_reached(_float(middle))
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    threshold = torch.where(high > highest, torch.inf, _float(high.minimum(highest)))
    return torch.where(always, -torch.inf, threshold)


def _evaluation(norm: nn.BatchNorm2d) -> Callable[[Tensor], Tensor]:
    """Return the function (C,) -> (C,) that a BN is in evaluation, one value a channel."""
    mean, variance = _statistics(norm)

    def evaluate(x: Tensor) -> Tensor:
        images = x.view(1, -1, 1, 1).expand(1, -1, *_MAP).contiguous()
        out = F.batch_norm(images, mean, variance, norm.weight, norm.bias, training=False, eps=norm.eps)
        return out[0, :, 0, 0].clone()

    return evaluate


def _statistics(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    return cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)


def _key(x: Tensor) -> int:
    return int(x.view(torch.int32).item())


def _float(key: Tensor) -> Tensor:
    """Return the float32 at a place in the order of all of them: 0 at 0, its neighbours at -1 and 1."""
    magnitude = key.abs().to(torch.int32).view(torch.float32)
    return torch.where(key < 0, -magnitude, magnitude)
