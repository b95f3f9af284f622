"""Whether all ranks hold the same bits: a 64-bit digest of the codes of all binary layers, compared at every step.

DDP gives every rank the same gradients, so equal latent weights stay equal, and so do the bits made from them. Faulty
memory, an operation that is not deterministic or a program that changes weights on one rank break that without any
error: the ranks then train different networks. The digest covers every mask bit and the bit patterns of alpha and
beta as the forward pass of the step used them. Left out: the exchange itself, which the training loop does together
with its other flags.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dabnn.distributed import World
from dabnn.layers import BinaryConv2d
from dabnn.plans import numbered_convs

Code = tuple[Tensor, Tensor, Tensor]

_COLUMNS = 1024
_WORD_BYTES = 8
# Constants of splitmix64 (Steele et al., OOPSLA 2014) as signed 64-bit integers.
_GAMMA, _MIX = 0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64


class Agreement:
    """The binary layers of a network, and what they must have in common on all ranks.

    With one rank there is nothing to compare, and no layer is watched.

    Attributes:
        layers: Layer number, path and layer of each layer with binary weights.
    """

    def __init__(self, net: nn.Module, world: World) -> None:
        """Make the layers keep the codes of their training steps."""
        self.layers = [
            (number, path, conv)
            for number, (path, conv) in (numbered_convs(net).items() if world.size > 1 else ())
            if isinstance(conv, BinaryConv2d) and conv.weight_quantizer is not None
        ]
        for _, _, layer in self.layers:
            layer.keeps_step_code = True

    def values(self) -> list[int]:
        """Return two integers whose maxima over the ranks tell whether all agree: the digest and its complement."""
        value = int(digest([tensor for code in self._codes() for tensor in code])) if self._codes() else 0
        return [value, ~value]

    def settle(self) -> None:
        """Take the codes of the current weights from now on, after the last update of an epoch.

        Raises:
            InvalidInputError: The weights are not finite.
        """
        for _, _, layer in self.layers:
            code = layer.code()
            layer.step_code = code.mask, code.alpha, code.beta

    def describe(self, world: World) -> str:
        """Return which layer is the first whose bits differ, and on which ranks; every rank must call it."""
        per_rank = world.gather([int(digest(code)) for code in self._codes()])
        names = [f"layer {number} ({path})" for number, path, _ in self.layers]
        return first_difference(names, per_rank)

    def _codes(self) -> list[Code]:
        return [layer.step_code for _, _, layer in self.layers if layer.step_code is not None]


def is_agreed(largest: Sequence[int]) -> bool:
    """Whether the maxima over all ranks of what `Agreement.values` gave stand for one digest."""
    return largest[0] == ~largest[1]


def first_difference(names: Sequence[str], per_rank: Sequence[Sequence[int]]) -> str:
    """Return a sentence that names the first layer whose digests differ and the ranks that differ from the most.

    Args:
        names: One a layer.
        per_rank: For each rank its digest of each layer.
    """
    for name, digests in zip(names, zip(*per_rank, strict=True), strict=True):
        if len(set(digests)) == 1:
            continue
        usual = max(digests, key=digests.count)
        others = [rank for rank, value in enumerate(digests) if value != usual]
        if 2 * len(others) >= len(digests):  # no majority says who is right
            groups = [[rank for rank, own in enumerate(digests) if own == value] for value in dict.fromkeys(digests)]
            return f"{name}: other bits on {' than on '.join(map(_ranks, groups))}"
        return f"{name}: other bits on {_ranks(others)} than on the other {len(digests) - len(others)}"
    return "the layers are equal now, so the digest of the step was computed wrongly on one rank"


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def digest(tensors: Sequence[Tensor]) -> Tensor:
    """Return a 64-bit digest of the bit patterns of tensors, a 0-d int64 tensor on their device.

    The bytes, padded with zeros, are 64-bit words x_rc of a matrix with 1024 columns. With y = x ^ (x >> 32) the digest
    is sum_rc a_r b_c y_rc mod 2**64 for fixed odd a_r, b_c drawn by splitmix64. A change within one word always changes
    it; any other does but for a chance of 2**-40 or less. Without the shift, bits in the upper byte of several words
    could cancel: only the lowest 8 bits of their factors would count. Integer sums: the same on every device, in any
    order.
    """
    parts = [tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in tensors]
    num_bytes = sum(map(len, parts))
    num_rows = -(-num_bytes // (_COLUMNS * _WORD_BYTES))
    padding = parts[0].new_zeros(num_rows * _COLUMNS * _WORD_BYTES - num_bytes)
    words = torch.cat([*parts, padding]).view(torch.int64).view(num_rows, _COLUMNS)
    columns, rows = _odd_numbers(0, _COLUMNS, words.device), _odd_numbers(_COLUMNS, num_rows, words.device)
    return (((words ^ (words >> 32)) * columns).sum(1) * rows).sum()


@functools.lru_cache
def _odd_numbers(start: int, count: int, device: torch.device) -> Tensor:
    value = torch.arange(start + 1, start + count + 1, dtype=torch.int64) * _GAMMA
    value = (value ^ (value >> 31)) * _MIX
    return ((value ^ (value >> 29)) | 1).to(device)
