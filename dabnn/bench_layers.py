"""The time of each layer of a packed network beside that of its float peer.

A layer is a convolution or a linear layer together with what stands between it and the one before: normalisation,
activation, pooling, signs. Each module is run on its own input, recorded in a pass of its own network, so that its data
lie in nearer caches than in a pass of the whole network.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from dabnn.models import LayerRow, Network, outline
from dabnn.turns import Form, in_turns

AFTER = "after"
_BUDGET_S = 15.0
_REPEATS_ON_CUDA = 20  # a layer of one image takes microseconds, and an event has a resolution of half of one

# By whether weights and inputs are binary.
_KINDS = {
    (True, True): "binary",
    (True, False): "binary weights",
    (False, True): "binary inputs",
    (False, False): "real",
}

Call = tuple[nn.Module, tuple[Any, ...]]


@dataclass(frozen=True)
class LayerResult:
    """One layer, with what stands before it.

    Attributes:
        path: Its name in the network; `after` for what follows the last one.
        kind: `binary` (weights and inputs), `binary weights`, `binary inputs` or `real`.
        macs: Multiply-accumulates of one image.
        packed_ms: Median of the packed form, of one batch.
        float_ms: Median of the float peer.
        speedup: `float_ms / packed_ms`; below 1 float wins.
    """

    path: str
    kind: str
    macs: int
    packed_ms: float
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
    ends = layer_paths(peer)
    groups = {"packed": _groups(packed, ends, images), "float": _groups(peer, ends, images)}
    rows = {row.path: row for row in outline(**asdict(packed.spec)).layers}
    for path in [*ends, AFTER]:
        calls = {
            name: _recorded(net, groups[name].get(path, []), images)
            for name, net in (("packed", packed), ("float", peer))
        }
        if not any(calls.values()):
            continue
        times, _ = in_turns(
            {name: _all_of(each) for name, each in calls.items()},
            images.device,
            turns=turns,
            budget_s=_BUDGET_S / len(ends),
            repeats=_REPEATS_ON_CUDA if images.device.type == "cuda" else 1,
        )
        packed_ms, float_ms = (1e3 * times[name].median_s for name in ("packed", "float"))
        yield LayerResult(path, *_kind_and_macs(peer, path, rows.get(path)), packed_ms, float_ms, float_ms / packed_ms)


def _kind_and_macs(peer: Network, path: str, row: LayerRow | None) -> tuple[str, int]:
    if row is not None:
        return _KINDS[row.binary_weights, row.binary_inputs], row.macs
    return "real", 0 if path == AFTER else cast(nn.Linear, peer.get_submodule(path)).weight.numel()


def _groups(net: Network, ends: Sequence[str], images: Tensor) -> dict[str, list[str]]:
    """Return, for each layer, the modules that make it up, as they run."""
    order: list[str] = []
    with _hooks(net, _units(net, ends), lambda path, _: order.append(path)):
        net(images)
    groups: dict[str, list[str]] = {}
    group: list[str] = []
    for path in order:
        group.append(path)
        if path in ends:
            groups[path], group = group, []
    return groups | {AFTER: group}


def _units(net: Network, ends: Sequence[str]) -> list[str]:
    """Return the paths of the modules that are run as a whole: the layers, and what has no modules inside."""
    inside = tuple(f"{path}." for path in ends)
    leaves = (path for path, module in net.named_modules() if path in ends or next(module.children(), None) is None)
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
