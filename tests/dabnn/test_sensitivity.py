from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dabnn.data import load_manifest
from dabnn.layers import BinaryConv2d
from dabnn.models import Network, build
from dabnn.plans import numbered_convs
from dabnn.sensitivity import (
    LayerState,
    Samples,
    count_hits,
    input_errors,
    layer_figures,
    measure_layer,
    measure_network,
    other_states,
    reestimate_batchnorm,
    weight_error,
    with_layer,
)
from dabnn.spec import DataSpec

CPU = torch.device("cpu")
MODEL = {"num_classes": 10, "in_channels": 1, "input_size": 16, "width": 0.0625}


@pytest.fixture
def samples(small_digits: Path) -> Samples:
    data = DataSpec(train=str(small_digits), val=str(small_digits), batch_size=32, eval_batch_size=25)
    return Samples(data, seed=1, num_images=60)


def fbin() -> Network:
    return build("bincifarfbin", seed=0, **MODEL).eval()


def seen_by(net: Network, index: int, images: Tensor) -> np.ndarray:
    """Return the real input of a layer, in float64."""
    kept: list[Tensor] = []
    handle = numbered_convs(net)[index][1].register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    with torch.no_grad():
        net(images)
    handle.remove()
    return kept[0].double().numpy()


def test_input_errors_are_the_formulas_over_samples_of_equal_weight() -> None:
    net = fbin()
    images = torch.randn(7, 1, 16, 16)
    found = input_errors(net, images.split([4, 2, 1]), CPU)
    assert list(found) == list(range(1, 9))
    for index, error in found.items():
        x = seen_by(net, index, images).reshape(7, -1)
        square = ((np.where(x >= 0, 1.0, -1.0) - x) ** 2).mean(1)
        assert error.rmse == pytest.approx(np.sqrt(square.mean()), rel=1e-6)
        assert error.relative_rmse == pytest.approx(np.sqrt(square.sum() / (x**2).mean(1).sum()), rel=1e-6)
        assert error.negative_share == pytest.approx((x < 0).mean(), rel=1e-6)
        assert error.one_minus_square == pytest.approx((1 - np.clip(x, -1, 1) ** 2).mean(), rel=1e-6)


def test_measuring_inputs_again_gives_the_same_and_leaves_no_hook() -> None:
    net = fbin()
    images = [torch.randn(4, 1, 16, 16)]
    assert input_errors(net, images, CPU) == input_errors(net, images, CPU)
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_inputs_that_are_all_zero_have_no_relative_error() -> None:
    net = nn.Sequential(nn.Conv2d(1, 1, 1))
    error = input_errors(net, [torch.zeros(2, 1, 3, 3)], CPU)[1]
    assert (error.rmse, error.relative_rmse, error.one_minus_square) == (1.0, None, 1.0)


def test_the_weight_error_is_relative_to_the_weights_that_are_quantized() -> None:
    net = build("bincifarfbin", weights="xnor", center="filter", seed=0, **MODEL)
    conv = numbered_convs(net)[3][1]
    w = conv.weight.detach().double().numpy().reshape(conv.out_channels, -1)
    centered = w - w.mean(1, keepdims=True)
    dense = np.abs(centered).mean(1, keepdims=True) * np.where(centered >= 0, 1.0, -1.0)
    assert weight_error(conv, net.spec) == pytest.approx(
        ((centered - dense) ** 2).sum() / (centered**2).sum(), rel=1e-5
    )


def test_the_weight_error_of_a_real_layer_is_that_of_the_layer_made_binary() -> None:
    binary, real = fbin(), build("bincifarfbin", inputs="none", plan=None, bin_start=2, bin_end=2, seed=0, **MODEL)
    assert weight_error(numbered_convs(real)[5][1], binary.spec) == pytest.approx(
        weight_error(numbered_convs(binary)[5][1], binary.spec)
    )


