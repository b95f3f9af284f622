"""The binary convolution in training: gradient rules, learned and warm-started codes, inputs, state, autocast."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dabnn.errors import InvalidInputError
from dabnn.layers import EXTRA_STATE, BinaryConv2d, LayerOptions, reset_codes, set_progress
from dabnn.quantizers import QUANTIZERS, binarize, subtract_center

STEEPEST = 10.0


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_layer(
    weights: str | None = "dab", *, seed: int = 0, binary_input: bool = False, **changes: object
) -> BinaryConv2d:
    center = changes.pop("center", None)
    options = LayerOptions(**changes)
    layer = BinaryConv2d(6, 4, 3, weight_quantizer=weights, center=center, binary_input=binary_input, options=options)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator(seed)) * 0.5 + 0.1)
        layer.bias.zero_()
    layer.reset_code()
    return layer


def images(seed: int = 1) -> torch.Tensor:
    return torch.randn(3, 6, 7, 7, generator=generator(seed))


def weight_gradients(layer: BinaryConv2d) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One step: the gradient of the two-valued weight, that of the latent one, and the centred weight."""
    centered = subtract_center(layer.weight.detach(), layer.center)
    dense = binarize(layer.weight, layer.weight_quantizer, layer.center).dense().requires_grad_()
    y = layer(images())
    upstream = torch.randn(y.shape, generator=generator(3))
    y.backward(upstream)
    F.conv2d(images(), dense).backward(upstream)
    return dense.grad.numpy(), layer.weight.grad.numpy(), centered.numpy()


