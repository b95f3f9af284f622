"""Building a model by name: a family's real architecture, initialised, with a layer plan applied."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from dabnn.choices import unknown_choice
from dabnn.errors import InvalidInputError
from dabnn.models.bincifar import BINCIFAR
from dabnn.models.family import Family, Kind, Shape, Variant
from dabnn.models.network import ModelSpec, Network
from dabnn.models.sketchanet import SKETCHANET
from dabnn.plans import LayerPlan, apply_plan, bin_range, check_indices, numbered_convs
from dabnn.quantizers import CENTERS, check_method

_FAMILY_OF: Mapping[str, Family] = {name: family for family in (SKETCHANET, BINCIFAR) for name in family.variants}


def names() -> list[str]:
    """Return the names that `build` knows, families together."""
    return list(_FAMILY_OF)


def find(name: str) -> tuple[Family, Variant]:
    """Return the family and the variant of a model name.

    Raises:
        InvalidInputError: if there is no such model; the message names the nearest.
    """
    if name not in _FAMILY_OF:
        raise unknown_choice("model.name", name, _FAMILY_OF)
    family = _FAMILY_OF[name]
    return family, family.variants[name]


def build(
    name: str,
    *,
    num_classes: int,
    in_channels: int | None = None,
    input_size: int | None = None,
    width: float = 1.0,
    bin_start: int | None = None,
    bin_end: int | None = None,
    weights: str = "dab",
    center: str | None = None,
    inputs: str | Sequence[int] = "model",
    plan: LayerPlan | Mapping[str, Sequence[int]] | None = None,
    seed: int | None = None,
) -> Network:
    """Return a network by name, in training mode on the CPU, initialised as the reference code does.

    Weights are Kaiming-normal with fan-out, std = sqrt(2 / (F kh kw)), biases zero, BN scale 1 and shift 0.

    Args:
        name: one of `names()`.
        num_classes: number of logits.
        in_channels: channels of the images; default of the family.
        input_size: height and width of the images, pixels; default of the family.
        width: multiplier of every hidden channel count; results of 8 and more are rounded to multiples of 8.
        bin_start: first convolution with binary weights, counted from 1; default 2, for float models no layer.
        bin_end: last one, included; default the last but one, for float models no layer.
        weights: quantizer of those weights: dab, xnor or sign.
        center: none, filter or tap for all of them; default tap where the input is binary, else none.
        inputs: which convolutions take sign inputs: "model" as the variant says, "none", or their numbers. The order
            of the blocks stays the variant's.
        plan: both sets of layers at once, instead of bin_start, bin_end and inputs.
        seed: if given, the parameters are a function of it alone; if not, they draw on torch's global generator, which
            is otherwise left as it was.

    Raises:
        InvalidInputError: starting with the field that cannot be.
    """
    family, variant = find(name)
    check_method(weights)
    if center is not None and center not in CENTERS:
        raise unknown_choice("binarize.center", center, CENTERS)
    shape = _shape(family, in_channels, input_size, num_classes, width)
    with torch.random.fork_rng(devices=[]):
        stages = family.build(variant, shape)
    num_convs = len(numbered_convs(nn.ModuleDict(stages)))
    if plan is None:
        bin_start, bin_end = _resolve_range(variant, bin_start, bin_end, num_convs)
        resolved = _plan(variant, bin_start, bin_end, inputs, num_convs)
    else:
        _refuse_mixture(bin_start, bin_end, inputs)
        resolved = plan if isinstance(plan, LayerPlan) else _plan_of(plan)
    spec = ModelSpec(
        name=name,
        num_classes=num_classes,
        in_channels=shape.in_channels,
        input_size=shape.input_size,
        width=width,
        bin_start=bin_start,
        bin_end=bin_end,
        weights=weights,
        center=center,
        inputs=inputs if isinstance(inputs, str) else tuple(sorted(set(inputs))),
        plan=None if plan is None else _as_dict(resolved),
    )
    net = Network(stages, spec)
    _initialize(net, None if seed is None else torch.Generator().manual_seed(seed))
    apply_plan(net, resolved, weights=weights, center=center)
    return net


def _shape(family: Family, in_channels: int | None, input_size: int | None, num_classes: int, width: float) -> Shape:
    shape = Shape(
        in_channels=family.in_channels if in_channels is None else in_channels,
        input_size=family.input_size if input_size is None else input_size,
        num_classes=num_classes,
        width=width,
    )
    for field in ("in_channels", "input_size", "num_classes"):
        if getattr(shape, field) < 1:
            raise InvalidInputError(f"model.{field}: {getattr(shape, field)} must be at least 1.")
    if not (width > 0 and math.isfinite(width)):
        raise InvalidInputError(f"model.width: {width} must be a positive number; 1.0 is the published size.")
    return shape


def _resolve_range(
    variant: Variant, bin_start: int | None, bin_end: int | None, num_convs: int
) -> tuple[int | None, int | None]:
    """Return the range with its defaults; (None, None) for a float variant that is given none."""
    if bin_start is None and bin_end is None and variant.kind is Kind.FLOAT:
        return None, None
    return 2 if bin_start is None else bin_start, num_convs - 1 if bin_end is None else bin_end


def _plan(
    variant: Variant, bin_start: int | None, bin_end: int | None, inputs: str | Sequence[int], num_convs: int
) -> LayerPlan:
    named = () if bin_start is None or bin_end is None else bin_range(bin_start, bin_end, num_convs)
    return LayerPlan.of(named, _sign_inputs(variant, inputs, num_convs))


def _sign_inputs(variant: Variant, inputs: str | Sequence[int], num_convs: int) -> frozenset[int]:
    if not isinstance(inputs, str):
        return check_indices("binarize.inputs", inputs, num_convs)
    choices = {"model": variant.signs, "none": frozenset[int]()}
    if inputs not in choices:
        raise unknown_choice("binarize.inputs", inputs, choices)
    return choices[inputs]


def _refuse_mixture(bin_start: int | None, bin_end: int | None, inputs: str | Sequence[int]) -> None:
    if bin_start is not None or bin_end is not None or inputs != "model":
        raise InvalidInputError(
            "binarize.plan: names all layers already, so leave out binarize.bin_start, binarize.bin_end and "
            "binarize.inputs."
        )


def _plan_of(sets: Mapping[str, Sequence[int]]) -> LayerPlan:
    known = ("binary_weights", "binary_inputs")
    for key in sets:
        if key not in known:
            raise unknown_choice("binarize.plan", key, known)
    return LayerPlan.of(**sets)


def _as_dict(plan: LayerPlan) -> dict[str, tuple[int, ...]]:
    return {
        "binary_weights": tuple(sorted(plan.binary_weights)),
        "binary_inputs": tuple(sorted(plan.binary_inputs)),
    }


def _initialize(net: nn.Module, generator: torch.Generator | None) -> None:
    for _, conv in numbered_convs(net).values():
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
