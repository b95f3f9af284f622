"""Optimizers by name. The learning rate is set before each step, never by a scheduler object with state.

Weight decay acts on the weights of convolutions and linear layers. Everything else is left alone unless `decay_all`:
BatchNorm's scale and shift, biases, alpha and beta of learned quantizers, shifts of inputs and activations, slopes of
PReLU. Pulling those towards zero changes the function without making it simpler, and would pull the two values of a
learned quantizer together.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from dabnn.choices import unknown_choice
from dabnn.errors import DabError
from dabnn.spec import OptimSpec

Groups = list[dict[str, Any]]
_Factory = Callable[[Groups, OptimSpec], torch.optim.Optimizer]


def _sgd(groups: Groups, spec: OptimSpec) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.0, momentum=spec.momentum, nesterov=spec.nesterov)


_FACTORIES: Mapping[str, _Factory] = {
    "adam": lambda groups, _: torch.optim.Adam(groups),
    "adamw": lambda groups, _: torch.optim.AdamW(groups),
    "sgd": _sgd,
    "adagrad": lambda groups, _: torch.optim.Adagrad(groups),
    "adamax": lambda groups, _: torch.optim.Adamax(groups),
    "adadelta": lambda groups, _: torch.optim.Adadelta(groups),
}


def make_optimizer(net: nn.Module, spec: OptimSpec) -> torch.optim.Optimizer:
    """Return the optimizer named by `spec` over all parameters of `net`.

    Raises:
        InvalidInputError: No optimizer has that name.
    """
    if spec.name not in _FACTORIES:
        raise unknown_choice("optim.name", spec.name, _FACTORIES)
    return _FACTORIES[spec.name](parameter_groups(net, spec), spec)


def parameter_groups(net: nn.Module, spec: OptimSpec) -> Groups:
    """Return the parameters of `net` as at most two groups: one with the weight decay, one without."""
    layers = (module for module in net.modules() if isinstance(module, nn.Conv2d | nn.Linear))
    weights = {layer.weight for layer in layers}
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in net.parameters():
        (decayed if spec.decay_all or parameter in weights else others).append(parameter)
    groups = ((decayed, spec.weight_decay), (others, 0.0))
    return [{"params": members, "weight_decay": decay} for members, decay in groups if members]


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def take_step(optimizer: torch.optim.Optimizer) -> None:
    """Update the parameters from their gradients.

    Raises:
        DabError: The learning rate is so large that the step leaves the range of float32.
    """
    try:
        optimizer.step()
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        rate = optimizer.param_groups[0]["lr"]
        raise DabError(
            f"optim.max_lr: a step at the rate {rate:g} is not finite in float32. Lower optim.max_lr."
        ) from error
