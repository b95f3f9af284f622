"""From what layers cost and lose to a layer plan within a budget.

Cost model: a multiply-accumulate counts as one operation; where weights and inputs are both binary, 64 of them do
(`BINARY_MACS_PER_OPERATION`), since a processor's word holds 64 signs. Binary weights with real inputs save bytes, not
operations: they still take an addition each. Linear layers, BN and activations are the same in every plan and left out
of the operations. Bytes are those of the packed file, `dabnn.models.table`.

Value model: the layers' changes of accuracy, each measured alone, are added up. So a predicted accuracy ranks plans of
one network; it is no forecast of what training with the plan reaches.

The choice is a knapsack with one pick a layer (its own state or another), solved exactly by dynamic programming over
the undominated (cost, value) pairs. Values are whole images and so there are at most as many pairs as totals, a few
thousand.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from dabnn.errors import InvalidInputError
from dabnn.layers import LayerOptions, has_packed_form
from dabnn.models import LayerRow, ModelSpec, Network, build, describe
from dabnn.models.folding import sign_norms
from dabnn.models.table import FLOAT_BYTES
from dabnn.plans import LayerPlan, numbered_convs
from dabnn.sensitivity import LayerFigures

BINARY_MACS_PER_OPERATION = 64
# Operations of the default budget over those of the cheapest plan: what real inputs in two of seven layers of
# Sketch-A-Net cost in the Hybrid paper (180 against 127 MFLOP), rounded up.
DEFAULT_SLACK = 1.5
_IMAGE_LAYER = 1
# Inputs of which less than this share lies on one side of zero have signs that are as good as constant.
_LEAST_SHARE = 0.01
ONE_SIDED, UNPACKED = "one-sided inputs", "no packed form"
_OPTIONS = {"operations": ("--budget-ops", "operations"), "packed_bytes": ("--budget-bytes", "bytes")}


@dataclass(frozen=True)
class Cost:
    """What a layer, or a network, costs.

    Attributes:
        operations: For one image, as the cost model counts them, times `BINARY_MACS_PER_OPERATION`: a whole number.
        packed_bytes: Of the packed file.
    """

    operations: int
    packed_bytes: int


@dataclass(frozen=True)
class Choice:
    """What one layer can be in a plan.

    Attributes:
        binary_weights: Whether its weights are binary.
        binary_inputs: Whether its inputs are.
        value: Images more (or, below zero, fewer) that the network gets right.
    """

    binary_weights: bool
    binary_inputs: bool
    value: int


@dataclass(frozen=True)
class Budget:
    """What a plan may cost.

    Attributes:
        measure: What is limited: operations for one image, or bytes of the packed file.
        limit: So many at most.
    """

    measure: Literal["operations", "packed_bytes"]
    limit: float


@dataclass(frozen=True)
class Proposal:
    """A plan and what is expected of it.

    Attributes:
        binary_weights: Paths of the layers with binary weights.
        binary_inputs: Paths of the layers with binary inputs.
        based_on: The figure that decided: gain_if_real or loss_if_binary.
        predicted_top1: Percent; the network's own, BN statistics estimated again, plus the changes of the layers.
        operations: For one image.
        packed_bytes: Of the packed file.
        own_operations: Of the run's network.
        own_packed_bytes: Of the run's network.
        budget: What was allowed.
        left_out: Path of each layer that was not considered with binary weights and inputs though it could be so ->
            why: `ONE_SIDED`, its signs would be as good as constant, as behind a ReLU; `UNPACKED`, it could not be
            exported.
    """

    binary_weights: list[str]
    binary_inputs: list[str]
    based_on: str
    predicted_top1: float
    operations: float
    packed_bytes: int
    own_operations: float
    own_packed_bytes: int
    budget: Budget
    left_out: dict[str, str]


def layer_choices(layer: LayerFigures, num_images: int, *, from_gains: bool) -> list[Choice]:
    """Return what a layer can be, as it is now first.

    Args:
        layer: What was measured.
        num_images: Images that accuracies are shares of.
        from_gains: Whether the network is binary, so that layers may become real; else real ones may become binary.
            The first layer, which the image feeds, is never given binary inputs.
    """
    now = Choice(layer.binary_weights, layer.binary_inputs, 0)
    found = (
        [(False, False, layer.gain_if_real), (True, False, layer.gain_if_real_inputs)]
        if from_gains
        else [
            (True, False, _negative(layer.loss_if_binary_weights)),
            (True, True, None if layer.index == _IMAGE_LAYER else _negative(layer.loss_if_binary)),
        ]
    )
    return [now] + [
        Choice(weights, inputs, round(points * num_images / 100))
        for weights, inputs, points in found
        if points is not None
    ]


def _negative(points: float | None) -> float | None:
    return None if points is None else -points


def choose(groups: Sequence[Sequence[tuple[int, int]]], limit: int) -> list[int] | None:
    """Return which (cost, value) to take of each group so that costs stay within `limit` and values are largest.

    Of equal values the cheapest wins. Costs may be negative, as long as they are whole numbers like the values.

    Returns:
        One position a group, or None where even the cheapest of each exceeds the limit.
    """
    cheapest = [min(cost for cost, _ in group) for group in groups]
    rest = sum(cheapest)
    # (cost, value, picks as a linked list), costs and values both rising.
    frontier: list[tuple[int, int, Any]] = [(0, 0, None)]
    for group, least in zip(groups, cheapest, strict=True):
        rest -= least
        longer = [
            (cost + more, value + gain, (picks, position))
            for cost, value, picks in frontier
            for position, (more, gain) in enumerate(group)
            if cost + more + rest <= limit
        ]
        frontier = _undominated(longer)
    if not frontier:
        return None
    taken, picks = [], frontier[-1][2]
    while picks is not None:
        picks, position = picks
        taken.append(position)
    return taken[::-1]


def _undominated(states: list[tuple[int, int, Any]]) -> list[tuple[int, int, Any]]:
    kept: list[tuple[int, int, Any]] = []
    for state in sorted(states, key=lambda state: (state[0], -state[1])):
        if not kept or state[1] > kept[-1][1]:
            kept.append(state)
    return kept


def propose(
    spec: ModelSpec, layers: Sequence[LayerFigures], *, num_images: int, top1: float, budget: Budget | None = None
) -> Proposal:
    """Return the plan with the best predicted accuracy within a budget.

    From `gain_if_real` where the network has binary layers, which may become less so; else from `loss_if_binary`.

    Args:
        spec: The run's model.
        layers: What was measured of each layer.
        num_images: Images that accuracies are shares of.
        top1: Of the network in percent, BN statistics estimated again.
        budget: What the plan may cost; None allows `DEFAULT_SLACK` times the operations of the cheapest plan.

    Raises:
        InvalidInputError: The budget is less than the cheapest plan needs.
    """
    from_gains = any(layer.binary_weights or layer.binary_inputs for layer in layers)
    groups = [layer_choices(layer, num_images, from_gains=from_gains) for layer in layers]
    own, outside = _own_cost(spec, layers, groups)
    reasons = _reasons_against(spec, layers)
    groups, left_out = _sensible(layers, groups, reasons)
    costs = choice_costs(spec, groups)
    if budget is None:
        cheapest = sum(min(cost.operations for cost in group) for group in costs)
        budget = Budget("operations", DEFAULT_SLACK * cheapest / BINARY_MACS_PER_OPERATION)
    picks = _picks(groups, costs, outside, budget)
    chosen = [group[pick] for group, pick in zip(groups, picks, strict=True)]
    cost = plan_cost(spec, layers, chosen)
    gain = 100 * sum(choice.value for choice in chosen) / num_images
    return Proposal(
        binary_weights=[layer.path for layer, choice in zip(layers, chosen, strict=True) if choice.binary_weights],
        binary_inputs=[layer.path for layer, choice in zip(layers, chosen, strict=True) if choice.binary_inputs],
        based_on="gain_if_real" if from_gains else "loss_if_binary",
        predicted_top1=min(100.0, max(0.0, top1 + gain)),
        operations=cost.operations / BINARY_MACS_PER_OPERATION,
        packed_bytes=cost.packed_bytes,
        own_operations=own.operations / BINARY_MACS_PER_OPERATION,
        own_packed_bytes=own.packed_bytes,
        budget=budget,
        left_out=left_out,
    )


def _own_cost(spec: ModelSpec, layers: Sequence[LayerFigures], groups: Sequence[Sequence[Choice]]) -> tuple[Cost, int]:
    """Return what the run's network costs, and its bytes outside the convolutions, such as BN."""
    own = plan_cost(spec, layers, [group[0] for group in groups])
    costs = choice_costs(spec, [group[:1] for group in groups])
    return own, own.packed_bytes - sum(cost.packed_bytes for (cost,) in costs)


