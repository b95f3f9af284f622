"""The form in which a packed network runs: signs stay bits from one binary convolution to the next.

Two rewrites, neither of which changes a bit of the result:

- threshold, convolution: the threshold packs the bits that the convolution reads, and writes no +-1.
- convolution, [ReLU], [dropout], threshold, convolution: the first one writes the bits itself. A ReLU between them only
  makes thresholds of 0 and below reached always: relu(y) >= t is y >= t for t > 0, and true for t <= 0.

Where a value is read by anything else, such as a shortcut, a pooling or a real-valued layer, it is written as before.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dabnn.models import Network
from dabnn.models.blocks import Chain, Shortcut
from dabnn.models.folding import SignThreshold
from dabnn.packed_conv import PackedConv2d
from kernels import pack_reached

_PASSING = (nn.ReLU, nn.Dropout, nn.Dropout2d, nn.Identity)


class PackReached(nn.Module):
    """A `SignThreshold` whose signs are packed: x (N, C, H, W) -> (N, H, W, ceil(C / 32)) int32.

    Attributes:
        threshold: (C,) float32.
        falls: (C,) bool.
    """

    threshold: Tensor
    falls: Tensor

    def __init__(self, norm: SignThreshold) -> None:
        super().__init__()
        self.register_buffer("threshold", norm.threshold)
        self.register_buffer("falls", norm.falls)

    def forward(self, x: Tensor) -> Tensor:
        """Return the packed signs."""
        return pack_reached(x, self.threshold.to(x.dtype), self.falls)


def fuse(net: Network) -> Network:
    """Returns a copy of a packed network, in evaluation, in which signs stay bits; it shares the tensors.

    Args:
        net: The network of a `dabnn.packed.PackedModel`.

    Returns:
        The copy: the same logits bit for bit, for inference only.
    """
    shared = {id(tensor): tensor for tensor in [*net.parameters(), *net.buffers()]}
    fused = copy.deepcopy(net, shared)
    for chain in [module for module in fused.modules() if isinstance(module, Chain)]:
        _fuse_chain(chain)
    return fused


def _fuse_chain(chain: Chain) -> None:
    starts = {module.start for module in chain if isinstance(module, Shortcut)}
    stages = list(chain.named_children())
    for index, (name, norm) in enumerate(stages[:-1]):
        next_name, conv = stages[index + 1]
        if not isinstance(norm, SignThreshold) or not isinstance(conv, PackedConv2d) or next_name in starts:
            continue
        before = _source(stages[:index], starts, is_read=name in starts)
        if before is None:
            setattr(chain, name, PackReached(norm))
            continue
        source, between = before
        source.emit(_after(norm.threshold, [module for _, module in between]), norm.falls)
        for passed, _ in [*between, (name, norm)]:
            setattr(chain, passed, nn.Identity())


def _source(
    stages: Sequence[tuple[str, nn.Module]], starts: set[str], *, is_read: bool
) -> tuple[PackedConv2d, list[tuple[str, nn.Module]]] | None:
    """Return the convolution whose output nothing but the threshold after `stages` reads, and what lies between."""
    between: list[tuple[str, nn.Module]] = []
    for name, module in reversed(stages):
        if is_read:
            return None
        if isinstance(module, PackedConv2d):
            return module, between
        if not isinstance(module, _PASSING):
            return None
        between.append((name, module))
        is_read = name in starts
    return None


def _after(threshold: Tensor, between: Sequence[nn.Module]) -> Tensor:
    """Return the threshold of a value that gives the same bit as `threshold` does after what lies between."""
    if not any(isinstance(module, nn.ReLU) for module in between):
        return threshold
    return torch.where(threshold <= 0, -torch.inf, threshold)
