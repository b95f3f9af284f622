"""Optimizers by name. The learning rate is set before each step, never by a scheduler object with state."""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from dabnn.errors import InvalidInputError
from dabnn.spec import OptimSpec

_Factory = Callable[[Iterable[nn.Parameter], OptimSpec], torch.optim.Optimizer]


def _adam(parameters: Iterable[nn.Parameter], spec: OptimSpec) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, weight_decay=spec.weight_decay)


def _adamw(parameters: Iterable[nn.Parameter], spec: OptimSpec) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, weight_decay=spec.weight_decay)


def _sgd(parameters: Iterable[nn.Parameter], spec: OptimSpec) -> torch.optim.Optimizer:
    momentum, decay = spec.momentum, spec.weight_decay
    return torch.optim.SGD(parameters, lr=0.0, momentum=momentum, weight_decay=decay, nesterov=spec.nesterov)


_FACTORIES: dict[str, _Factory] = {"adam": _adam, "adamw": _adamw, "sgd": _sgd}


def make_optimizer(net: nn.Module, spec: OptimSpec) -> torch.optim.Optimizer:
    """Return the optimizer named by `spec` over all parameters of `net`.

    Raises:
        InvalidInputError: No optimizer has that name.
    """
    if spec.name not in _FACTORIES:
        raise InvalidInputError(f"optim.name: {spec.name!r} is not known. Use one of {', '.join(_FACTORIES)}.")
    return _FACTORIES[spec.name](net.parameters(), spec)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