def _reasons_against(spec: ModelSpec, layers: Sequence[LayerFigures]) -> dict[str, str]:
    """Return path of a layer -> why it should not have binary weights and inputs, for those that should not."""
    convs = numbered_convs(_shapes(spec, LayerPlan.of()))
    reasons = {path: UNPACKED for path, conv in convs.values() if not has_packed_form(conv)}
    if LayerOptions(**spec.options).input_quantizer == "sign":  # the others take the signs of something else than x
        for layer in layers:
            share = layer.input_negative_share
            if share is not None and min(share, 1 - share) < _LEAST_SHARE:
                reasons.setdefault(layer.path, ONE_SIDED)
    return reasons


def _sensible(
    layers: Sequence[LayerFigures], groups: Sequence[list[Choice]], reasons: Mapping[str, str]
) -> tuple[list[list[Choice]], dict[str, str]]:
    """Return the choices without those that there are reasons against, and the reasons that left one out.

    What a layer is now stays, unless it has no packed form and could be something else.
    """
    kept, left_out = [], {}
    for layer, group in zip(layers, groups, strict=True):
        reason = reasons.get(layer.path)
        rest = [choice for choice in group if not (choice.binary_weights and choice.binary_inputs)]
        if reason == ONE_SIDED and group[0] not in rest:
            rest = group
        if reason is None or not rest or len(rest) == len(group):
            kept.append(group)
        else:
            kept.append(rest)
            left_out[layer.path] = reason
    return kept, left_out


