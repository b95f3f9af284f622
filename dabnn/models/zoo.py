"""Building a model by name: a family's real architecture, initialised, with a layer plan applied."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

import torch
from torch import nn

from dabnn.choices import unknown_choice
from dabnn.errors import InvalidInputError
from dabnn.models.alexnet import ALEXNET
from dabnn.models.bincifar import BINCIFAR
from dabnn.models.blocks import Blocks, Chain
from dabnn.models.densenet import DENSENET
from dabnn.models.family import ACTIVATIONS, BLOCKS, Family, Kind, Stages, Variant, refuse_input_size
from dabnn.models.googlenet import GOOGLENET
from dabnn.models.mobilenet import MOBILENET
from dabnn.models.network import ModelSpec, Network
from dabnn.models.nin import NIN
from dabnn.models.plan_warnings import warn_of_plan
from dabnn.models.resnet import BIREAL18, RESNET, RESNET18, RESNET20
from dabnn.models.sketchanet import SKETCHANET
from dabnn.models.squeezenet import SQUEEZENET
from dabnn.models.vgg import VGG16_BNCIFAR, VGG_SMALL
from dabnn.options import LayerOptions
from dabnn.plans import LISTED, LayerPlan, apply_plan, bin_range, numbered_convs, resolve_selectors
from dabnn.quantizers import CENTERS, check_method

_FAMILIES = (
    SKETCHANET, ALEXNET, GOOGLENET, SQUEEZENET, MOBILENET, RESNET, RESNET18, BINCIFAR, NIN, VGG16_BNCIFAR, DENSENET,
    VGG_SMALL, RESNET20, BIREAL18,
)  # fmt: skip
_FAMILY_OF: Mapping[str, Family] = {name: family for family in _FAMILIES for name in family.variants}
_INPUTS = ("model", "none")


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
    block: str | None = None,
    activation: str | None = None,
    bin_start: int | None = None,
    bin_end: int | None = None,
    weights: str = "dab",
    center: str | None = None,
    inputs: str | Sequence[int | str] = "model",
    layers: Sequence[int | str] | None = None,
    plan: LayerPlan | Mapping[str, Sequence[int | str]] | None = None,
    options: LayerOptions | Mapping[str, Any] | None = None,
    seed: int | None = None,
) -> Network:
    """Return a network by name, in training mode on the CPU, initialised as the reference code does.

    Weights of convolutions are Kaiming-normal with fan-out, std = sqrt(2 / (F kh kw)), those of linear layers uniform
    within 1 / sqrt(inputs), biases zero, BN scale 1 and shift 0.

    A selector names layers: a number, a path as `describe` shows it, or a regular expression for whole paths.

    Args:
        name: one of `names()`.
        num_classes: number of logits.
        in_channels: channels of the images; default of the family.
        input_size: height and width of the images, pixels; default of the family.
        width: multiplier of every hidden channel count; results of 8 and more are rounded to multiples of 8.
        block: order of the blocks, reference or bireal (`dabnn.models.blocks`); default of the variant.
        activation: relu or rprelu; default of the variant and the order.
        bin_start: first convolution with binary weights, counted from 1; default 2, for float models no layer.
        bin_end: last one, included; default the last before the classifier, which is the last but one convolution
            unless the classifier is a linear layer; for float models no layer.
        weights: quantizer of those weights (`dabnn.quantizers`).
        center: none, filter or tap for all of them; default tap where the input is binary, else none.
        inputs: which convolutions take sign inputs: "model" as the variant says, "none", or selectors. The order of
            the blocks stays the variant's.
        layers: selectors of the convolutions with binary weights, instead of bin_start and bin_end.
        plan: both sets of layers at once, instead of bin_start, bin_end, layers and inputs.
        options: how the binary layers behave; a mapping changes the defaults of the variant, a `LayerOptions` replaces
            them.
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
        inputs=inputs if isinstance(inputs, str) else (),
        plan=None,
        block=variant.block if block is None else block,
        activation=variant.activation if activation is None else activation,
        options=_options(variant, options),
    )
    _check(spec)
    _check_layers(spec, inputs, layers, plan)
    stages = real_stages(spec)
    spec = _with_layers(spec, Chain(stages), inputs, layers, plan)
    net = Network(stages, spec)
    _initialize(net, None if seed is None else torch.Generator().manual_seed(seed))
    apply_plan(net, _layer_plan(spec), weights=weights, center=center, options=LayerOptions(**spec.options))
    warn_of_plan(net)
    return net


