"""Where a training step stopped being finite: the first layer with a value that is NaN or infinite, and its evidence.

A rank whose loss or gradient is not finite runs the forward pass of that step once more on a copy of the network,
watching each layer. The step did not update the weights, so finding and saved state are those of the step. The loss
alone would not tell: the sign of NaN is a bit like any other, so a network with binary inputs goes on with a finite
loss while NaN gradients spoil the layers below. Left out: what the ranks do about it, which is the loop's business.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dabnn.data import Batch
from dabnn.errors import DabError
from dabnn.plans import numbered_convs
from dabnn.sync_batchnorm import SyncBatchNorm2d


@dataclass(frozen=True)
class Place:
    """Where and when a step was not finite.

    Attributes:
        rank: Whose step.
        epoch: Number of the epoch, from 1.
        step: Number of the step in the run, from 1.
        seed: Seed of the run: dropout drew from `dabnn.distributed.seed_step(seed, step - 1, rank)`.
    """

    rank: int
    epoch: int
    step: int
    seed: int

    @property
    def file_name(self) -> str:
        """Name of the file that the step is saved in."""
        return f"step-{self.step:08d}-rank-{self.rank}.pt"


class _FoundError(Exception):
    """Ends the forward pass at the first value that is not finite; its text is the finding."""


def first_not_finite(net: nn.Module, forward: Callable[[nn.Module], Tensor]) -> str:
    """Return what is the first in a forward pass that is not finite, in the order of execution; "" for nothing.

    Each module without submodules is looked at: input, parameters, output. A residual sum that overflows
    between two modules is thus told as the input of the second. The network itself is left as it is. Layers compute
    with the statistics of this rank alone, where synchronised BatchNorm would wait for the others.

    Args:
        net: The network in the mode and with the weights of the step.
        forward: Computes the loss, a scalar, with the network that it is given; seeds what is random in it.
    """
    copied = _alone(copy.deepcopy(net))
    entered: list[str] = []
    for name, module in _named(copied):
        if any(module.children()):
            continue
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
        return ""
    return f"every layer is finite, the loss of their output is {float(loss)}"


def not_finite_parameter(net: nn.Module) -> str:
    """Return which is the first parameter or buffer, in the order of the network, that is not finite; "" for none."""
    for name, module in _named(net):
        if problem := _bad(chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))):
            return f"{name}: {problem}"
    return ""


def not_finite_gradient(net: nn.Module) -> str:
    """Return which is the first gradient that is not finite, from the end of the network back; "" for none."""
    for name, module in reversed(_named(net)):
        gradients = ((key, tensor.grad) for key, tensor in module.named_parameters(recurse=False))
        if problem := _bad((f"{key}'s gradient", grad) for key, grad in gradients if grad is not None):
            return f"{name}: {problem}"
    return ""


def witness(findings: Sequence[str | None]) -> int:
    """Return the rank that has the most to tell: the first that found something, else the first that looked.

    Args:
        findings: For each rank what `first_not_finite` returned; None where it had no reason to look.
    """
    found = [rank for rank, finding in enumerate(findings) if finding]
    looked = [rank for rank, finding in enumerate(findings) if finding is not None]
    return next(iter(found + looked), -1)


def save_state(path: Path, net: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, place: Place) -> None:
    """Write what the step was computed from, to be read with `torch.load(path, weights_only=True)`.

    A dictionary: `net` and `optimizer` (state dictionaries; the weights are those that the step began with, while the
    statistics of BatchNorm have seen the batch, and the warm searches, `threshold` and `num_searches`, are a step on),
    `images`, `labels`, `indices` (of the samples in the split), `global_size`,
    with mixing `partner_labels` and `weights`, and the fields of `place`.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    state: dict[str, Any] = {
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
    if batch.partners is not None:
        state |= {"partner_labels": batch.partner_labels, "weights": batch.weights}
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _alone(net: nn.Module) -> nn.Module:
    """Exchange synchronised BatchNorm for BatchNorm with the same parameters, which waits for no other rank."""
    for path, module in list(net.named_modules()):
        if isinstance(module, nn.SyncBatchNorm | SyncBatchNorm2d):
            own = nn.BatchNorm2d(module.num_features, module.eps, module.momentum, module.affine, device="meta")
            own.__dict__.update({key: getattr(module, key) for key in ("_parameters", "_buffers", "training")})
            net.set_submodule(path, own)
    return net


def _named(net: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return how messages call each module, and the module."""
    numbers = {path: number for number, (path, _) in numbered_convs(net).items()}
    return [
        (f"layer {numbers[path]} ({path})" if path in numbers else path or type(module).__name__, module)
        for path, module in net.named_modules()
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
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
        return ""
    # A thirtieth of what counting takes; NaN comes through.
    if math.isfinite(sum(map(float, value.detach().aminmax()))):
        return ""
    num_nan, num_inf = int(value.isnan().sum()), int(value.isinf().sum())
    if num_nan + num_inf == 0:
        return ""
    kinds = [f"{count} {kind}" for count, kind in ((num_nan, "NaN"), (num_inf, "infinite")) if count]
    return f"{' and '.join(kinds)} of {value.numel()} values"
