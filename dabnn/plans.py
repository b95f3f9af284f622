"""Layer plans: which convolutions have binary weights and which take sign inputs.

Convolutions are numbered from 1 in the order of `modules()`, as the reference program's binStart and binEnd count them
(both inclusive). Linear layers are not counted. A network is first built real; `apply_plan` then exchanges the planned
convolutions, so the numbering holds by construction for every model. A user names layers by selectors: numbers, paths,
or regular expressions. Plan files are read by `orchestrator.plan_file`.
"""

import functools
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches

from torch import nn

from dabnn.errors import InvalidInputError
from dabnn.layers import BinaryConv2d, LayerOptions

_log = logging.getLogger(__name__)
_IMAGE_LAYER = 1
LISTED = "`dab models show NAME` lists them"


@dataclass(frozen=True)
class LayerPlan:
    """The numbers (from 1) of the convolutions whose weights, and whose inputs, are binary."""

    binary_weights: frozenset[int]
    binary_inputs: frozenset[int]

    @classmethod
    def of(cls, binary_weights: Iterable[int] = (), binary_inputs: Iterable[int] = ()) -> "LayerPlan":
        """Return the plan for any iterables of layer numbers."""
        return cls(frozenset(binary_weights), frozenset(binary_inputs))


def numbered_convs(net: nn.Module) -> dict[int, tuple[str, nn.Conv2d]]:
    """Return {number: (path, convolution)} of a network, in the order in which bin_start and bin_end count."""
    convs = ((path, module) for path, module in net.named_modules() if isinstance(module, nn.Conv2d))
    return dict(enumerate(convs, start=1))


def bin_range(bin_start: int, bin_end: int, num_convs: int) -> range:
    """Return the numbers bin_start .. bin_end, both included, of a model with `num_convs` convolutions.

    Raises:
        InvalidInputError: if the range is reversed or reaches outside the model.
    """
    if not 1 <= bin_start <= num_convs:
        raise InvalidInputError(f"binarize.bin_start: {bin_start} is {_outside(num_convs)}")
    if bin_end < bin_start:
        raise InvalidInputError(
            f"binarize.bin_end: {bin_end} lies before binarize.bin_start ({bin_start}), so the range names no layer. "
            f"Use {bin_start} to {num_convs}."
        )
    if bin_end > num_convs:
        raise InvalidInputError(f"binarize.bin_end: {bin_end} is {_outside(num_convs, least=bin_start)}")
    return range(bin_start, bin_end + 1)


def check_indices(field: str, indices: Iterable[int], num_convs: int) -> frozenset[int]:
    """Return the layer numbers as a set.

    Raises:
        InvalidInputError: starting with `field`, if a number names no convolution of the model.
    """
    chosen = frozenset(indices)
    outside = sorted(index for index in chosen if not 1 <= index <= num_convs)
    if outside:
        raise InvalidInputError(f"{field}: {outside} {_outside(num_convs)}")
    return chosen


def resolve_selectors(field: str, selectors: Iterable[int | str], net: nn.Module) -> frozenset[int]:
    """Return the numbers of the convolutions of `net` that any of the selectors names.

    Args:
        field: the configuration field that errors start with.
        selectors: a layer's number; its exact path, such as "stage2.0.conv1"; or else a regular expression that must
            match the whole path, such as "stage[34].*".
        net: the network, real or already with binary layers.

    Raises:
        InvalidInputError: if a number is outside the model, or a text names no layer or is no regular expression.
    """
    number_of = {path: index for index, (path, _) in numbered_convs(net).items()}
    chosen: set[int] = set()
    for selector in selectors:
        if isinstance(selector, str):
            chosen |= _matching(field, selector, number_of)
        else:
            chosen |= check_indices(field, [selector], len(number_of))
    return frozenset(chosen)


def _matching(field: str, selector: str, number_of: dict[str, int]) -> set[int]:
    if selector in number_of:
        return {number_of[selector]}
    nearest = get_close_matches(selector, number_of, n=1, cutoff=0.0)
    hint = f" The nearest layer is {nearest[0]!r}." if nearest else ""
    try:
        pattern = re.compile(selector)
    except re.error as error:
        raise InvalidInputError(
            f"{field}: {selector!r} is no layer, and no regular expression either ({error}).{hint}"
        ) from error
    found = {number for path, number in number_of.items() if pattern.fullmatch(path)}
    if not found:
        below = _convs_below(selector, number_of)
        if below:
            hint = f" {selector!r} holds the layers {', '.join(below)}; {selector + '[.].*'!r} names them all."
        raise InvalidInputError(
            f"{field}: {selector!r} names no layer; the model has {_model_has(len(number_of))}.{hint}"
        )
    return found


def _convs_below(path: str, number_of: dict[str, int]) -> list[str]:
    return [name for name in number_of if name.startswith(f"{path}.")]


def apply_plan(
    net: nn.Module,
    plan: LayerPlan,
    *,
    weights: str,
    center: str | None,
    options: LayerOptions = LayerOptions(),  # noqa: B008 - frozen
) -> None:
    """Exchange, in place, the planned convolutions of a real network for binary ones that share their parameters.

    Binary inputs for the first convolution, which the image feeds, are allowed; a warning is logged once a process.

    Args:
        net: network of plain `nn.Conv2d`.
        plan: which layers; one in neither set stays as it is.
        weights: quantizer of the layers in `plan.binary_weights`.
        center: what those layers subtract first; None means the layer's default.
        options: how all planned layers behave.

    Raises:
        InvalidInputError: if the plan names a layer that the model lacks, or the layer refuses the options.
    """
    convs = numbered_convs(net)
    check_indices("binarize.plan.weights", plan.binary_weights, len(convs))
    check_indices("binarize.plan.inputs", plan.binary_inputs, len(convs))
    if _IMAGE_LAYER in plan.binary_inputs:
        _warn_of_binary_image(convs[_IMAGE_LAYER][0])
    for index in sorted(plan.binary_weights | plan.binary_inputs):
        path, conv = convs[index]
        has_binary_weights = index in plan.binary_weights
        binary = BinaryConv2d.from_conv(
            conv,
            weight_quantizer=weights if has_binary_weights else None,
            center=center if has_binary_weights else None,
            binary_input=index in plan.binary_inputs,
            options=options,
        )
        net.set_submodule(path, binary)


@functools.cache  # once a process: a network is built several times on the way to a run
def _warn_of_binary_image(path: str) -> None:
    _log.warning(
        "binarize: %s takes binary inputs but is fed by the image, of which only the sign of each pixel will be seen. "
        "Leave layer %d out of the inputs unless that is meant.",
        path,
        _IMAGE_LAYER,
    )


def _outside(num_convs: int, least: int = 1) -> str:
    return f"outside the model, which has {_model_has(num_convs)}. Use {least} to {num_convs}; {LISTED}."


def _model_has(num_convs: int) -> str:
    return f"{num_convs} convolutions, numbered 1 to {num_convs}; linear layers are not counted"