def real_stages(spec: ModelSpec) -> Stages:
    """Return the named modules of the real network of a specification, with torch's default parameters."""
    family, variant = find(spec.name)
    with torch.random.fork_rng(devices=[]):
        return family.build(Blocks(variant, spec.shape(), spec.block, spec.activation))


def _options(variant: Variant, options: LayerOptions | Mapping[str, Any] | None) -> dict[str, Any]:
    if isinstance(options, LayerOptions):
        return asdict(options)
    given = {} if options is None else dict(options)
    known = [field.name for field in fields(LayerOptions)]
    for key in given:
        if key not in known:
            raise unknown_choice("binarize.options", key, known)
    return asdict(LayerOptions(**{**variant.options, **given}))


def _check(spec: ModelSpec) -> None:
    family, variant = find(spec.name)
    for field in ("in_channels", "input_size", "num_classes"):
        if getattr(spec, field) < 1:
            raise InvalidInputError(f"model.{field}: {getattr(spec, field)} must be at least 1.")
    if not (spec.width > 0 and math.isfinite(spec.width)):
        raise InvalidInputError(f"model.width: {spec.width} must be a positive number; 1.0 is the published size.")
    if spec.input_size < family.smallest:
        rule = f"nothing is left after its pools. Use {family.smallest} or more"
        raise refuse_input_size(family.name, spec.input_size, rule)
    _check_block(spec, family, variant)
    check_method(spec.weights)
    if spec.center is not None and spec.center not in CENTERS:
        raise unknown_choice("binarize.center", spec.center, CENTERS)


def _check_block(spec: ModelSpec, family: Family, variant: Variant) -> None:
    if spec.block not in BLOCKS:
        raise unknown_choice("model.block", spec.block, BLOCKS)
    if spec.activation is not None and spec.activation not in ACTIVATIONS:
        raise unknown_choice("model.activation", spec.activation, ACTIVATIONS)
    if spec.block not in family.blocks or (spec.block == "bireal" and not variant.signs):
        able = [name for name, other in _FAMILY_OF.items() if spec.block in other.blocks]
        if spec.block == "bireal":
            able = [name for name in able if find(name)[1].signs]
        raise InvalidInputError(
            f"model.block: {spec.name} cannot take {spec.block!r}; bireal needs binary inputs in a chain of layers or "
            f"in a residual network. Models that can take {spec.block!r}: {', '.join(able)}."
        )
    if spec.block == "bireal" and spec.activation == "relu":
        raise InvalidInputError(
            "model.activation: a relu before a sign leaves only +1, and with model.block 'bireal' no normalisation "
            "stands between them. Use rprelu, or leave model.activation out for none there."
        )


def _check_layers(
    spec: ModelSpec,
    inputs: str | Sequence[int | str],
    layers: Sequence[int | str] | None,
    plan: LayerPlan | Mapping[str, Sequence[int | str]] | None,
) -> None:
    has_range = spec.bin_start is not None or spec.bin_end is not None
    if plan is not None and (has_range or layers is not None or inputs != "model"):
        raise InvalidInputError(
            "binarize.plan: names all layers already, so leave out binarize.bin_start, binarize.bin_end, "
            "binarize.layers and binarize.inputs."
        )
    if layers is not None and has_range:
        raise InvalidInputError(
            "binarize.layers: names the layers with binary weights already, so leave out binarize.bin_start and "
            "binarize.bin_end."
        )
    if isinstance(inputs, str) and inputs not in _INPUTS:
        raise unknown_choice("binarize.inputs", inputs, _INPUTS)