def test_two_valued_weights_have_no_error_and_refused_layers_none() -> None:
    net = build("bincifarfbin", center="none", seed=0, **MODEL)
    conv = numbered_convs(net)[3][1]
    with torch.no_grad():
        conv.weight.copy_(torch.where(conv.weight >= 0, 0.3, -0.1))
    assert weight_error(conv, net.spec) == pytest.approx(0.0, abs=1e-10)
    tap = replace(net.spec, center="tap")
    assert weight_error(numbered_convs(net)[1][1], tap) is None  # one input channel: every weight would become zero


def test_each_layer_is_measured_in_its_other_states() -> None:
    net = build("bincifarfbin", bin_start=3, bin_end=7, seed=0, **MODEL)
    convs = {index: conv for index, (_, conv) in numbered_convs(net).items()}
    assert other_states(convs[1]) == (LayerState.BINARY_WEIGHTS, LayerState.BINARY)
    assert other_states(convs[2]) == (LayerState.REAL,)  # binary inputs alone
    assert other_states(convs[3]) == (LayerState.REAL, LayerState.BINARY_WEIGHTS)


def test_a_changed_copy_differs_in_one_layer_and_leaves_the_network_alone(caplog: pytest.LogCaptureFixture) -> None:
    net = build("bincifarfbin", weights="xnor", seed=0, **MODEL).eval()
    states = [
        (3, LayerState.REAL),
        (3, LayerState.BINARY_WEIGHTS),
        (1, LayerState.BINARY),
        (8, LayerState.BINARY_WEIGHTS),
    ]
    for index, state in states:
        changed = with_layer(net, index, state, net.spec)
        assert changed is not None
        for number, (path, conv) in numbered_convs(changed).items():
            old = numbered_convs(net)[number][1]
            assert torch.equal(conv.weight, old.weight)
            assert conv.weight is not old.weight
            assert (repr(conv) == repr(old)) == (number != index), path
        layer = numbered_convs(changed)[index][1]
        assert isinstance(layer, BinaryConv2d)
        assert layer.weight_quantizer == (None if state is LayerState.REAL else "xnor")
        assert layer.binary_input == (state is LayerState.BINARY)
    real = with_layer(net, 3, LayerState.REAL, net.spec)
    assert real is not None
    plain, x = numbered_convs(net)[3][1], torch.randn(2, 8, 8, 8)
    assert torch.equal(
        numbered_convs(real)[3][1](x), nn.functional.conv2d(x, plain.weight, plain.bias, padding=plain.padding)
    )
    assert caplog.records == []


def test_weights_that_stay_binary_keep_their_centre_when_their_inputs_become_real() -> None:
    changed = with_layer(fbin(), 3, LayerState.BINARY_WEIGHTS, fbin().spec)
    assert changed is not None
    layer = numbered_convs(changed)[3][1]
    assert isinstance(layer, BinaryConv2d)
    assert layer.center == "tap"


def test_a_state_that_a_layer_refuses_is_not_measured(samples: Samples) -> None:
    net = build("bincifar", center="tap", seed=0, **MODEL)
    assert with_layer(net, 1, LayerState.BINARY, net.spec) is None
    hits = measure_layer(net, 1, samples, net.spec, CPU)
    assert hits == {LayerState.BINARY_WEIGHTS: None, LayerState.BINARY: None}


def test_batchnorm_is_estimated_as_the_mean_over_batches_without_dropout() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.9), nn.BatchNorm2d(3))
    batches = [torch.randn(8, 3, 4, 4) * 3 + 1, torch.randn(8, 3, 4, 4)]
    reestimate_batchnorm(net, batches, CPU)
    first, second = net[0], net[2]
    assert first.running_mean.tolist() == pytest.approx(
        torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0).tolist()
    )
    assert second.running_var.tolist() == pytest.approx([1.0] * 3, abs=0.02)  # what dropout would not leave
    assert (first.momentum, net.training) == (0.1, False)


