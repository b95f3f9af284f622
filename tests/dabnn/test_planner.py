import itertools
import random
from dataclasses import asdict, replace

import pytest

from dabnn.errors import InvalidInputError
from dabnn.models import build, describe
from dabnn.planner import (
    BINARY_MACS_PER_OPERATION,
    Budget,
    Proposal,
    choice_costs,
    choose,
    layer_choices,
    plan_cost,
    propose,
)
from dabnn.plans import LayerPlan, numbered_convs
from dabnn.sensitivity import LayerFigures, binary_parts

NUM_IMAGES = 200
MODEL = {"num_classes": 10, "in_channels": 1, "input_size": 16, "width": 0.0625}


def layer(index: int, path: str, **figures: float | bool | None) -> LayerFigures:
    nothing = dict.fromkeys(LayerFigures.__dataclass_fields__)
    known = {"input_rmse": 1.0, "input_one_minus_square": 0.5, "binary_weights": False, "binary_inputs": False}
    return LayerFigures(**nothing | known | {"index": index, "path": path} | figures)


def binary_run(gains: list[float], input_gains: list[float]) -> list[LayerFigures]:
    """Rows of bincifarfbin, whose layers 2 to 7 are binary."""
    rows = [layer(1, "conv1"), *(layer(index, f"conv{index}") for index in range(2, 9))]
    for index, gain, input_gain in zip(range(2, 8), gains, input_gains, strict=True):
        rows[index - 1] = replace(
            rows[index - 1], binary_weights=True, binary_inputs=True, gain_if_real=gain, gain_if_real_inputs=input_gain
        )
    return rows


def plan_of(rows: list[LayerFigures], name: str, budget: Budget | None) -> Proposal:
    return propose(build(name, **MODEL).spec, rows, num_images=NUM_IMAGES, top1=80.0, budget=budget)


def test_the_choice_is_the_best_of_all_that_fit() -> None:
    generator = random.Random(3)
    for _ in range(300):
        groups = [
            [(generator.randint(-3, 12), generator.randint(-6, 6)) for _ in range(generator.randint(1, 3))]
            for _ in range(generator.randint(1, 5))
        ]
        limit = generator.randint(-5, 40)
        fitting = [
            (sum(value for _, value in picks), -sum(cost for cost, _ in picks))
            for picks in itertools.product(*groups)
            if sum(cost for cost, _ in picks) <= limit
        ]
        found = choose(groups, limit)
        if found is None:
            assert not fitting
            continue
        picks = [group[position] for group, position in zip(groups, found, strict=True)]
        assert (sum(value for _, value in picks), -sum(cost for cost, _ in picks)) == max(fitting)


def test_many_layers_are_chosen_among_at_once() -> None:
    generator = random.Random(4)
    groups = [[(generator.randint(1, 10**9), generator.randint(-20, 200)) for _ in range(3)] for _ in range(60)]
    limit = sum(min(cost for cost, _ in group) for group in groups) * 2
    picks = choose(groups, limit)
    assert picks is not None
    assert sum(group[position][0] for group, position in zip(groups, picks, strict=True)) <= limit


def test_a_layer_of_a_binary_run_may_become_less_binary_and_one_of_a_float_run_more() -> None:
    both = layer(2, "conv2", binary_weights=True, binary_inputs=True, gain_if_real=1.5, gain_if_real_inputs=-0.5)
    assert [tuple(asdict(choice).values()) for choice in layer_choices(both, 200, from_gains=True)] == [
        (True, True, 0), (False, False, 3), (True, False, -1),
    ]  # fmt: skip
    real = layer(3, "conv3", loss_if_binary=4.0, loss_if_binary_weights=-0.5)
    assert [tuple(asdict(choice).values()) for choice in layer_choices(real, 200, from_gains=False)] == [
        (False, False, 0), (True, False, 1), (True, True, -8),
    ]  # fmt: skip
    assert layer_choices(layer(4, "conv4"), 200, from_gains=True) == layer_choices(
        layer(4, "conv4"), 200, from_gains=False
    )


def test_the_layer_that_the_image_feeds_is_never_given_binary_inputs() -> None:
    image = layer(1, "conv1", loss_if_binary=0.0, loss_if_binary_weights=0.0)
    assert [choice.binary_inputs for choice in layer_choices(image, 200, from_gains=False)] == [False, False]


