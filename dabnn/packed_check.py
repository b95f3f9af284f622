"""What a packed file claims, held against what `build` knows, before a byte of its weights is read.

A file's specification is data from elsewhere: it may name a network of any size. So its values are checked for their
types, the network is laid out without memory, and the names, types and shapes in the header must be those of that
network. What is then read is what the file really holds. Left out: the container (`dabnn.packed_file`).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dabnn.errors import InvalidInputError
from dabnn.layers import BinaryConv2d
from dabnn.models import Network, skeleton

_Rule = tuple[Callable[[Any], bool], str]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_index(value: Any) -> bool:
    return type(value) is int


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _are(rule: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(map(rule, value))


def _map_to(rule: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(rule, value.values()))


def _or_none(rule: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or rule(value)


def _is_inputs(value: Any) -> bool:
    return _is_text(value) or _are(_is_index)(value)


def _is_option(value: Any) -> bool:
    return _is_text(value) or _is_number(value)


_SPEC: Mapping[str, _Rule] = {
    "name": (_is_text, "a name"),
    "num_classes": (_is_index, "a whole number"),
    "in_channels": (_is_index, "a whole number"),
    "input_size": (_is_index, "a whole number"),
    "width": (_is_number, "a number"),
    "bin_start": (_or_none(_is_index), "a whole number or nothing"),
    "bin_end": (_or_none(_is_index), "a whole number or nothing"),
    "weights": (_is_text, "a name"),
    "center": (_or_none(_is_text), "a name or nothing"),
    "inputs": (_is_inputs, "a name or whole numbers"),
    "plan": (_or_none(_map_to(_are(_is_index))), "lists of whole numbers or nothing"),
    "layers": (_or_none(_are(_is_index)), "whole numbers or nothing"),
    "block": (_is_text, "a name"),
    "activation": (_or_none(_is_text), "a name or nothing"),
    "options": (_map_to(_is_option), "names and numbers"),
}
_NORMALIZATION: Mapping[str, _Rule] = {
    "mean": (_are(_is_number), "numbers"),
    "std": (_are(lambda value: _is_number(value) and value > 0), "positive numbers"),
    "transform": (_is_text, "a name"),
}


def lay_out(source: str, spec: Mapping[str, Any]) -> Network:
    """Return the network of a specification on torch's device meta: its structure without its memory.

    Args:
        source: The file, which error messages start with.
        spec: Arguments of `dabnn.models.build`, of whatever types.

    Raises:
        InvalidInputError: There is no such network.
    """
    for key, value in spec.items():
        is_right, kind = _SPEC.get(key, (lambda _: True, ""))
        if not is_right(value):
            raise _of_another_kind(source, f"spec.{key}", value, kind)
    try:
        return skeleton(**spec)
    # What torch raises where a size does not fit into 64 bits, and Python where an argument is not known.
    except (TypeError, ValueError, OverflowError, RuntimeError, InvalidInputError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InvalidInputError(
            f"{source}: its network cannot be built by this dab ({reason}). Update dab, or export the model again."
        ) from error


def check_extras(source: str, extras: Mapping[str, Any], *, num_classes: int, in_channels: int) -> None:
    """Refuse class names and a normalisation that are not of the right types, or not one a logit and channel.

    Args:
        source: The file, which error messages start with.
        extras: What a file holds beside its network.
        num_classes: Logits of its network.
        in_channels: Channels of its images.

    Raises:
        InvalidInputError: The message names the value.
    """
    classes, normalization = extras.get("classes"), extras.get("normalization")
    if classes is not None and not (_are(_is_text)(classes) and len(classes) == num_classes):
        raise _of_another_kind(source, "classes", classes, f"{num_classes} names")
    provenance = extras.get("provenance")
    if provenance is not None and not _map_to(_or_none(_is_text))(provenance):
        raise _of_another_kind(source, "provenance", provenance, "names with texts")
    if normalization is None:
        return
    if not isinstance(normalization, dict) or not {"mean", "std"} <= normalization.keys() <= _NORMALIZATION.keys():
        raise _of_another_kind(source, "normalization", normalization, "mean, std and transform")
    for key, value in normalization.items():
        is_right, kind = _NORMALIZATION[key]
        if not is_right(value) or (key != "transform" and len(value) != in_channels):
            raise _of_another_kind(source, f"normalization.{key}", value, f"{kind}, one a channel of {in_channels}")


def check_tensors(source: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors whose names or shapes are not those of the network.

    Args:
        source: The file, or "net", which the error message starts with.
        expected: Shapes by name, as the network has them.
        found: Shapes by name, as they are.

    Raises:
        InvalidInputError: The message names the first tensor that differs.
    """
    for name in sorted(expected.keys() | found.keys()):
        shape = found.get(name, "missing")
        if shape != expected.get(name):
            raise InvalidInputError(
                f"{source}: {name} is {shape}, and its model.spec asks for {expected.get(name, 'no such tensor')}. "
                "Its weights belong to another architecture."
            )


def check_layers(net: Network, expected: Network) -> None:
    """Refuse a network whose layers are not those that `build` makes of its specification.

    Packing builds the network again from its specification, so a layer put in by hand would silently be lost.

    Args:
        net: The network to pack.
        expected: What `build` makes of its specification, on any device.

    Raises:
        InvalidInputError: The message names the first layer that differs.
    """
    own, others = dict(net.named_modules()), dict(expected.named_modules())
    for path in [*others, *(path for path in own if path not in others)]:
        there, wanted = (_shown(modules.get(path)) for modules in (own, others))
        if there != wanted:
            raise InvalidInputError(
                f"net: {path} is {there}, and the {net.spec.name} of its spec has {wanted} there; pack knows the "
                "layers of dabnn.models only, and would lose it. Take the change back before packing, or give it a "
                "model of its own in dabnn/models."
            )


def _shown(module: nn.Module | None) -> str:
    """Return what of a layer decides its results besides its tensors, as text."""
    if module is None:
        return "no layer"
    if isinstance(module, _BatchNorm):  # synchronized or not, which evaluates alike
        return f"BatchNorm({module.num_features}, eps={module.eps:g}, affine={module.affine})"
    if isinstance(module, nn.Dropout | nn.Dropout2d | nn.ReLU):  # their arguments change no result
        return type(module).__name__
    text = "" if isinstance(module, nn.Sequential | nn.ModuleDict) else module.extra_repr()
    if isinstance(module, BinaryConv2d):
        text = f"{text}, {module.options.input_quantizer}"
    return f"{type(module).__name__}({text})"


def _of_another_kind(source: str, key: str, value: Any, kind: str) -> InvalidInputError:
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return InvalidInputError(
        f"{source}: its {key} is {shown}, where dab writes {kind}. It is damaged or not from dab; export the model "
        "again."
    )
