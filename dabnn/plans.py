"""Layer plans: which convolutions have binary weights and which take sign inputs.

Convolutions are numbered from 1 in the order of `modules()`, as the reference program's binStart and binEnd count them
(both inclusive). Linear layers are not counted. A network is first built real; `apply_plan` then exchanges the planned
convolutions, so the numbering holds by construction for every model.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from dabnn.errors import InvalidInputError
from dabnn.layers import BinaryConv2d


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
    model_has = _model_has(num_convs)
    if not 1 <= bin_start <= num_convs:
        raise InvalidInputError(f"binarize.bin_start: {bin_start} is outside the model, which has {model_has}.")
    if bin_end < bin_start:
        raise InvalidInputError(
            f"binarize.bin_end: {bin_end} lies before binarize.bin_start ({bin_start}), so the range names no layer. "
            f"Use {bin_start} to {num_convs}."
        )
    if bin_end > num_convs:
        raise InvalidInputError(f"binarize.bin_end: {bin_end} is outside the model, which has {model_has}.")
    return range(bin_start, bin_end + 1)


def check_indices(field: str, indices: Iterable[int], num_convs: int) -> frozenset[int]:
    """Return the layer numbers as a set.

    Raises:
        InvalidInputError: starting with `field`, if a number names no convolution of the model.
    """
    chosen = frozenset(indices)
    outside = sorted(index for index in chosen if not 1 <= index <= num_convs)
    if outside:
        raise InvalidInputError(f"{field}: {outside} outside the model, which has {_model_has(num_convs)}.")
    return chosen


def apply_plan(net: nn.Module, plan: LayerPlan, *, weights: str, center: str | None) -> None:
    """Exchange, in place, the planned convolutions of a real network for binary ones that share their parameters.

    Args:
        net: network of plain `nn.Conv2d`.
        plan: which layers; one in neither set stays as it is.
        weights: quantizer of the layers in `plan.binary_weights`.
        center: what those layers subtract first; None means the layer's default.

    Raises:
        InvalidInputError: if the plan names a layer that the model lacks, or the layer refuses the options.
    """
    convs = numbered_convs(net)
    check_indices("binarize.binary_weights", plan.binary_weights, len(convs))
    check_indices("binarize.binary_inputs", plan.binary_inputs, len(convs))
    for index in sorted(plan.binary_weights | plan.binary_inputs):
        path, conv = convs[index]
        has_binary_weights = index in plan.binary_weights
        binary = BinaryConv2d.from_conv(
            conv,
            weight_quantizer=weights if has_binary_weights else None,
            center=center if has_binary_weights else None,
            binary_input=index in plan.binary_inputs,
        )
        net.set_submodule(path, binary)


def _model_has(num_convs: int) -> str:
    return f"{num_convs} convolutions, numbered 1 to {num_convs}; linear layers are not counted"
