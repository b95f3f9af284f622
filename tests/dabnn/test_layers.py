"""The binary convolution against plain `nn.Conv2d` and against its formulas in NumPy."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dabnn.errors import InvalidInputError
from dabnn.gradients import sign
from dabnn.layers import BinaryConv2d, LayerOptions
from dabnn.quantizers import binarize


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(channels: int = 6, size: int = 7) -> torch.Tensor:
    return torch.randn(3, channels, size, size, generator=generator(1))


@pytest.mark.parametrize("options", [{}, {"padding": 2, "stride": 2, "groups": 3}, {"bias": False, "dilation": 2}])
def test_with_both_off_it_is_the_parent_bit_for_bit(options: dict[str, int]) -> None:
    plain = nn.Conv2d(6, 9, 3, **options)
    binary = BinaryConv2d(6, 9, 3, **options)
    binary.load_state_dict(plain.state_dict())
    results = []
    for layer in (plain, binary):
        x = images().requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(parameter.grad for parameter in layer.parameters())])
    for expected, found in zip(*results, strict=True):
        assert torch.equal(expected, found)
    assert torch.equal(plain.eval()(images()), binary.eval()(images()))


@pytest.mark.parametrize("center", ["none", "filter", "tap"])
@pytest.mark.parametrize("method", ["dab", "xnor", "sign"])
def test_training_weight_gradient_is_clipped_and_follows_the_centring(method: str, center: str) -> None:
    layer = BinaryConv2d(6, 4, 3, weight_quantizer=method, center=center, options=LayerOptions(ste_width=0.4))
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator(2)) * 0.4 + 0.1)
    dense = binarize(layer.weight, method, center).dense().requires_grad_()
    x = images()
    upstream = torch.randn(F.conv2d(x, dense).shape, generator=generator(3))
    F.conv2d(x, dense, layer.bias).backward(upstream)
    y = layer(x)
    y.backward(upstream)

    assert torch.equal(y, F.conv2d(x, dense, layer.bias))
    weight, grad = layer.weight.detach().numpy(), dense.grad.numpy()
    dims = {"none": None, "filter": (1, 2, 3), "tap": (1,)}[center]
    mean = 0 if dims is None else weight.mean(dims, keepdims=True)
    expected = np.where(np.abs(weight - mean) <= 0.4, grad, 0)
    if dims is not None:
        expected = expected - expected.mean(dims, keepdims=True)
    np.testing.assert_allclose(layer.weight.grad.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_training_input_gradient_passes_within_one() -> None:
    layer = BinaryConv2d(6, 4, 3, padding=1, binary_input=True)
    x = (images() * 2).requires_grad_()
    signs = sign(x.detach()).requires_grad_()
    y = layer(x)
    assert torch.equal(y, F.conv2d(signs, layer.weight, layer.bias, padding=1))
    y.sum().backward()
    F.conv2d(signs, layer.weight, layer.bias, padding=1).sum().backward()
    expected = np.where(np.abs(x.detach().numpy()) <= 1, signs.grad.numpy(), 0)
    np.testing.assert_array_equal(x.grad.numpy(), expected)


@pytest.mark.parametrize(("groups", "bias", "padding", "stride"), [(1, True, 1, 1), (1, False, 0, 2), (3, True, 2, 1)])
@pytest.mark.parametrize("center", ["none", "tap"])
def test_evaluation_follows_the_published_form_exactly(
    groups: int, bias: bool, padding: int, stride: int, center: str
) -> None:
    options = {"groups": groups, "bias": bias, "padding": padding, "stride": stride}
    layer = BinaryConv2d(6, 9, 3, weight_quantizer="dab", center=center, binary_input=True, **options).eval()
    x = images()
    code = layer.code()
    x_sign = np.where(x.numpy() >= 0, 1, -1).astype(np.float32)
    geometry = {"padding": padding, "stride": stride, "groups": groups}
    as_counts = [
        F.conv2d(torch.from_numpy(x_sign).double(), ones.double(), **geometry).numpy().astype(np.float32)
        for ones in (code.mask, torch.ones_like(code.mask))
    ]
    alpha, beta = (scalars.numpy()[:, None, None] for scalars in (code.alpha, code.beta))
    expected = (alpha - beta) * as_counts[0] + beta * as_counts[1]
    if layer.bias is not None:
        expected = expected + layer.bias.detach().numpy()[:, None, None]
    np.testing.assert_array_equal(layer(x).detach().numpy(), expected)


def test_evaluation_equals_training_up_to_rounding() -> None:
    for method, binary_input in itertools.product(("dab", "xnor", "sign"), (False, True)):
        layer = BinaryConv2d(6, 9, 3, padding=1, weight_quantizer=method, binary_input=binary_input)
        trained = layer(images()).detach()
        torch.testing.assert_close(layer.eval()(images()).detach(), trained, rtol=1e-5, atol=1e-5)


def test_evaluation_in_autocast_keeps_its_whole_numbers() -> None:
    layer = BinaryConv2d(512, 4, 3, weight_quantizer="dab", binary_input=True).eval()
    x = images(channels=512)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x)
    assert torch.equal(found, layer(x))


def test_default_center_is_tap_only_for_sign_inputs_of_several_channels() -> None:
    def center(in_channels: int = 6, groups: int = 1, **options: object) -> str:
        return BinaryConv2d(in_channels, 6, 3, groups=groups, **options).center

    assert center(weight_quantizer="dab", binary_input=True) == "tap"
    assert center(weight_quantizer="dab") == "none"
    assert center(binary_input=True) == "none"
    assert center(weight_quantizer="dab", binary_input=True, groups=6) == "none"
    assert center(weight_quantizer="dab", binary_input=True, in_channels=1) == "none"


def binary_layer() -> BinaryConv2d:
    return BinaryConv2d(6, 9, 3, weight_quantizer="dab", binary_input=True)


def test_the_code_is_kept_while_the_weight_stays() -> None:
    layer = binary_layer().eval()
    assert layer.code() is layer.code()


def test_the_code_follows_every_kind_of_change() -> None:
    layer = binary_layer().eval()
    other = binary_layer()

    def changed() -> bool:
        return torch.equal(layer.code().mask, binarize(layer.weight, "dab", "tap").mask)

    layer.code()
    layer.load_state_dict(other.state_dict())
    assert changed()
    with torch.no_grad():
        layer.weight.neg_()
    assert changed()
    layer.weight.data.neg_()
    layer.eval()
    assert changed()
    layer.double()
    assert layer.code().alpha.dtype is torch.float64


def test_a_copy_does_not_inherit_the_code() -> None:
    layer = binary_layer().eval()
    layer.code()
    twin = copy.deepcopy(layer)
    for _ in range(layer.weight._version - twin.weight._version):
        with torch.no_grad():
            twin.weight.neg_()
    assert torch.equal(twin.code().mask, binarize(twin.weight, "dab", "tap").mask)


def test_a_converted_layer_shares_the_parameters() -> None:
    conv = nn.Conv2d(6, 9, 3, stride=2, padding=1, bias=False).eval()
    layer = BinaryConv2d.from_conv(conv, weight_quantizer="xnor", center=None, binary_input=False)
    assert layer.weight is conv.weight
    assert layer.bias is None
    assert not layer.training
    assert (layer.stride, layer.padding) == (conv.stride, conv.padding)


def test_checkpoints_of_float_and_binary_layers_are_interchangeable() -> None:
    assert binary_layer().state_dict().keys() == nn.Conv2d(6, 9, 3).state_dict().keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_quantizer": "dabb"}, r"^binarize\.weights: .*Did you mean 'dab'"),
        ({"weight_quantizer": "dab", "center": "tap", "groups": 6}, r"^binarize\.center: tap .*one input channel"),
        ({"center": "tap"}, r"^binarize\.center: tap has no effect on real weights"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        BinaryConv2d(6, 6, 3, **options)


def test_a_real_layer_has_no_code() -> None:
    with pytest.raises(InvalidInputError, match="real weights"):
        BinaryConv2d(6, 9, 3).code()


def test_diverged_weights_are_named_in_training() -> None:
    layer = binary_layer()
    with torch.no_grad():
        layer.weight.fill_(math.nan)
    with pytest.raises(InvalidInputError, match=r"^weight: "):
        layer(images())