@pytest.mark.parametrize("measure", ["operations", "packed_bytes"])
def test_costs_of_a_proposal_are_those_of_the_model_built_with_it(measure: str) -> None:
    rows = binary_run([2.0, 0.5, 1.0, -1.0, 3.0, 4.0], [1.5, 0.0, 1.0, 0.5, 2.0, 3.5])
    own = plan_of(rows, "bincifarfbin", None)
    limit = 1.3 * (own.own_operations if measure == "operations" else own.own_packed_bytes)
    found = plan_of(rows, "bincifarfbin", Budget(measure, limit))  # type: ignore[arg-type]
    plan = {"binary_weights": found.binary_weights, "binary_inputs": found.binary_inputs}
    table = describe(build("bincifarfbin", plan=plan, **MODEL))
    assert found.packed_bytes == table.packed_bytes
    operations = sum(row.macs - row.bit_ops + row.bit_ops / BINARY_MACS_PER_OPERATION for row in table.layers)
    assert found.operations == pytest.approx(operations, rel=1e-12)
    assert getattr(found, measure) <= limit
    assert found.predicted_top1 > 80.0


def test_a_proposal_is_the_best_plan_within_the_budget() -> None:
    """Against every plan: three states of six layers, costs from the built models."""
    gains, input_gains = [2.0, 0.5, 1.0, -1.0, 3.0, 4.0], [1.5, 0.0, 1.0, 0.5, 2.0, 3.5]
    rows = binary_run(gains, input_gains)
    budget = Budget("operations", 70_000)
    found = propose(build("bincifarfbin", **MODEL).spec, rows, num_images=NUM_IMAGES, top1=50.0, budget=budget)
    macs = {row.index: row.macs for row in describe(build("bincifarfbin", **MODEL)).layers}
    best = 0.0
    for states in itertools.product("rwb", repeat=6):
        cost = macs[1] + macs[8]
        gain = 0.0
        for position, state in enumerate(states):
            cost += macs[position + 2] / (64 if state == "b" else 1)
            gain += {"r": gains, "w": input_gains, "b": [0.0] * 6}[state][position]
        if cost <= budget.limit:
            best = max(best, gain)
    assert 0 < best < 15
    assert found.predicted_top1 == pytest.approx(50 + best)


@pytest.mark.parametrize("name", ["resnetfbin18", "squeezenetfbin", "bireal18", "sketchanetfbin"])
def test_costs_of_layers_add_up_in_every_family(name: str) -> None:
    spec = build(name, num_classes=10, width=0.0625).spec
    net = build(**asdict(spec))
    rows = [
        layer(index, path, binary_weights=parts[0], binary_inputs=parts[1], gain_if_real=gain, gain_if_real_inputs=1.0)
        for index, (path, conv) in numbered_convs(net).items()
        for parts in [binary_parts(conv)]
        for gain in [float(index % 3) if any(parts) else None]
    ]
    groups = [layer_choices(row, NUM_IMAGES, from_gains=True) for row in rows]
    costs = choice_costs(spec, groups)
    own = plan_cost(spec, rows, [group[0] for group in groups])
    for pick in (-1, 1):
        chosen = [group[pick] if len(group) > 1 else group[0] for group in groups]
        found = plan_cost(spec, rows, chosen)
        changes = [group[pick] for group in costs if len(group) > 1], [group[0] for group in costs if len(group) > 1]
        for measure in ("operations", "packed_bytes"):
            after, before = (sum(getattr(cost, measure) for cost in part) for part in changes)
            assert getattr(found, measure) - getattr(own, measure) == after - before


def test_without_a_budget_half_again_the_cheapest_operations_are_allowed() -> None:
    rows = binary_run([1.0] * 6, [1.0] * 6)
    found = plan_of(rows, "bincifarfbin", None)
    assert found.budget == Budget("operations", 1.5 * found.own_operations)
    assert found.operations <= found.budget.limit


def test_a_float_run_is_made_binary_where_that_costs_least() -> None:
    rows = [
        layer(index, f"conv{index}", loss_if_binary=10.0 if index in (3, 8) else 1.0, loss_if_binary_weights=0.5)
        for index in range(1, 9)
    ]
    found = plan_of(rows, "bincifar", None)
    assert found.based_on == "loss_if_binary"
    assert "conv1" not in found.binary_inputs
    assert found.operations <= found.budget.limit < found.own_operations
    free = plan_of(rows, "bincifar", Budget("operations", 1e12))
    assert (free.binary_weights, free.binary_inputs, free.predicted_top1) == ([], [], 80.0)


