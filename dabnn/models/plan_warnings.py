"""What a layer plan may ask for and a user will hardly want; such a network trains, so it is warned of, not refused."""

import functools
import logging

from torch import nn

from dabnn.layers import BinaryConv2d, has_packed_form
from dabnn.models.blocks import Branches, Chain, RepeatChannels, Shortcut
from dabnn.plans import numbered_convs

_log = logging.getLogger(__name__)
# What turns no number that is not negative into one that is.
_KEEPS_SIGN = (
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.Dropout, nn.Dropout2d, nn.Identity, nn.Flatten, RepeatChannels,
)  # fmt: skip


def warn_of_plan(net: Chain) -> None:
    """Log a warning, each once a process, about layers that see nothing and about those that cannot be exported."""
    planned = {path: conv for path, conv in numbered_convs(net).values() if isinstance(conv, BinaryConv2d)}
    taken = {path: conv for path, conv in planned.items() if conv.binary_input}
    blind = [path for path in after_relu(net) if path in taken and taken[path].options.input_quantizer == "sign"]
    if blind:
        _warn(
            f"binarize: {', '.join(blind)} would take the signs of what follows a ReLU, which are all +1, so that "
            "nothing of the image gets through. Take a model whose variant has signs there (`dab models`), leave these "
            "layers out of the inputs, or use binarize.input_quantizer=rsign or two_valued."
        )
    unpacked = [path for path, conv in taken.items() if conv.weight_quantizer is not None and not has_packed_form(conv)]
    if unpacked:
        _warn(
            f"binarize: {', '.join(unpacked)} with binary weights and inputs can be trained but has no packed form, "
            "which takes groups=1, dilation=1 and zero padding: `dab export` will refuse this network. Leave these "
            "layers out of the inputs if it is to be exported."
        )


def after_relu(net: Chain) -> list[str]:
    """Return the paths of the convolutions whose input comes from a ReLU and so is never negative.

    Between the two there may be pools, dropout, branches, and sums of inputs that are never negative either.
    """
    found: list[str] = []
    _pass_through(net, "", comes_from_relu=False, found=found)
    return found


def _pass_through(module: nn.Module, path: str, *, comes_from_relu: bool, found: list[str]) -> bool:
    """Return whether what a module returns is never negative, given whether its input is; note convolutions."""
    if isinstance(module, nn.Conv2d) and comes_from_relu:
        found.append(path)
    if isinstance(module, Chain):
        return _pass_chain(module, path, comes_from_relu=comes_from_relu, found=found)
    if isinstance(module, Branches):
        ends = [
            _pass_through(branch, f"{path}.{name}", comes_from_relu=comes_from_relu, found=found)
            for name, branch in module.items()
        ]
        return all(ends)
    return isinstance(module, nn.ReLU) or (comes_from_relu and isinstance(module, _KEEPS_SIGN))


def _pass_chain(chain: Chain, path: str, *, comes_from_relu: bool, found: list[str]) -> bool:
    before: dict[str, bool] = {}
    now = comes_from_relu
    for name, module in chain.named_children():
        before[name] = now
        at = f"{path}.{name}" if path else name
        if isinstance(module, Shortcut):  # its output is added
            now = _pass_chain(module, at, comes_from_relu=before[module.start], found=found) and now
        else:
            now = _pass_through(module, at, comes_from_relu=now, found=found)
    return now


@functools.cache  # a network is built several times on the way to a run
def _warn(text: str) -> None:
    _log.warning("%s", text)
