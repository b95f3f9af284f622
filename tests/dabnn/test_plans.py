import pytest
import torch
from torch import nn

from dabnn.errors import InvalidInputError
from dabnn.layers import BinaryConv2d, LayerOptions
from dabnn.plans import LayerPlan, apply_plan, bin_range, check_indices, numbered_convs


def small_net() -> nn.Module:
    inner = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1, bias=False))
    return nn.Sequential(nn.Conv2d(3, 4, 3), inner, nn.Conv2d(8, 2, 1), nn.Flatten(), nn.Linear(8, 2))


def test_convolutions_are_numbered_from_one_and_linear_layers_are_not() -> None:
    paths = {index: path for index, (path, _) in numbered_convs(small_net()).items()}
    assert paths == {1: "0", 2: "1.0", 3: "1.2", 4: "2"}


def test_a_range_includes_both_ends() -> None:
    assert list(bin_range(2, 4, num_convs=4)) == [2, 3, 4]
    assert list(bin_range(3, 3, num_convs=4)) == [3]


@pytest.mark.parametrize(
    ("bin_start", "bin_end", "message"),
    [
        (3, 2, r"^binarize\.bin_end: 2 lies before binarize\.bin_start \(3\)"),
        (2, 9, r"^binarize\.bin_end: 9 is outside .* 8 convolutions, numbered 1 to 8; linear layers are not counted"),
        (0, 3, r"^binarize\.bin_start: 0 is outside .* 8 convolutions"),
        (9, 9, r"^binarize\.bin_start: 9 is outside"),
    ],
)
def test_a_range_that_cannot_be_is_refused(bin_start: int, bin_end: int, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        bin_range(bin_start, bin_end, num_convs=8)


def test_layers_outside_the_model_are_named() -> None:
    with pytest.raises(InvalidInputError, match=r"^binarize\.inputs: \[0, 5\] outside the model"):
        check_indices("binarize.inputs", [0, 2, 5], num_convs=4)


def test_a_plan_exchanges_exactly_the_planned_layers() -> None:
    net = small_net()
    parameters = dict(net.named_parameters())
    apply_plan(net, LayerPlan.of([2, 3], [3, 4]), weights="xnor", center=None)
    kinds = {
        index: (conv.weight_quantizer, conv.binary_input) if isinstance(conv, BinaryConv2d) else None
        for index, (_, conv) in numbered_convs(net).items()
    }
    assert kinds == {1: None, 2: ("xnor", False), 3: ("xnor", True), 4: (None, True)}
    assert dict(net.named_parameters()).keys() == parameters.keys()
    assert all(parameter is parameters[name] for name, parameter in net.named_parameters())


def test_a_plan_passes_the_options_to_every_layer_that_it_names() -> None:
    net = small_net()
    options = LayerOptions(ste="polynomial", input_ste_width=0.5)
    apply_plan(net, LayerPlan.of([2], [3]), weights="dab", center=None, options=options)
    layers = [module for module in net.modules() if isinstance(module, BinaryConv2d)]
    assert [layer.options for layer in layers] == [options, options]


def test_an_empty_plan_changes_nothing() -> None:
    net = small_net()
    apply_plan(net, LayerPlan.of(), weights="dab", center="tap")
    assert not any(isinstance(module, BinaryConv2d) for module in net.modules())


def test_a_plan_for_missing_layers_is_refused_before_any_is_exchanged() -> None:
    net = small_net()
    with pytest.raises(InvalidInputError, match=r"^binarize\.plan\.inputs: \[7\]"):
        apply_plan(net, LayerPlan.of([2], [7]), weights="dab", center=None)
    assert not any(isinstance(module, BinaryConv2d) for module in net.modules())


def test_depthwise_convolutions_take_binary_weights() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4))
    apply_plan(net, LayerPlan.of([1], [1]), weights="dab", center=None)
    assert net.eval()(torch.randn(1, 4, 5, 5)).shape == (1, 4, 3, 3)
