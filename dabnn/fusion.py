"""The form in which a packed network runs: signs stay bits from one binary convolution to the next.

What nothing but a threshold reads, up to the convolution or branch that it comes from, need not be a number. The
rewrites, none of which changes a bit of the result in float32:

- threshold, convolution: the threshold packs the bits that the convolution reads, and writes no +-1.
- convolution, threshold: the convolution writes the bits itself, and never its values.
- BN, ReLU or RPReLU before a threshold: each is monotone a channel, so one threshold of what goes in stands for all of
  them. It is read off the modules themselves (`dabnn.models.folding.least_reached`), their rounding included. A ReLU
  alone makes thresholds of 0 and below reached always: relu(y) >= t is y >= t for t > 0, and true for t <= 0.
- max pooling before a threshold: the bits are pooled instead (`kernels.pool_bits`).
- BN and activation before other max pooling with a stride: they come after it, where there are fewer values. Where a
  channel of the BN falls, the filter before it changes its sign, which changes no rounding.

Of what is left, modules that do nothing in evaluation go, and a ReLU that alone reads its input writes into it. Where a
value is read by anything else, such as a shortcut, an average or a real-valued layer, it is written as before. In
bfloat16 and float16 the signs that a convolution writes are those of its float32 values, before rounding.
"""

import copy
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dabnn.activations import RPReLU
from dabnn.models import Network
from dabnn.models.blocks import Chain, Shortcut
from dabnn.models.folding import SignThreshold, least_reached, unfold
from dabnn.packed_conv import PackedConv2d
from dabnn.packed_weight_conv import PackedWeightConv2d
from kernels import max_pool2d, pack_reached, pack_signs, pool_bits

_IDLE = (nn.Dropout, nn.Dropout2d, nn.Identity)
# Where a sign is searched for, images of this size: torch's evaluation of single positions takes another path.
_MAP = (4, 4)
_COUNT_OF_WRITES = operator.attrgetter("_version")

_Stage = tuple[str, nn.Module]


