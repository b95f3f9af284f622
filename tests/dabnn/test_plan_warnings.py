"""Plans that train and yet are hardly meant: signs behind a ReLU, and layers that cannot be packed."""

import logging

import pytest
import torch

from dabnn.errors import InvalidInputError
from dabnn.layers import BinaryConv2d
from dabnn.models import build, names
from dabnn.models.plan_warnings import _warn, after_relu
from dabnn.packed import pack
from dabnn.plans import numbered_convs

SMALL = {"num_classes": 5, "width": 0.0625, "seed": 3}


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    _warn.cache_clear()
    caplog.set_level(logging.WARNING, logger="dabnn")
    return caplog


@pytest.mark.parametrize("name", names())
def test_no_model_warns_of_its_own_plan(name: str, warned: pytest.LogCaptureFixture) -> None:
    with torch.device("meta"):
        net = build(name, num_classes=5)
    assert warned.messages == []
    signs = {
        path for path, conv in numbered_convs(net).values() if isinstance(conv, BinaryConv2d) and conv.binary_input
    }
    assert not signs & set(after_relu(net))


@pytest.mark.parametrize(
    ("name", "size"),
    {"sketchanet": 81, "alexnet": 63, "bincifar": 16, "resnet18": 32, "squeezenet": 32, "densenet": 16, "mobilenet": 32,
     "googlenet": 32, "resnetfbin18": 32, "nin": 16}.items(),
)  # fmt: skip
def test_the_layers_named_are_those_whose_inputs_are_never_negative(name: str, size: int) -> None:
    net = build(name, input_size=size, **SMALL)  # in training: BN has seen nothing yet to evaluate with
    lowest: dict[str, float] = {}
    for path, conv in numbered_convs(net).values():
        conv.register_forward_pre_hook(lambda _, x, path=path: lowest.update({path: float(x[0].detach().min())}))
    net(torch.randn(8, net.spec.in_channels, size, size, generator=torch.Generator().manual_seed(0)))
    assert set(after_relu(net)) == {path for path, value in lowest.items() if value >= 0}


def test_signs_behind_a_relu_are_warned_of_once_by_the_names_of_the_layers(warned: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        build("sketchanet", input_size=81, plan={"binary_weights": [2, 3], "binary_inputs": [2, 3]}, **SMALL)
    (message,) = warned.messages
    assert message.startswith("binarize: conv2, conv3 would take the signs of what follows a ReLU")


def test_shifted_signs_behind_a_relu_are_not_warned_of(warned: pytest.LogCaptureFixture) -> None:
    plan = {"binary_weights": [2], "binary_inputs": [2]}
    build("sketchanet", input_size=81, plan=plan, options={"input_quantizer": "rsign"}, **SMALL)
    assert warned.messages == []


def test_a_layer_without_packed_form_is_warned_of_before_it_is_trained(warned: pytest.LogCaptureFixture) -> None:
    both = {"binary_weights": [2, 3], "binary_inputs": [2, 3]}
    net = build("mobilenet", input_size=32, plan=both, options={"input_quantizer": "two_valued"}, **SMALL)
    (message,) = warned.messages
    assert message.startswith("binarize: pair1.conv1 with binary weights and inputs can be trained but has no packed")
    with pytest.raises(InvalidInputError, match="has no packed form"):
        pack(net.eval())
    warned.clear()
    weights = build("mobilenet", input_size=32, plan={"binary_weights": [2], "binary_inputs": []}, **SMALL)
    assert warned.messages == []
    pack(weights.eval())