def test_without_training_batches_batchnorm_stays_as_it_was() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3))
    net[0].running_mean.fill_(2.0)
    reestimate_batchnorm(net, [], CPU)
    assert net[0].running_mean.tolist() == [2.0] * 3


def test_as_many_validation_images_are_read_as_asked_for_each_once(samples: Samples) -> None:
    spec = fbin().spec
    everything = load_manifest(Path(samples.data.val)).split("val").num_samples
    for wanted, expected in ((40, 40), (10**6, everything)):
        indices = [int(i) for batch in replace(samples, num_images=wanted).validation(spec) for i in batch.indices]
        assert len(set(indices)) == len(indices) == expected
    fewer = [int(i) for batch in replace(samples, num_images=40).validation(spec) for i in batch.indices]
    assert indices[:40] == fewer
    assert indices != sorted(indices)  # a split in the order of its classes would give the first of them only


@pytest.fixture(scope="module")
def trained(small_digits: Path) -> Network:
    """A float network that has learned something in a second."""
    data = DataSpec(train=str(small_digits), val=str(small_digits), batch_size=32, eval_batch_size=25)
    net = build("bincifar", seed=0, **MODEL)
    torch.manual_seed(0)  # dropout draws from it
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for epoch in range(8):
        for batch in Samples(data, seed=epoch, num_images=10**6)._batches(net.spec, "train"):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(batch.images), batch.labels).backward()
            optimizer.step()
    return net.eval()


def test_making_two_valued_weights_binary_changes_no_answer(trained: Network, samples: Samples) -> None:
    net = with_layer(trained, 3, LayerState.REAL, trained.spec)
    assert net is not None
    conv = numbered_convs(net)[3][1]
    with torch.no_grad():
        conv.weight.copy_(torch.where(conv.weight >= 0, 0.2, -0.1))
    own = measure_network(net, samples, net.spec, CPU)
    hits = measure_layer(net, 3, samples, net.spec, CPU)
    assert own.num_images == 60
    assert own.hits_reestimated > 20
    assert hits[LayerState.BINARY_WEIGHTS] == own.hits_reestimated
    assert hits[LayerState.BINARY] != own.hits_reestimated


def test_measuring_leaves_the_network_as_it_was_and_repeats(trained: Network, samples: Samples) -> None:
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    first = measure_layer(trained, 2, samples, trained.spec, CPU)
    assert measure_network(trained, samples, trained.spec, CPU).hits == count_hits(trained, samples, CPU)[0]
    assert measure_layer(trained, 2, samples, trained.spec, CPU) == first
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())


def test_figures_of_a_binary_run_are_gains_and_those_of_its_twin_losses(trained: Network, samples: Samples) -> None:
    net = fbin()
    own, twin = (measure_network(each, samples, net.spec, CPU) for each in (net, trained))
    base, twin_base = own.hits_reestimated, twin.hits_reestimated
    hits = {3: {LayerState.REAL: base + 6, LayerState.BINARY_WEIGHTS: base - 3}}
    losses = {3: {LayerState.BINARY: twin_base - 12, LayerState.BINARY_WEIGHTS: None}}
    rows = {row.index: row for row in layer_figures(net, own, hits, twin, losses)}
    assert (rows[3].gain_if_real, rows[3].gain_if_real_inputs) == (10.0, -5.0)
    assert (rows[3].loss_if_binary, rows[3].loss_if_binary_weights) == (20.0, None)
    assert (rows[3].binary_weights, rows[3].binary_inputs, rows[1].binary_inputs) == (True, True, False)
    assert (rows[1].gain_if_real, rows[1].loss_if_binary) == (None, None)
    assert rows[4].input_rmse == own.inputs[4].rmse
    assert rows[4].input_negative_share == own.inputs[4].negative_share
    assert layer_figures(net, own, hits, None, {})[2].loss_if_binary is None
