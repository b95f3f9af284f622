"""The time of each layer of a packed network beside that of its float peer.

A layer is a convolution or a linear layer together with what runs between it and the next: activation, pooling,
normalisation, signs. Each module is run on its own input, recorded in a pass of its own network, so that its data lie
in nearer caches than in a pass of the whole network.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from dabnn.fusion import PackReached, PoolBits
from dabnn.models import LayerRow, Network, outline
from dabnn.packed_conv import PackedConv2d
from dabnn.turns import Form, in_turns

_BUDGET_S = 15.0
_REPEATS_ON_CUDA = 20  # a layer of one image takes microseconds, and an event has a resolution of half of one

# By whether weights and inputs are binary.
_KINDS = {
    (True, True): "binary",
    (True, False): "binary weights",
    (False, True): "binary inputs",
    (False, False): "real",
}

# Modules of a packed network that write bits, or read them; all others work on ordinary numbers.
_ON_BITS = (PackedConv2d, PackReached, PoolBits)

Call = tuple[nn.Module, tuple[Any, ...]]


@dataclass(frozen=True)
class LayerResult:
    """One layer, with what follows it.

    Attributes:
        path: Its name in the network.
        kind: `binary` (weights and inputs), `binary weights`, `binary inputs` or `real`.
        macs: Multiply-accumulates of one image.
        packed_ms: Median of the packed form, of one batch.
        packed_float_ms: The part of it that works on ordinary numbers: real convolutions, normalisation, pooling.
        float_ms: Median of the float peer.
        speedup: `float_ms / packed_ms`; below 1 float wins.
    """

    path: str
    kind: str
    macs: int
    packed_ms: float
    packed_float_ms: float
    float_ms: float
    speedup: float


def layer_paths(peer: Network) -> list[str]:
    """Return the paths of the convolutions and linear layers of a float network."""
    return [path for path, module in peer.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]


@torch.inference_mode()
def time_layers(packed: Network, peer: Network, images: Tensor, *, turns: int | None = None) -> Iterator[LayerResult]:
    """Yield one result a layer, in the order of the network.

    Args:
        packed: The running form of a packed model.
        peer: Its float peer.
        images: For both.
        turns: Rounds; None for as many as fit into 15 s for all layers together, at least 5.
    """
    starts = layer_paths(peer)
    groups = {"packed": _groups(packed, starts, images), "float": _groups(peer, starts, images)}
    rows = {row.path: row for row in outline(**asdict(packed.spec)).layers}
    for path in starts:
        calls = _recorded(packed, groups["packed"][path], images)
        forms = {
            "bits": _all_of([call for call in calls if isinstance(call[0], _ON_BITS)]),
            "numbers": _all_of([call for call in calls if not isinstance(call[0], _ON_BITS)]),
            "float": _all_of(_recorded(peer, groups["float"][path], images)),
        }
        times, _ = in_turns(
            forms,
            images.device,
            turns=turns,
            budget_s=_BUDGET_S / len(starts),
            repeats=_REPEATS_ON_CUDA if images.device.type == "cuda" else 1,
        )
        bits_ms, numbers_ms, float_ms = (1e3 * each.median_s for each in times.values())
        packed_ms = bits_ms + numbers_ms
        kind, macs = _kind_and_macs(peer, path, rows.get(path))
        yield LayerResult(path, kind, macs, packed_ms, numbers_ms, float_ms, float_ms / packed_ms)


def _kind_and_macs(peer: Network, path: str, row: LayerRow | None) -> tuple[str, int]:
    if row is not None:
        return _KINDS[row.binary_weights, row.binary_inputs], row.macs
    return "real", cast(nn.Linear, peer.get_submodule(path)).weight.numel()


def _groups(net: Network, starts: Sequence[str], images: Tensor) -> dict[str, list[str]]:
    """Return, for each layer, the modules that make it up, as they run; what stands before the first belongs to it."""
    order: list[str] = []
    with _hooks(net, _units(net, starts), lambda path, _: order.append(path)):
        net(images)
    groups: dict[str, list[str]] = {path: [] for path in starts}
    current = starts[0]
    for path in order:
        current = path if path in groups else current
        groups[current].append(path)
    return groups


def _units(net: Network, starts: Sequence[str]) -> list[str]:
    """Return the paths of the modules that are run as a whole: the layers, and what has no modules inside."""
    inside = tuple(f"{path}." for path in starts)
    leaves = (path for path, module in net.named_modules() if path in starts or next(module.children(), None) is None)
    return [path for path in leaves if not path.startswith(inside)]


def _recorded(net: Network, paths: Sequence[str], images: Tensor) -> list[Call]:
    """Return these modules with what they get in a pass over the images."""
    calls: list[Call] = []
    with _hooks(net, paths, lambda path, inputs: calls.append((net.get_submodule(path), inputs))):
        net(images)
    return calls


@contextmanager
def _hooks(net: Network, paths: Sequence[str], see: Callable[[str, tuple[Any, ...]], None]) -> Iterator[None]:
    """While open, `see` is told path and inputs of each of these modules before it runs."""
    handles = []
    for path in paths:
        module = net.get_submodule(path)
        handles.append(module.register_forward_pre_hook(lambda _, inputs, path=path: see(path, inputs)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _all_of(calls: Sequence[Call]) -> Form:
    def run() -> None:
        for module, inputs in calls:
            module(*inputs)

    return run
