import torch
from torch import nn

from dabnn.averaging import Average


def net_with(value: float) -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1))
    nn.init.constant_(net[0].weight, value)
    return net


def test_the_average_follows_its_formula_with_a_faster_start() -> None:
    net, values = net_with(1.0), [2.0, -3.0, 5.0, 4.0]
    average, expected = Average(net, 0.3), 1.0
    for t, value in enumerate(values, start=1):
        nn.init.constant_(net[0].weight, value)
        average.update(net)
        decay = min(0.3, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * value
        assert abs(average.weights["0.weight"].item() - expected) < 1e-6


def test_running_statistics_are_averaged_and_counters_copied() -> None:
    net = net_with(1.0)
    average = Average(net, 0.5)
    net(torch.ones(2, 1, 2, 2))
    average.update(net)
    decay = 2 / 11
    expected = decay * 0 + (1 - decay) * net[1].running_mean
    torch.testing.assert_close(average.weights["1.running_mean"], expected)
    assert average.weights["1.num_batches_tracked"] == 1


def test_the_network_holds_the_average_within_the_block_only() -> None:
    net = net_with(1.0)
    average = Average(net, 0.5)
    nn.init.constant_(net[0].weight, 9.0)
    with average.applied_to(net):
        assert net[0].weight.item() == 1.0
    assert net[0].weight.item() == 9.0


def test_a_saved_average_goes_on_where_it_was() -> None:
    net = net_with(1.0)
    average, again = Average(net, 0.9), Average(net_with(7.0), 0.9)
    for value in (2.0, 3.0):
        nn.init.constant_(net[0].weight, value)
        average.update(net)
    again.load({name: tensor.clone() for name, tensor in average.weights.items()}, average.num_updates)
    for one in (average, again):
        one.update(net)
    assert torch.equal(average.weights["0.weight"], again.weights["0.weight"])