def float_run(num_layers: int, **shares: float) -> list[LayerFigures]:
    return [
        layer(
            index,
            path,
            loss_if_binary=0.0,
            loss_if_binary_weights=0.0,
            input_negative_share=shares.get(path.replace(".", "_"), 0.5),
        )
        for index, (path, _) in list(numbered_convs(build("bincifar", **MODEL)).items())[:num_layers]
    ]


def test_a_layer_that_no_negative_input_reaches_is_not_given_binary_inputs_and_that_is_said() -> None:
    found = plan_of(float_run(8, conv3=0.0, conv5=0.004, conv6=0.99, conv7=1.0), "bincifar", None)
    assert found.binary_inputs == ["conv2", "conv4", "conv6", "conv8"]
    assert found.left_out == {"conv3": "one-sided inputs", "conv5": "one-sided inputs", "conv7": "one-sided inputs"}


def test_shifted_signs_may_stand_behind_a_relu() -> None:
    spec = build("bincifar", options={"input_quantizer": "rsign"}, **MODEL).spec
    found = propose(spec, float_run(8, conv3=0.0), num_images=NUM_IMAGES, top1=80.0)
    assert ("conv3" in found.binary_inputs, found.left_out) == (True, {})


def test_figures_of_before_the_share_was_measured_leave_nothing_out() -> None:
    rows = [replace(row, input_negative_share=None) for row in float_run(8)]
    assert plan_of(rows, "bincifar", None).left_out == {}


def mobilenet(**state: float | bool) -> Proposal:
    spec = build("mobilenet", num_classes=10, width=0.0625, input_size=32).spec
    rows = [
        layer(index, path, **({"loss_if_binary": 0.0, "loss_if_binary_weights": 0.0} | state if index > 1 else {}))
        for index, (path, _) in numbered_convs(build(**asdict(spec))).items()
    ]
    return propose(spec, rows, num_images=NUM_IMAGES, top1=80.0)


def test_depthwise_layers_are_not_given_what_has_no_packed_form() -> None:
    found = mobilenet()
    depthwise = [f"pair{number}.conv1" for number in range(1, 14)]
    assert found.binary_inputs == [f"pair{number}.conv2" for number in range(1, 14)]
    assert found.left_out == dict.fromkeys(depthwise, "no packed form")


def test_a_run_whose_depthwise_layers_cannot_be_packed_is_shown_the_way_out() -> None:
    both = {"binary_weights": True, "binary_inputs": True, "gain_if_real": -1.0, "gain_if_real_inputs": -2.0}
    found = mobilenet(**both)
    assert found.binary_inputs == [f"pair{number}.conv2" for number in range(1, 14)]
    assert len(found.left_out) == 13
    assert found.own_operations < found.operations


def test_a_budget_below_the_cheapest_plan_is_refused_with_what_is_needed() -> None:
    rows = binary_run([1.0] * 6, [1.0] * 6)
    with pytest.raises(
        InvalidInputError, match=r"^--budget-ops: 10 operations are too few: this network takes [\d,]+ "
    ):
        plan_of(rows, "bincifarfbin", Budget("operations", 10))
    least = plan_of(rows, "bincifarfbin", None).own_packed_bytes
    with pytest.raises(
        InvalidInputError, match=rf"^--budget-bytes: {least - 1:,} bytes are too few: .* {least:,} even"
    ):
        plan_of(rows, "bincifarfbin", Budget("packed_bytes", least - 1))
    assert plan_of(rows, "bincifarfbin", Budget("packed_bytes", least)).packed_bytes == least


def test_the_plan_of_a_proposal_builds() -> None:
    found = plan_of(binary_run([1.0] * 6, [2.0] * 6), "bincifarfbin", None)
    plan = {"binary_weights": found.binary_weights, "binary_inputs": found.binary_inputs}
    spec = build("bincifarfbin", plan=plan, **MODEL).spec
    assert spec.plan is not None
    assert LayerPlan.of(**spec.plan).binary_inputs < LayerPlan.of(**spec.plan).binary_weights
