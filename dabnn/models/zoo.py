"""Building a model by name: a family's real architecture, initialised, with a layer plan applied."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace

import torch
from torch import nn

from dabnn.choices import unknown_choice
from dabnn.errors import InvalidInputError
from dabnn.models.bincifar import BINCIFAR
from dabnn.models.family import Family, Kind, Variant
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
    spec = ModelSpec(
        name=name,
        num_classes=num_classes,
        in_channels=family.in_channels if in_channels is None else in_channels,
        input_size=family.input_size if input_size is None else input_size,
        width=width,
        bin_start=bin_start,
        bin_end=bin_end,
        weights=weights,
        center=center,
        inputs=inputs if isinstance(inputs, str) else tuple(sorted(set(inputs))),
        plan=None if plan is None else _sets(plan),
    )
    _check(spec)
    with torch.random.fork_rng(devices=[]):
        stages = family.build(variant, spec.shape())
    num_convs = len(numbered_convs(nn.ModuleDict(stages)))
    spec = _with_range(spec, variant, num_convs)
    net = Network(stages, spec)
    _initialize(net, None if seed is None else torch.Generator().manual_seed(seed))
    apply_plan(net, _layer_plan(spec, variant, num_convs), weights=weights, center=center)
    return net


def _sets(plan: LayerPlan | Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    sets = asdict(plan) if isinstance(plan, LayerPlan) else plan
    known = [field.name for field in fields(LayerPlan)]
    for key in sets:
        if key not in known:
            raise unknown_choice("binarize.plan", key, known)
    return {key: tuple(sorted(sets.get(key, ()))) for key in known}


def _check(spec: ModelSpec) -> None:
    for field in ("in_channels", "input_size", "num_classes"):
        if getattr(spec, field) < 1:
            raise InvalidInputError(f"model.{field}: {getattr(spec, field)} must be at least 1.")
    if not (spec.width > 0 and math.isfinite(spec.width)):
        raise InvalidInputError(f"model.width: {spec.width} must be a positive number; 1.0 is the published size.")
    check_method(spec.weights)
    if spec.center is not None and spec.center not in CENTERS:
        raise unknown_choice("binarize.center", spec.center, CENTERS)
    has_range = spec.bin_start is not None or spec.bin_end is not None
    if spec.plan is not None and (has_range or spec.inputs != "model"):
        raise InvalidInputError(
            "binarize.plan: names all layers already, so leave out binarize.bin_start, binarize.bin_end and "
            "binarize.inputs."
        )


def _with_range(spec: ModelSpec, variant: Variant, num_convs: int) -> ModelSpec:
    """Return the spec with a missing end of its range filled in; without a range where a plan or nothing is named."""
    has_none = spec.bin_start is None and spec.bin_end is None
    if spec.plan is not None or (has_none and variant.kind is Kind.FLOAT):
        return spec
    return replace(
        spec,
        bin_start=2 if spec.bin_start is None else spec.bin_start,
        bin_end=num_convs - 1 if spec.bin_end is None else spec.bin_end,
    )


def _layer_plan(spec: ModelSpec, variant: Variant, num_convs: int) -> LayerPlan:
    if spec.plan is not None:
        return LayerPlan.of(**spec.plan)
    if spec.bin_start is None or spec.bin_end is None:
        named = range(0)
    else:
        named = bin_range(spec.bin_start, spec.bin_end, num_convs)
    return LayerPlan.of(named, _sign_inputs(variant, spec.inputs, num_convs))


def _sign_inputs(variant: Variant, inputs: str | tuple[int, ...], num_convs: int) -> frozenset[int]:
    if isinstance(inputs, tuple):
        return check_indices("binarize.inputs", inputs, num_convs)
    choices = {"model": variant.signs, "none": frozenset[int]()}
    if inputs not in choices:
        raise unknown_choice("binarize.inputs", inputs, choices)
    return choices[inputs]


def _initialize(net: nn.Module, generator: torch.Generator | None) -> None:
    for _, conv in numbered_convs(net).values():
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