def _picks(
    groups: Sequence[Sequence[Choice]], costs: Sequence[Sequence[Cost]], outside: int, budget: Budget
) -> list[int]:
    if budget.measure == "operations":
        prices = [[cost.operations for cost in group] for group in costs]
        limit, unit, elsewhere = math.floor(budget.limit * BINARY_MACS_PER_OPERATION), BINARY_MACS_PER_OPERATION, 0
    else:
        prices = [[cost.packed_bytes for cost in group] for group in costs]
        limit, unit, elsewhere = math.floor(budget.limit) - outside, 1, outside
    values = [[choice.value for choice in group] for group in groups]
    picks = choose([list(zip(*pair, strict=True)) for pair in zip(prices, values, strict=True)], limit)
    if picks is None:
        least = (sum(min(group) for group in prices) + elsewhere) / unit
        option, what = _OPTIONS[budget.measure]
        raise InvalidInputError(
            f"{option}: {budget.limit:,.0f} {what} are too few: this network takes {least:,.0f} even where every layer "
            "that was measured is as cheap as it gets. Allow at least these."
        )
    return picks


def plan_cost(spec: ModelSpec, layers: Sequence[LayerFigures], chosen: Sequence[Choice]) -> Cost:
    """Return the cost of the model with these layers binary; its shapes are enough, no weights are made."""
    pairs = list(zip(layers, chosen, strict=True))
    plan = LayerPlan.of(
        [layer.index for layer, choice in pairs if choice.binary_weights],
        [layer.index for layer, choice in pairs if choice.binary_inputs],
    )
    table = describe(_shapes(spec, plan))
    return Cost(sum(map(_operations, table.layers)), table.packed_bytes)


def choice_costs(spec: ModelSpec, groups: Sequence[Sequence[Choice]]) -> list[list[Cost]]:
    """Return the cost of every choice of every layer, `groups` in the order of their numbers.

    The BN of which a layer reads nothing but the sign is smaller in the packed file; what that saves is the layer's.
    """
    costs: dict[tuple[int, bool, bool], Cost] = {}
    for weights, inputs in {(choice.binary_weights, choice.binary_inputs) for group in groups for choice in group}:
        # One network for all layers that can be so.
        able = [
            index
            for index, group in enumerate(groups, start=1)
            if any((choice.binary_weights, choice.binary_inputs) == (weights, inputs) for choice in group)
        ]
        net = _shapes(spec, LayerPlan.of(able if weights else [], able if inputs else []))
        saved = _saved_before_signs(net)
        for row in describe(net).layers:
            num_bytes = row.packed_bytes - saved.get(row.path, 0)
            costs[row.index, weights, inputs] = Cost(_operations(row), num_bytes)
    return [
        [costs[index, choice.binary_weights, choice.binary_inputs] for choice in group]
        for index, group in enumerate(groups, start=1)
    ]


def _shapes(spec: ModelSpec, plan: LayerPlan) -> Network:
    """Return the model with another plan, without memory for its parameters."""
    values = asdict(spec) | {"bin_start": None, "bin_end": None, "layers": None, "inputs": "model", "plan": plan}
    with torch.device("meta"):
        return build(**values)


def _operations(row: LayerRow) -> int:
    return BINARY_MACS_PER_OPERATION * (row.macs - row.bit_ops) + row.bit_ops


def _saved_before_signs(net: Network) -> dict[str, int]:
    """Return path of a convolution -> bytes that its binary inputs save on the BN before it."""
    norms, saved = sign_norms(net), {}
    for path, chain in net.named_modules():
        for (name, _), (next_name, conv) in itertools.pairwise(chain.named_children()):
            prefix = f"{path}." if path else ""
            if f"{prefix}{name}" in norms and isinstance(conv, nn.Conv2d):
                # Scale and shift of a channel become a threshold and a bit.
                saved[f"{prefix}{next_name}"] = FLOAT_BYTES * conv.in_channels - math.ceil(conv.in_channels / 8)
    return saved
