"""Where a training step stopped being finite: the first layer with a value that is NaN or infinite, and its evidence.

A rank whose loss is not finite runs the forward pass of that step once more on a copy of the network, watching each
layer. It keeps the weights from before the step's update, so that the finding and the saved state are those of the
step. Left out: what the ranks do about it, which is the training loop's business.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dabnn.data import Batch
from dabnn.errors import DabError
from dabnn.plans import numbered_convs


@dataclass(frozen=True)
class Place:
    """Where and when a loss was not finite.

    Attributes:
        rank: Whose loss.
        epoch: Epochs finished before.
        step: Optimizer steps taken before this one.
        seed: Seed of the run: with step and rank it decides what dropout drew.
    """

    rank: int
    epoch: int
    step: int
    seed: int


class _FoundError(Exception):
    """Ends the forward pass at the first value that is not finite; its text is the finding."""


def first_not_finite(net: nn.Module, forward: Callable[[nn.Module], Tensor]) -> str:
    """Return what is the first thing in a forward pass that is not finite, in the order in which layers are executed.

    A module without submodules is looked at in the order input, parameters, output; a residual sum that overflows
    between two modules is thus told as the input of the second. The network itself is left as it is. Layers compute
    with the statistics of this rank alone, where synchronised BatchNorm would wait for the others.

    Args:
        net: The network in the mode and with the weights of the step.
        forward: Computes the loss, a scalar, with the network that it is given; seeds what is random in it.
    """
    copied = _alone(copy.deepcopy(net))
    entered: list[str] = []
    for name, module in _named_leaves(copied):
        module.register_forward_pre_hook(_check_before(name, entered))
        module.register_forward_hook(_check_after(name))
    try:
        with torch.no_grad():
            loss = forward(copied)
    except _FoundError as found:
        return str(found)
    except DabError as error:  # finite weights whose means are not: their sum overflows
        return f"{entered[-1]}: {error}".rstrip(".")
    if bool(loss.isfinite()):
        return "the step computed again is finite, so an operation or the memory is not reliable"
    return f"every layer is finite, the loss of their output is {float(loss)}"


def not_finite_parameter(net: nn.Module) -> str:
    """Return which is the first parameter or buffer, in the order of the network, that is not finite; "" for none."""
    for name, module in _named_leaves(net):
        if problem := _bad(chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))):
            return f"{name}: {problem}"
    return ""


def save_state(path: Path, net: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, place: Place) -> None:
    """Write what the step was computed from, to be read with `torch.load(path, weights_only=True)`.

    A dictionary: `net` and `optimizer` (state dictionaries; the weights are those before the update, the statistics of
    BatchNorm have seen the batch), `images`, `labels`, `indices` (of the samples in the split), `global_size`, and the
    fields of `place`.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    state: Mapping[str, Any] = {
        "net": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "images": batch.images,
        "labels": batch.labels,
        "indices": batch.indices,
        "global_size": batch.global_size,
        "rank": place.rank,
        "epoch": place.epoch,
        "step": place.step,
        "seed": place.seed,
    }
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(dict(state), file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _alone(net: nn.Module) -> nn.Module:
    """Exchange synchronised BatchNorm for BatchNorm with the same parameters, which waits for no other rank."""
    for path, module in list(net.named_modules()):
        if isinstance(module, nn.SyncBatchNorm):
            own = nn.BatchNorm2d(module.num_features, module.eps, module.momentum, module.affine, device="meta")
            own.__dict__.update({key: getattr(module, key) for key in ("_parameters", "_buffers", "training")})
            net.set_submodule(path, own)
    return net


def _named_leaves(net: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return how messages call each module without submodules, or with parameters of its own, and the module."""
    numbers = {path: number for number, (path, _) in numbered_convs(net).items()}
    return [
        (f"layer {numbers[path]} ({path})" if path in numbers else path or type(module).__name__, module)
        for path, module in net.named_modules()
        if not any(module.children()) or any(True for _ in module.parameters(recurse=False))
    ]


def _check_before(name: str, entered: list[str]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def check(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        entered.append(name)
        for value in inputs:
            if problem := _problem(value):
                raise _FoundError(f"{name}: its input holds {problem}")
        if problem := _bad(module.named_parameters(recurse=False)):
            raise _FoundError(f"{name}: {problem}")

    return check


def _check_after(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    def check(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
        if problem := _problem(output):
            raise _FoundError(f"{name}: its output holds {problem}")

    return check


def _bad(own: Iterable[tuple[str, Tensor]]) -> str:
    for name, tensor in own:
        if problem := _problem(tensor):
            return f"its {name} holds {problem}"
    return ""


def _problem(value: Any) -> str:
    """Return how many values are not finite, or nothing; other things than floating tensors have no problem."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return ""
    num_nan, num_inf = int(value.isnan().sum()), int(value.isinf().sum())
    if num_nan + num_inf == 0:
        return ""
    kinds = [f"{count} {kind}" for count, kind in ((num_nan, "NaN"), (num_inf, "infinite")) if count]
    return f"{' and '.join(kinds)} of {value.numel()} values"
