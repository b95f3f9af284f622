import logging

import pytest
from torch import nn

from dabnn.errors import InvalidInputError
from dabnn.plans import LayerPlan, apply_plan, resolve_selectors


def net_of_stages() -> nn.Module:
    def stage(channels: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(channels, channels, 3), nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 1)
        )

    stages = {"conv1": nn.Conv2d(1, 2, 3), "stage1": stage(2), "stage2": stage(2), "conv12": nn.Conv2d(2, 2, 1)}
    return nn.Sequential(nn.ModuleDict(stages))


def resolve(*selectors: int | str) -> set[int]:
    return set(resolve_selectors("binarize.layers", selectors, next(iter(net_of_stages()))))


def test_layers_are_named_by_number_path_or_expression() -> None:
    assert resolve(2, 5) == {2, 5}
    assert resolve("conv1", "stage2.0") == {1, 4}
    assert resolve("stage[12][.].*") == {2, 3, 4, 5}
    assert resolve(6, "stage1.2", "stage.*") == {2, 3, 4, 5, 6}
    assert resolve() == set()


def test_an_expression_must_match_the_whole_path() -> None:
    assert resolve("conv1") == {1}
    assert resolve("conv.") == {1}
    assert resolve("conv.*") == {1, 6}


def test_an_exact_path_is_no_expression() -> None:
    net = nn.ModuleDict({"a+": nn.Conv2d(1, 1, 1), "aa": nn.Conv2d(1, 1, 1)})
    assert resolve_selectors("binarize.layers", ["a+"], net) == {1}


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        (7, r"^binarize\.layers: \[7\] outside the model, which has 6 convolutions"),
        (0, r"^binarize\.layers: \[0\] outside the model"),
        ("convl", r"^binarize\.layers: 'convl' names no layer; .* The nearest layer is 'conv1'\.$"),
        ("stage[34].*", r"^binarize\.layers: 'stage\[34\]\.\*' names no layer; .* The nearest layer is 'stage"),
        (
            "stage[",
            r"^binarize\.layers: 'stage\[' is no layer, and no regular expression either \(unterminated .*'stage",
        ),
        ("stage1", r"'stage1' holds the layers stage1\.0, stage1\.2; 'stage1\[\.\]\.\*' names them all\.$"),
        ("stage1.1", r"'stage1\.1' names no layer; .* The nearest layer is 'stage1\.[02]'"),
    ],
)
def test_a_selector_that_names_no_layer_is_refused_with_the_nearest(selector: int | str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        resolve(selector)


def test_the_advice_for_a_group_of_layers_works() -> None:
    assert resolve("stage1[.].*") == {2, 3}


def test_selectors_find_the_same_layers_once_these_are_binary() -> None:
    net = next(iter(net_of_stages()))
    apply_plan(net, LayerPlan.of([2, 3], [3]), weights="dab", center=None)
    assert resolve_selectors("binarize.layers", ["stage1[.].*"], net) == {2, 3}


def test_binary_inputs_on_the_image_are_allowed_and_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="dabnn"):
        for _ in range(2):
            net = nn.ModuleDict({"fed_by_image": nn.Conv2d(1, 2, 3), "other": nn.Conv2d(2, 2, 3)})
            apply_plan(net, LayerPlan.of([], [1, 2]), weights="dab", center=None)
    (record,) = caplog.records
    assert record.getMessage().startswith("binarize: fed_by_image takes binary inputs but is fed by the image")
