import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dabnn.distributed import World
from dabnn.instruments import SAMPLE_EVERY, Instruments
from dabnn.layers import BinaryConv2d

ALONE = World.current("cpu")


def network(seed: int = 0) -> nn.Sequential:
    """A real stem, a layer with binary weights and inputs, one with binary weights only, and a head."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.BatchNorm2d(6),
        BinaryConv2d(6, 8, 3, weight_quantizer="dab", binary_input=True),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        BinaryConv2d(8, 4, 3, weight_quantizer="dab", binary_input=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def take_step(net: nn.Module, optimizer: torch.optim.Optimizer, instruments: Instruments, step: int) -> None:
    images = torch.randn(6, 1, 9, 9, generator=torch.Generator().manual_seed(step))
    with instruments.step(step):
        loss = nn.functional.cross_entropy(net(images), torch.arange(6) % 4)
        optimizer.zero_grad()
        loss.backward()
    optimizer.step()


def train(net: nn.Module, instruments: Instruments, steps: range, lr: float = 0.02) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    for step in steps:
        take_step(net, optimizer, instruments, step)
    return optimizer


def mask_of(layer: BinaryConv2d) -> np.ndarray[Any, Any]:
    return copy.deepcopy(layer).code().mask.numpy()


def test_every_layer_reports_what_it_has_and_nothing_else() -> None:
    net = network()
    instruments = Instruments(net)
    train(net, instruments, range(3))
    seen: dict[str, set[str]] = {}
    for key in instruments.finish_epoch(ALONE):
        prefix, number, what = key.split("/")
        assert prefix == "layers"
        seen.setdefault(number, set()).add(what)
    of_gradient = {"gradient_norm", "dead_filters"}
    of_weights = {"upper_share", "gap", "offset", "weight_error"}
    of_bits = {"flipped_share", "flipped_share_epoch", "threshold_drift"}
    of_input = {"positive_inputs", "input_imbalance"}
    assert seen == {
        "01": of_gradient,
        "02": of_gradient | of_weights | of_bits | of_input,
        "03": of_gradient | of_weights | of_bits,
    }


def test_figures_of_the_code_equal_their_formulas_in_numpy() -> None:
    net = network()
    metrics = Instruments(net).finish_epoch(ALONE)
    for number, layer in (("02", net[2]), ("03", net[5])):
        weight = layer.weight.detach().double().numpy()
        centered = weight - weight.mean(1, keepdims=True) if layer.center == "tap" else weight
        code = layer.code()
        alpha, beta = code.alpha.double().numpy(), code.beta.double().numpy()
        dense = code.dense().double().numpy()
        flat = centered.reshape(len(alpha), -1)
        scatter = ((flat - flat.mean(1, keepdims=True)) ** 2).sum()
        expected = {
            "upper_share": code.mask.numpy().mean(),
            "gap": (alpha - beta).mean(),
            "offset": np.abs(alpha + beta).sum() / (alpha - beta).sum(),
            "weight_error": ((centered - dense) ** 2).sum() / scatter,
        }
        for what, value in expected.items():
            assert metrics[f"layers/{number}/{what}"] == pytest.approx(value, rel=1e-5)
        assert 0 < metrics[f"layers/{number}/weight_error"] < 0.5


def test_flips_and_drift_are_counted_over_all_steps_and_over_the_epoch() -> None:
    net = network()
    instruments, layer = Instruments(net), net[2]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    start = copy.deepcopy(layer).code()
    masks = [mask_of(layer)]
    for step in range(5):
        take_step(net, optimizer, instruments, step)
        masks.append(mask_of(layer))
    end = copy.deepcopy(layer).code()
    metrics = instruments.finish_epoch(ALONE)
    flips = [(before != after).mean() for before, after in itertools.pairwise(masks)]
    assert metrics["layers/02/flipped_share"] == pytest.approx(np.mean(flips))
    assert metrics["layers/02/flipped_share_epoch"] == pytest.approx((masks[0] != masks[-1]).mean())
    drift = ((end.alpha + end.beta) - (start.alpha + start.beta)).abs().sum() / (end.alpha - end.beta).sum()
    assert metrics["layers/02/threshold_drift"] == pytest.approx(float(drift), rel=1e-5)
    assert max(flips) > 0


def test_a_new_epoch_starts_from_nothing() -> None:
    net = network()
    instruments = Instruments(net)
    train(net, instruments, range(3), lr=0.5)
    assert instruments.finish_epoch(ALONE)["layers/02/flipped_share"] > 0
    train(net, instruments, range(3), lr=0.0)
    metrics = instruments.finish_epoch(ALONE)
    assert metrics["layers/02/flipped_share"] == 0
    assert metrics["layers/02/flipped_share_epoch"] == 0
    assert metrics["layers/02/threshold_drift"] == 0


def test_the_balance_of_the_inputs_is_that_of_the_sampled_steps() -> None:
    net = network().eval()  # the running statistics make the inputs of layer 2 known
    net[2].train()
    instruments = Instruments(net)
    shares = []
    for step in range(SAMPLE_EVERY + 1):
        images = torch.randn(2, 1, 9, 9, generator=torch.Generator().manual_seed(step))
        with instruments.step(step):
            net(images)
        if step % SAMPLE_EVERY == 0:
            shares.append((net[:2](images) >= 0).double().mean((0, 2, 3)))
    share = torch.stack(shares).mean(0)
    metrics = instruments.finish_epoch(ALONE)
    assert metrics["layers/02/positive_inputs"] == pytest.approx(float(share.mean()))
    assert metrics["layers/02/input_imbalance"] == pytest.approx(float((2 * share - 1).abs().mean()))


def test_channels_stuck_on_either_side_show_although_the_mean_is_balanced() -> None:
    layer = BinaryConv2d(2, 3, 1, weight_quantizer="dab", binary_input=True)
    instruments = Instruments(nn.Sequential(layer))
    with instruments.step(0):
        layer(torch.tensor([1.0, -1.0]).view(1, 2, 1, 1).expand(4, 2, 5, 5))
    metrics = instruments.finish_epoch(ALONE)
    assert metrics["layers/01/positive_inputs"] == 0.5
    assert metrics["layers/01/input_imbalance"] == 1.0


def test_the_gradient_norm_is_the_mean_over_the_sampled_steps() -> None:
    net = network()
    instruments = Instruments(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    norms = []
    for step in range(2 * SAMPLE_EVERY):
        take_step(net, optimizer, instruments, step)
        if step % SAMPLE_EVERY == 0:
            norms.append(float(net[5].weight.grad.norm()))
    assert instruments.finish_epoch(ALONE)["layers/03/gradient_norm"] == pytest.approx(np.mean(norms), rel=1e-5)


def test_filters_without_gradient_or_without_two_values_are_dead() -> None:
    net = network()
    with torch.no_grad():
        net[5].weight[0] = 5.0 + torch.rand(8, 3, 3)  # outside the estimator's window
        net[5].weight[1] = 0.25  # constant
        net[0].weight[2], net[0].bias[2] = 0.0, 0.0
        net[1].weight[2] = 0.0  # nothing comes back through this channel of the stem
    instruments = Instruments(net)
    train(net, instruments, range(1), lr=0.0)
    metrics = instruments.finish_epoch(ALONE)
    assert metrics["layers/03/dead_filters"] == 2 / 4
    assert metrics["layers/01/dead_filters"] == 1 / 6


def test_what_is_not_defined_is_left_out() -> None:
    layer = BinaryConv2d(2, 3, 1, weight_quantizer="dab", center="none")
    torch.nn.init.constant_(layer.weight, 0.5)
    metrics = Instruments(nn.Sequential(layer)).finish_epoch(ALONE)
    assert metrics == {"layers/01/upper_share": 1.0, "layers/01/gap": 0.0}


def test_without_a_network_nothing_is_measured() -> None:
    instruments = Instruments(None)
    with instruments.step(0):
        pass
    assert instruments.finish_epoch(ALONE) == {}
    assert instruments.state(ALONE) == {}


def test_instruments_change_no_weight() -> None:
    plain, watched = network(), network()
    train(plain, Instruments(None), range(SAMPLE_EVERY + 2), lr=0.5)
    instruments = Instruments(watched)
    train(watched, instruments, range(SAMPLE_EVERY + 2), lr=0.5)
    instruments.finish_epoch(ALONE)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, watched.state_dict()[name]), name
    assert not any(module._forward_pre_hooks for module in watched.modules())


@pytest.mark.parametrize("stop", [1, 4, SAMPLE_EVERY, SAMPLE_EVERY + 1])
def test_an_interrupted_epoch_reports_the_same_figures(stop: int) -> None:
    steps = SAMPLE_EVERY + 3
    whole = network()
    instruments = Instruments(whole)
    train(whole, instruments, range(steps), lr=0.5)
    expected = instruments.finish_epoch(ALONE)

    first = network()
    before = Instruments(first)
    train(first, before, range(stop), lr=0.5)
    saved = copy.deepcopy(before.state(ALONE))
    second = network()
    second.load_state_dict(first.state_dict())
    after = Instruments(second)
    after.restore(saved, is_main=True)
    train(second, after, range(stop, steps), lr=0.5)
    assert after.finish_epoch(ALONE) == expected


def test_only_the_first_rank_takes_over_what_is_summed_over_ranks() -> None:
    net = network()
    instruments = Instruments(net)
    train(net, instruments, range(1))
    saved = instruments.state(ALONE)
    other = Instruments(network())
    other.restore(saved, is_main=False)
    assert other.state(ALONE)["02"]["num_inputs"] == 0
    assert torch.equal(other.state(ALONE)["02"]["is_alive"], saved["02"]["is_alive"])


def test_an_epoch_resumed_without_figures_is_measured_from_there() -> None:
    net = network()
    instruments = Instruments(net)
    instruments.restore({}, is_main=True)
    train(net, instruments, range(SAMPLE_EVERY - 2, SAMPLE_EVERY), lr=0.5)
    metrics = instruments.finish_epoch(ALONE)
    assert metrics["layers/02/flipped_share"] > 0
    assert "layers/02/gradient_norm" not in metrics
    assert all(math.isfinite(value) for value in metrics.values())


def test_the_state_survives_a_file_without_code(tmp_path: Any) -> None:
    net = network()
    instruments = Instruments(net)
    train(net, instruments, range(2))
    torch.save(instruments.state(ALONE), tmp_path / "state.pt")
    loaded: dict[str, dict[str, Any]] = torch.load(tmp_path / "state.pt", weights_only=True)
    again = Instruments(net)
    again.restore(loaded, is_main=True)
    start: Tensor = again.state(ALONE)["02"]["bits"]["start"]
    assert torch.equal(start, instruments.state(ALONE)["02"]["bits"]["start"])