@pytest.mark.parametrize("center", ["none", "tap"])
def test_the_means_rule_adds_the_mean_gradient_of_the_group(center: str) -> None:
    layer = make_layer(center=center, gradient="means", ste_width=0.6)
    grad, found, c = weight_gradients(layer)
    mask = binarize(layer.weight, "dab", center).mask.numpy()
    expected = np.where(np.abs(c) <= np.float32(0.6), grad, 0)
    for row in range(len(c)):
        for group in (mask[row], ~mask[row]):
            expected[row][group] += grad[row][group].mean()
    if center == "tap":
        expected -= expected.mean(1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_reference_rule_leaves_out_the_derivative_of_centring() -> None:
    layer = make_layer(center="tap", gradient="reference")
    grad, found, c = weight_gradients(layer)
    code = binarize(layer.weight, "dab", "tap")
    mask = code.mask.numpy()
    alpha, beta = (values.abs().numpy()[:, None, None, None] for values in (code.alpha, code.beta))
    ones, q = mask.sum((1, 2, 3), keepdims=True), np.abs(c) < 1
    factor = np.where(mask, alpha * q + 1 / ones, beta * q + 1 / (mask[0].size - ones)) * (1 - 1 / 6)
    np.testing.assert_allclose(found, grad * factor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("weights", ["dab", "dab_learned", "lsbq"])
def test_the_window_can_lie_at_the_threshold(weights: str) -> None:
    layer = make_layer(weights, ste_center="threshold", ste_width=0.3)
    grad, found, c = weight_gradients(layer)
    code = binarize(layer.weight, weights)
    middle = ((code.alpha + code.beta) / 2).numpy()[:, None, None, None]
    inside = np.abs(c - middle) <= np.float32(0.3)
    assert 0 < inside.mean() < 1
    np.testing.assert_allclose(found, np.where(inside, grad, 0), rtol=1e-4, atol=1e-5)


def test_annealing_follows_the_progress() -> None:
    layer = make_layer(ste="ede", input_ste="ede", binary_input=True, center="none")
    net = nn.Sequential(nn.Conv2d(6, 6, 1), layer)
    found = []
    for fraction in (0.0, 1.0):
        set_progress(net, fraction)
        x = torch.full((1, 6, 3, 3), 0.2, requires_grad=True)
        layer(x).sum().backward()
        found.append(x.grad.clone())
    slopes = [1 - np.tanh(0.1 * 0.2) ** 2, STEEPEST * (1 - np.tanh(STEEPEST * 0.2) ** 2)]
    torch.testing.assert_close(found[1] / found[0], torch.full_like(found[0], slopes[1] / slopes[0]))


@pytest.mark.parametrize("input_quantizer", ["sign", "rsign", "two_valued"])
@pytest.mark.parametrize("weights", QUANTIZERS)
def test_evaluation_equals_training_up_to_rounding(weights: str, input_quantizer: str) -> None:
    layer = make_layer(weights, binary_input=True, input_quantizer=input_quantizer)
    if layer.input_shift is not None:
        nn.init.normal_(layer.input_shift, generator=generator(5))
    trained = layer(images()).detach()
    torch.testing.assert_close(layer.eval()(images()), trained, rtol=1e-5, atol=1e-5)


def test_learned_values_start_at_the_optimum_and_learn() -> None:
    layer = make_layer("dab_learned")
    code = binarize(layer.weight, "dab")
    assert torch.equal(layer.alpha, code.alpha)
    assert torch.equal(layer.beta, code.beta)
    y = layer(images())
    upstream = torch.randn(y.shape, generator=generator(3))
    y.backward(upstream)
    dense = code.dense().requires_grad_()
    F.conv2d(images(), dense).backward(upstream)
    mask = code.mask
    torch.testing.assert_close(layer.alpha.grad, (dense.grad * mask).sum((1, 2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.beta.grad, (dense.grad * ~mask).sum((1, 2, 3)), rtol=1e-4, atol=1e-4)


def test_evaluation_uses_the_learned_values() -> None:
    layer = make_layer("dab_learned").eval()
    layer.code()
    with torch.no_grad():
        layer.alpha.add_(0.5)
    code = layer.code()
    assert torch.equal(code.alpha, layer.alpha)
    middle = ((layer.alpha + layer.beta) / 2).view(-1, 1, 1, 1)
    assert torch.equal(code.mask, layer.weight >= middle)
    assert not code.alpha.requires_grad


def test_a_layer_made_from_a_convolution_starts_at_its_optimum() -> None:
    conv = nn.Conv2d(6, 4, 3)
    learned, warm = (
        BinaryConv2d.from_conv(conv, weight_quantizer=weights, center=None, binary_input=False)
        for weights in ("dab_learned", "dab_warm")
    )
    code = binarize(conv.weight, "dab")
    assert torch.equal(learned.alpha, code.alpha)
    assert torch.equal(warm.threshold, (code.alpha + code.beta) / 2)
    assert {name for name, _ in learned.named_parameters()} == {"weight", "bias", "alpha", "beta"}


def train(layer: BinaryConv2d, steps: range) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), 0.5)
    for step in steps:
        optimizer.zero_grad()
        layer(images(step)).square().mean().backward()
        optimizer.step()


def test_a_warm_start_goes_on_bit_for_bit_after_a_restart() -> None:
    straight, first, resumed = (make_layer("dab_warm") for _ in range(3))
    train(straight, range(6))
    train(first, range(3))
    resumed.load_state_dict(first.state_dict())
    train(resumed, range(3, 6))
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value)


def step_errors(layer: BinaryConv2d) -> torch.Tensor:
    """Squared error (F,) of the code that the layer's next training forward uses."""
    layer.keeps_step_code = True
    weight = layer.weight.detach().clone()
    layer(images())
    mask, alpha, beta = layer.step_code
    dense = torch.where(mask, alpha.view(-1, 1, 1, 1), beta.view(-1, 1, 1, 1))
    return (weight - dense).square().flatten(1).sum(1)


def test_the_code_of_a_step_outlives_the_update_that_follows() -> None:
    layer = make_layer("dab_learned")
    step_errors(layer)
    before = [value.clone() for value in layer.step_code]
    with torch.no_grad():
        layer.alpha += 1
        layer.beta -= 1
    assert all(torch.equal(kept, value) for kept, value in zip(layer.step_code, before, strict=True))


def test_a_warm_start_stays_within_its_bound_of_the_optimum_with_which_it_evaluates() -> None:
    layer = make_layer("dab_warm")
    path = torch.zeros(4)
    for step in range(20):
        before = layer.weight.detach().clone()
        train(layer, range(step, step + 1))
        path += (layer.weight.detach() - before).flatten(1).norm(dim=1)
    exact = binarize(layer.weight, "dab")
    found = step_errors(copy.deepcopy(layer))
    assert (found.sqrt() <= exact.error.sqrt() + 2 * path).all()
    assert torch.equal(layer.eval().code().mask, exact.mask)


def test_every_filter_has_its_turn_of_an_exact_search() -> None:
    layer = make_layer("dab_warm")
    nn.init.constant_(layer.threshold, 1.5)  # far from every optimum: a tail of single weights
    for _ in range(4):
        layer(images())
    torch.testing.assert_close(step_errors(layer), binarize(layer.weight, "dab").error)


@pytest.mark.parametrize("weights", ["dab", "dab_warm", "dab_learned"])
def test_a_float_checkpoint_loads_into_every_layer(weights: str) -> None:
    conv = nn.Conv2d(6, 4, 3)
    layer = make_layer(weights, binary_input=True, input_quantizer="rsign", center="none")
    nn.init.ones_(layer.input_shift)
    layer.load_state_dict(conv.state_dict())
    code = binarize(conv.weight, "dab")
    assert not layer.input_shift.any()
    for name, value in layer.state_dict().items():
        middle = (code.alpha + code.beta) / 2
        expected = {"alpha": code.alpha, "beta": code.beta, "threshold": middle}.get(name, value)
        assert torch.equal(value, expected)


def test_a_layers_own_state_is_loaded_as_it_is() -> None:
    trained, other = make_layer("dab_learned"), make_layer("dab_learned", seed=9)
    train(trained, range(2))
    other.load_state_dict(trained.state_dict())
    assert torch.equal(other.alpha, trained.alpha)
    assert not torch.equal(other.alpha, binarize(other.weight, "dab").alpha)


def test_only_the_named_extras_are_added_to_the_state() -> None:
    plain = set(nn.Conv2d(6, 4, 3).state_dict())
    added = set()
    for weights in QUANTIZERS:
        for inputs in ("sign", "rsign", "two_valued"):
            added |= set(make_layer(weights, binary_input=True, input_quantizer=inputs).state_dict()) - plain
    assert added == set(EXTRA_STATE)


def test_reset_codes_returns_to_the_optimum_of_changed_weights() -> None:
    net = nn.Sequential(make_layer("dab_learned"), make_layer("dab_warm"), make_layer("dab"))
    with torch.no_grad():
        for layer in net:
            layer.weight.neg_()
    reset_codes(net)
    code = binarize(net[0].weight, "dab")
    assert torch.equal(net[0].alpha, code.alpha)
    assert torch.equal(net[1].threshold, (code.alpha + code.beta) / 2)


@pytest.mark.parametrize(
    ("weights", "gradient"),
    [(weights, "straight_through") for weights in QUANTIZERS]
    + [(weights, gradient) for weights in ("dab", "dab_warm", "adabin") for gradient in ("means", "reference")],
)
def test_training_in_bfloat16_keeps_latent_weights_and_their_code_in_float32(weights: str, gradient: str) -> None:
    layer = make_layer(weights, binary_input=True, gradient=gradient)
    layer.keeps_step_code = True
    plain = copy.deepcopy(layer)
    plain.keeps_step_code = True
    plain(images())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(images())
    y.float().square().mean().backward()
    assert y.dtype is torch.bfloat16
    assert layer.weight.grad.dtype is torch.float32
    assert layer.weight.grad.abs().sum() > 0
    for ours, expected in zip(layer.step_code, plain.step_code, strict=True):
        assert torch.equal(ours, expected)


# torch's compiler makes an instance of the autograd functions that it traces.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("weights", ["dab", "dab_warm", "dab_learned", "adabin"])
def test_a_compiled_layer_is_one_graph_with_the_same_values_and_gradients(weights: str) -> None:
    layer = make_layer(weights, binary_input=True).to(memory_format=torch.channels_last)
    plain = copy.deepcopy(layer)
    x = images().to(memory_format=torch.channels_last)
    found = torch.compile(layer, backend="aot_eager", fullgraph=True)(x)
    expected = plain(x)
    for y in (found, expected):
        y.square().sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ste": "clip"}, r"^binarize\.ste: 'clip' .*Did you mean 'clipped'"),
        ({"ste_width": 0.0}, r"^binarize\.ste_width: 0\.0"),
        ({"input_ste_width": float("nan")}, r"^binarize\.input_ste_width: nan"),
        ({"input_quantizer": "resign"}, r"^binarize\.input_quantizer: .*Did you mean"),
        ({"weights": "dab_learned", "gradient": "means"}, r"^binarize\.gradient: means .*parameters"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        make_layer(**options)


@pytest.mark.parametrize("options", [LayerOptions(gradient="reference"), LayerOptions(input_quantizer="two_valued")])
def test_options_that_leave_one_channel_nothing_are_refused(options: LayerOptions) -> None:
    with pytest.raises(InvalidInputError, match=r"(one|1) input channel"):
        BinaryConv2d(1, 4, 3, weight_quantizer="dab", binary_input=True, options=options)