class PackReached(nn.Module):
    """A threshold whose signs are packed: x (N, C, H, W) -> (N, H, W, ceil(C / 32)) int32.

    Bit c of a value x is (x >= threshold[c]) xor falls[c].

    Attributes:
        threshold: (C,) in the type of x; of 16 bits, rounded up, which changes no bit.
        falls: (C,) bool.
    """

    threshold: Tensor
    falls: Tensor

    def __init__(self, threshold: Tensor, falls: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("threshold", threshold if dtype == torch.float32 else _rounded_up(threshold, dtype))
        self.register_buffer("falls", falls)

    def forward(self, x: Tensor) -> Tensor:
        """Return the packed signs."""
        return pack_reached(x, self.threshold, self.falls)


class PoolBits(nn.Module):
    """Max pooling of packed signs: (N, H, W, words) int32 -> (N, H', W', words).

    Attributes:
        is_and_bits: (words,) int32, the channels whose bit is 1 below a threshold.
    """

    is_and_bits: Tensor

    def __init__(self, pool: nn.MaxPool2d, falls: Tensor) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = (_pair(v) for v in (pool.kernel_size, pool.stride, pool.padding))
        self.ceil_mode = pool.ceil_mode
        self.register_buffer("is_and_bits", pack_signs(torch.where(falls, 1.0, -1.0).view(1, -1, 1, 1)).view(-1))

    def forward(self, bits: Tensor) -> Tensor:
        """Return the pooled bits."""
        windows = (self.kernel, self.stride, self.padding)
        return pool_bits(bits, self.is_and_bits, *windows, ceil_mode=self.ceil_mode)


class MaxPool(nn.MaxPool2d):
    """Max pooling for inference, which keeps no places of the largest values."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the parent's name, callable by keyword
        """Return the pooled values."""
        windows = (_pair(self.kernel_size), _pair(self.stride), _pair(self.padding))
        return max_pool2d(input, *windows, ceil_mode=self.ceil_mode)


@dataclass(frozen=True)
class _Sign:
    """A threshold whose signs nothing but a convolution reads.

    Attributes:
        name: Of its stage.
        norm: The threshold.
        dtype: Of the values that it reads.
    """

    name: str
    norm: SignThreshold
    dtype: torch.dtype


# Typed: of a method of dict mypy knows neither keys nor values.
_VALUES: Callable[[Any], Iterable[Any]] = dict.values


class NetState:
    """What a fused form was made of, and whether it is that still; a look takes 10 to 30 us.

    Bits and scalars of packed convolutions may be written: they are the fused form's own. `Module.to` puts other
    buffers in place of the buffers, and other values into the parameters.
    """

    def __init__(self, net: nn.Module) -> None:
        own = [(module, (module._parameters, module._buffers)) for module in net.modules()]  # noqa: SLF001
        nested = [module._modules for module in net.modules()]  # noqa: SLF001 - the tables, not copies of them
        self._tables = [table for table in (*itertools.chain(*(tables for _, tables in own)), *nested) if table]
        self._parts = tuple(itertools.chain.from_iterable(map(_VALUES, self._tables)))
        keeping = (PackedConv2d, PackedWeightConv2d)
        found = [table.values() for module, tables in own if not isinstance(module, keeping) for table in tables]
        read = [part for part in itertools.chain(*found) if part is not None and part.dtype != torch.int64]
        self._counting = [tensor for tensor in read if not tensor.is_inference()]
        self._moving = [tensor for tensor in self._counting if isinstance(tensor, nn.Parameter)]
        self._counts_all = len(self._counting) == len(read)
        self._writes = self._writes_now()

    def holds(self) -> bool:
        """Return whether the network has the same tensors and modules, and none was written since."""
        parts = tuple(itertools.chain.from_iterable(map(_VALUES, self._tables)))
        is_same = len(parts) == len(self._parts) and all(map(operator.is_, parts, self._parts))
        return is_same and self._counts_all and self._writes == self._writes_now()

    def _writes_now(self) -> list[int]:
        return [*map(_COUNT_OF_WRITES, self._counting), *map(Tensor.data_ptr, self._moving)]


def fuse(net: Network) -> Network:
    """Returns a copy of a packed network, in evaluation, in which signs stay bits; it shares the tensors.

    Args:
        net: The network of a `dabnn.packed.PackedModel`.

    Returns:
        The copy: in float32 the same logits bit for bit, for inference only.
    """
    shared = {id(tensor): tensor for tensor in [*net.parameters(), *net.buffers()]}
    fused = copy.deepcopy(net, shared)
    for chain in [module for module in fused.modules() if isinstance(module, Chain)]:
        starts = _starts(chain)
        stages = _without_idle(list(chain.named_children()), starts)
        index = 0
        while index < len(stages):
            stages, index = _fused_at(stages, index, starts)
        stages = _pooled_first(stages, starts)
        _write_in_place(stages, starts)
        _replace(chain, stages)
    return fused


def _starts(chain: Chain) -> set[str]:
    """Return the names of the stages whose input a shortcut reads, too."""
    return {module.start for module in chain if isinstance(module, Shortcut)}


def _replace(chain: Chain, stages: Sequence[_Stage]) -> None:
    for name in [name for name, _ in chain.named_children()]:
        delattr(chain, name)
    for name, module in stages:
        chain.add_module(name, module)


def _without_idle(stages: Sequence[_Stage], starts: set[str]) -> list[_Stage]:
    return [(name, module) for name, module in stages if name in starts or not isinstance(module, _IDLE)]


def _fused_at(stages: list[_Stage], index: int, starts: set[str]) -> tuple[list[_Stage], int]:
    """Fuse a threshold that reads the stages before `index` with them; return the stages, and the place after it.

    The threshold is the stage itself, or what a chain begins with; it is fused with the stages before that chain where
    there are any to fuse with.
    """
    name, module = stages[index]
    first = _first_unread(stages, index, starts)
    source = stages[first - 1][1] if first and stages[first][0] not in starts else None
    sign = _sign_at(stages, index, starts)
    following = index + 1
    if sign is None:
        chain = _first_chain(module)
        inner = [] if chain is None else list(chain.named_children())
        sign = None if chain is None or name in starts else _sign_at(inner, 0, _starts(chain))
        if chain is None or sign is None or (first == index and not _gives_signs(source)):
            return stages, following
        _replace(chain, inner[1:])
        sign, following = replace(sign, name=f"{name}_{sign.name}"), index
    packed = _packed(stages[first:index], source, sign, is_read=stages[first][0] in starts)
    done = [*stages[:first], *packed]
    return [*done, *stages[following:]], len(done) + (following == index)


def _sign_at(stages: Sequence[_Stage], index: int, starts: set[str]) -> _Sign | None:
    if index + 1 >= len(stages):
        return None
    (name, norm), (next_name, conv) = stages[index : index + 2]
    if not isinstance(norm, SignThreshold) or not isinstance(conv, PackedConv2d) or next_name in starts:
        return None
    return _Sign(name, norm, conv.dtype)


def _first_chain(module: nn.Module) -> Chain | None:
    """Return the innermost chain that a chain begins with, if no shortcut reads what goes into it."""
    chain: Chain | None = None
    while type(module) is Chain:
        chain = module
        name, module = next(iter(chain.named_children()), ("", chain))
        if module is chain or name in _starts(chain):
            return None
    return chain


def _packed(stages: Sequence[_Stage], source: nn.Module | None, sign: _Sign, *, is_read: bool) -> list[_Stage]:
    """Return what stands in place of `stages`, which nothing but a threshold reads, and of the threshold.

    Args:
        stages: Monotone functions and poolings.
        source: What comes before them, if nothing else reads it; it is told to give signs where it can.
        sign: The threshold.
        is_read: Whether the name of the first stage must be kept, since a shortcut reads its input.
    """
    threshold, falls = sign.norm.threshold, sign.norm.falls
    emitting = source if isinstance(source, PackedConv2d) and _gives_signs(source) else None
    dtype = sign.dtype if emitting is None else torch.float32
    pools: list[_Stage] = []
    moved: list[nn.Module] = []
    for name, module in reversed(stages):
        if isinstance(module, nn.MaxPool2d):
            threshold, falls = _before(moved, threshold, falls, dtype)
            moved = []
            pools.insert(0, (name, PoolBits(module, falls)))
        else:
            moved.insert(0, module)
    threshold, falls = _before(moved, threshold, falls, dtype)
    if emitting is not None:
        emitting.emit(threshold, falls)
        return pools
    name = stages[0][0] if stages and is_read else sign.name
    if pools and pools[0][0] == name:
        pools[0] = (f"{name}_bits", pools[0][1])
    return [(name, PackReached(threshold, falls, dtype)), *pools]


def _first_unread(stages: Sequence[_Stage], last: int, starts: set[str]) -> int:
    """Return the earliest stage from where on, up to `last`, all are monotone or a pooling and nothing else reads."""
    first = last
    while first > 0 and stages[first][0] not in starts and _may_pass(stages[first - 1][1]):
        first -= 1
    return first


def _may_pass(module: nn.Module) -> bool:
    if isinstance(module, nn.MaxPool2d):
        return _pair(module.dilation) == (1, 1) and not module.return_indices
    if isinstance(module, RPReLU):
        return bool((module.slope >= 0).all())
    return isinstance(module, nn.ReLU | nn.BatchNorm2d)


def _gives_signs(module: nn.Module | None) -> bool:
    """Return whether the module can return packed signs in place of its values."""
    return isinstance(module, PackedConv2d) and module.input_quantizer != "two_valued"


def _before(moved: Sequence[nn.Module], threshold: Tensor, falls: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return threshold and falls, before some modules, of the bit that the given ones have after them."""
    if not moved:
        return threshold, falls
    if all(isinstance(module, nn.ReLU) for module in moved):
        return torch.where(threshold <= 0, -torch.inf, threshold), falls
    evaluate = _evaluation(moved, dtype)

    def bit(x: Tensor) -> Tensor:
        return (evaluate(x) >= threshold) ^ falls

    largest = torch.full_like(threshold, torch.finfo(dtype).max)
    falls_before = bit(-largest) & ~bit(largest)
    return least_reached(lambda x: bit(x) ^ falls_before, largest), falls_before


def _evaluation(modules: Sequence[nn.Module], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return the function (C,) -> (C,) float32 that modules are, one value a channel, where values are of `dtype`."""

    def evaluate(x: Tensor) -> Tensor:
        images = x.to(dtype).view(1, -1, 1, 1).expand(1, -1, *_MAP).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            for module in modules:
                images = module(images)
        return images[0, :, 0, 0].float()

    return evaluate


def _pooled_first(stages: Sequence[_Stage], starts: set[str]) -> list[_Stage]:
    """Return the stages with each max pooling before the BN and activations that it follows."""
    ordered = list(stages)
    for index, (name, module) in enumerate(stages):
        if not isinstance(module, nn.MaxPool2d) or not _may_pass(module):
            continue
        ordered[index] = name, _pool_of(module)
        first = index
        while min(_pair(module.stride)) > 1 and _may_swap(ordered, first, starts):
            first -= 1
            norm = ordered[first][1]
            if isinstance(norm, nn.BatchNorm2d):
                ordered[first] = ordered[first][0], _risen(ordered[first - 1][1], norm)
            ordered[first : first + 2] = reversed(ordered[first : first + 2])
    return ordered


def _may_swap(stages: Sequence[_Stage], index: int, starts: set[str]) -> bool:
    """Return whether the pooling at `index` may change places with the stage before it."""
    if index == 0 or stages[index][0] in starts or stages[index - 1][0] in starts:
        return False
    before = stages[index - 1][1]
    if isinstance(before, nn.BatchNorm2d):
        source = stages[index - 2][1] if index > 1 else None
        return isinstance(source, nn.Conv2d) or bool((before.weight >= 0).all())
    return isinstance(before, nn.ReLU | RPReLU) and _may_pass(before)


def _risen(source: nn.Module, norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """Return a BN that falls in no channel; the convolution before it changes the sign of the filters that it must."""
    if bool((norm.weight >= 0).all()):
        return norm
    sign = torch.where(norm.weight < 0, -1.0, 1.0)
    if not isinstance(source, nn.Conv2d):
        raise TypeError(f"{type(source).__name__} has no filters whose sign could change")
    for name, shape in (("weight", (-1, 1, 1, 1)), ("bias", (-1,))):
        values = getattr(source, name)
        if values is not None:
            turned = (values * sign.view(shape)).to(values.dtype)
            setattr(source, name, nn.Parameter(turned, requires_grad=False))
    return unfold(norm.weight * sign, norm.bias).requires_grad_(False).eval()


def _pool_of(pool: nn.MaxPool2d) -> MaxPool:
    return MaxPool(pool.kernel_size, pool.stride, pool.padding, ceil_mode=pool.ceil_mode)


def _write_in_place(stages: Sequence[_Stage], starts: set[str]) -> None:
    """Let a ReLU write into its input where a module just made that and nothing else reads it."""
    makers = (nn.Conv2d, PackedConv2d, PackedWeightConv2d, nn.BatchNorm2d, nn.MaxPool2d, Shortcut)
    for (_, before), (name, module) in itertools.pairwise(stages):
        if isinstance(module, nn.ReLU) and isinstance(before, makers) and name not in starts:
            module.inplace = True


def _rounded_up(threshold: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the least values of `dtype`, of 16 bits, that are no less than `threshold` (C,) float32."""
    rounded = threshold.to(dtype)
    # In the order of all values of a type, the next larger one is the next integer where positive.
    keys = rounded.view(torch.int16)
    larger = torch.where(rounded > 0, keys + 1, torch.where(rounded < 0, keys - 1, 1)).to(torch.int16).view(dtype)
    return torch.where(rounded.float() < threshold, larger, rounded)


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