def _with_layers(
    spec: ModelSpec,
    net: nn.Module,
    inputs: str | Sequence[int | str],
    layers: Sequence[int | str] | None,
    plan: LayerPlan | Mapping[str, Sequence[int | str]] | None,
) -> ModelSpec:
    """Return the spec with all layers as numbers: selectors resolved, missing ends of a range filled in."""
    if plan is not None:
        return replace(spec, plan=_sets(plan, net))
    if not isinstance(inputs, str):
        spec = replace(spec, inputs=_numbers("binarize.inputs", inputs, net))
    if layers is not None:
        return replace(spec, layers=_numbers("binarize.layers", layers, net))
    _, variant = find(spec.name)
    if spec.bin_start is None and spec.bin_end is None:
        if variant.weights is not None:
            return replace(spec, layers=tuple(sorted(variant.weights)))
        if variant.kind is Kind.FLOAT:
            return spec
    num_convs = len(numbered_convs(net))
    has_linear_head = any(isinstance(module, nn.Linear) for module in net.modules())
    first, last = 2, num_convs if has_linear_head else num_convs - 1
    bin_start = first if spec.bin_start is None else spec.bin_start
    bin_end = last if spec.bin_end is None else spec.bin_end
    if spec.bin_end is None and last < bin_start <= num_convs:
        raise InvalidInputError(
            f"binarize.bin_start: {bin_start} lies behind {last}, where the range ends unless binarize.bin_end says "
            f"otherwise. Use 1 to {last}, or set binarize.bin_end; {LISTED}."
        )
    if spec.bin_start is None and 1 <= bin_end < first:
        raise InvalidInputError(
            f"binarize.bin_end: {bin_end} lies before {first}, where the range starts unless binarize.bin_start says "
            f"otherwise. Use {first} to {num_convs}, or set binarize.bin_start; {LISTED}."
        )
    bin_range(bin_start, bin_end, num_convs)
    return replace(spec, bin_start=bin_start, bin_end=bin_end)


def _sets(plan: LayerPlan | Mapping[str, Sequence[int | str]], net: nn.Module) -> dict[str, tuple[int, ...]]:
    sets = asdict(plan) if isinstance(plan, LayerPlan) else plan
    known = [field.name for field in fields(LayerPlan)]
    for key in sets:
        if key not in known:
            raise unknown_choice("binarize.plan", key, known)
    # A user knows the sets as the keys of a plan file.
    fields_of_plan = {key: f"binarize.plan.{key.removeprefix('binary_')}" for key in known}
    return {key: _numbers(field, sets.get(key, ()), net) for key, field in fields_of_plan.items()}


def _numbers(field: str, selectors: Iterable[int | str], net: nn.Module) -> tuple[int, ...]:
    return tuple(sorted(resolve_selectors(field, selectors, net)))


def _layer_plan(spec: ModelSpec) -> LayerPlan:
    _, variant = find(spec.name)
    if spec.plan is not None:
        return LayerPlan.of(**spec.plan)
    named: Iterable[int] = () if spec.layers is None else spec.layers
    if spec.bin_start is not None and spec.bin_end is not None:
        named = range(spec.bin_start, spec.bin_end + 1)
    if isinstance(spec.inputs, tuple):
        return LayerPlan.of(named, spec.inputs)
    return LayerPlan.of(named, variant.signs if spec.inputs == "model" else ())


def _initialize(net: nn.Module, generator: torch.Generator | None) -> None:
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.is_meta:
            continue  # shapes alone; to draw nothing torch would import its compiler, 2 s and 170 MB
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        elif isinstance(module, nn.Linear):
            # sqrt(5) makes the bound 1 / sqrt(inputs), torch's own and with it the reference's.
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=generator)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
