"""How a network is put together: chains with shortcuts, branches, and the order of the layers round a convolution.

Two block orders, by whether a convolution of the variant takes sign inputs:

- reference: real input conv, BN, activation; sign input BN, sign, conv, activation (arXiv 1804.02941). The sign is
  inside the convolution (`dabnn.layers.BinaryConv2d`), which a layer plan puts in later.
- bireal: real input as above; sign input sign, conv, BN, + what went into the sign, activation (Bi-Real Net,
  arXiv 1808.00278). Where the convolution changes the shape, the shortcut averages over positions and repeats or cuts
  channels, without parameters. Since no BN stands before the sign, a ReLU there would leave only +1: it is left out,
  as in that paper, unless the activation is an RPReLU (ReActNet, arXiv 2003.03488), which keeps negative numbers. For
  the same reason a max-pool between a convolution and a sign goes before the BN, and dropout there is left out: all
  that it drops would be +1.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn

from dabnn.activations import RPReLU
from dabnn.models.family import Shape, Stages, Variant


class Chain(nn.Sequential):
    """Modules run one after the other; a `Shortcut` among them also receives what went into the stage it starts at."""

    def __init__(self, stages: Stages) -> None:
        super().__init__()
        for name, module in stages.items():
            self.add_module(name, module)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the parent's name, callable by keyword
        """Return what the last stage returns."""
        starts = {module.start for module in self if isinstance(module, Shortcut)}
        kept: dict[str, Tensor] = {}
        x = input
        for name, module in self._modules.items():
            if name in starts:
                kept[name] = x
            x = x + module(kept[module.start]) if isinstance(module, Shortcut) else module(x)
        return x


class Shortcut(Chain):
    """A way round the stages of the chain that it stands in: its output is added to what the stage before it returns.

    Attributes:
        start: name of the stage in that chain whose input is the shortcut's input.
    """

    def __init__(self, start: str, stages: Stages) -> None:
        super().__init__(stages)
        self.start = start


class Branches(nn.ModuleDict):
    """Modules that read the same input; their outputs are concatenated over channels, in order."""

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, sum of the branches' channels, H', W') of an input (N, C, H, W)."""
        return torch.cat([branch(x) for branch in self.values()], dim=1)


class RepeatChannels(nn.Module):
    """(N, C, H, W) -> (N, num_channels, H, W): all channels over and over, cut at the end."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.num_channels = num_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return channel c mod C of x at channel c."""
        return x.repeat(1, math.ceil(self.num_channels / x.shape[1]), 1, 1)[:, : self.num_channels]


class Blocks:
    """Lays out the convolutions of one network, in the order of their numbers.

    Attributes:
        variant: which convolutions take sign inputs.
        shape: the user's sizes.
        is_bireal: whether the block order is bireal, not reference.
        activation: relu or rprelu; None for relu, left out where the class of the order says so.
    """

    def __init__(self, variant: Variant, shape: Shape, block: str, activation: str | None) -> None:
        self.variant = variant
        self.shape = shape
        self.is_bireal = block == "bireal"
        self.activation = activation
        self._num_convs = 0

    def unit(
        self,
        suffix: object,
        conv: nn.Conv2d,
        *,
        norm: bool = True,
        norm_first: bool = False,
        eps: float = 1e-5,
        pool: nn.MaxPool2d | None = None,
        close: bool = True,
    ) -> Stages:
        """Return the next convolution with its normalisation, shortcut and activation, in the variant's order.

        Args:
            suffix: what follows conv, bn, add, relu and pool in the names of the stages.
            conv: the convolution.
            norm: whether there is a BN if the input is real; with a sign input there always is.
            norm_first: in reference order, whether the BN of a real input stands before the convolution, too.
            eps: of the BN.
            pool: what follows.
            close: whether shortcut and activation follow; False leaves them to a family that has its own shortcuts.
        """
        self._num_convs += 1
        has_sign = self._num_convs in self.variant.signs
        has_shortcut = has_sign and self.is_bireal
        name, bn = f"conv{suffix}", f"bn{suffix}"
        pools: Stages = {} if pool is None else {f"pool{suffix}": pool}
        early = pools if self._goes_unactivated() else {}
        if (has_sign or norm_first) and not has_shortcut:
            stages: Stages = {bn: nn.BatchNorm2d(conv.in_channels, eps), name: conv}
        else:
            norms: Stages = {bn: nn.BatchNorm2d(conv.out_channels, eps)} if norm or has_sign else {}
            stages = {name: conv} | early | norms
        if not close:
            return stages
        if has_shortcut:
            stages[f"add{suffix}"] = Shortcut(name, free_shortcut(conv) | _averages(early))
        return stages | self.act(suffix, conv.out_channels) | pools

    def act(self, suffix: object, num_channels: int) -> Stages:
        """Return the activation before the next convolution; nothing where a ReLU would make its signs constant."""
        if self.activation == "rprelu":
            return {f"rprelu{suffix}": RPReLU(num_channels)}
        return {} if self._goes_unactivated() else {f"relu{suffix}": nn.ReLU()}

    def dropout(self, suffix: object, layer: nn.Dropout | nn.Dropout2d) -> Stages:
        """Return dropout before the next convolution; nothing where it would make dropped inputs +1 by their sign."""
        return {} if self._goes_unactivated() else {f"dropout{suffix}": layer}

    def _goes_unactivated(self) -> bool:
        """Return whether the last convolution's output goes to a sign with no BN before it."""
        return self.is_bireal and self._num_convs + 1 in self.variant.signs


def free_shortcut(conv: nn.Conv2d) -> Stages:
    """Return a shortcut without parameters from the input of a convolution to the shape of its output.

    Positions are averaged over the stride, or over the kernel's reach where there is no padding, so that the sizes
    agree for every image size.
    """
    stages: Stages = {}
    (kernel, _), (stride, _) = conv.kernel_size, conv.stride
    if kernel == 1 + 2 * int(conv.padding[0]):
        if stride > 1:
            stages["pool"] = nn.AvgPool2d(stride, ceil_mode=True)
    else:
        stages["pool"] = nn.AvgPool2d(kernel, stride, int(conv.padding[0]), count_include_pad=False)
    if conv.in_channels != conv.out_channels:
        stages["repeat"] = RepeatChannels(conv.out_channels)
    return stages


def _averages(pools: Stages) -> Stages:
    """Return average pools in place of max-pools, which would move a shortcut to one side of zero."""
    pairs = ((name, cast(nn.MaxPool2d, pool)) for name, pool in pools.items())
    return {name: nn.AvgPool2d(pool.kernel_size, pool.stride, pool.padding) for name, pool in pairs}
