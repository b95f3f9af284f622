"""Block orders: shortcuts round binary convolutions, activations, and options that a variant brings along."""

import itertools
import json
from dataclasses import asdict

import pytest
import torch
from packed_form import channels_last_logits
from torch import nn
from torch.nn import functional as F

from dabnn.activations import RPReLU
from dabnn.layers import BinaryConv2d, LayerOptions
from dabnn.models import build, describe
from dabnn.models.blocks import Chain, Shortcut, free_shortcut
from dabnn.packed import load_packed, pack
from dabnn.plans import numbered_convs

SMALL = {"num_classes": 5, "width": 0.25, "seed": 3}
DROPOUTS = (nn.Dropout, nn.Dropout2d)
ABLE = {
    "sketchanetfbin": 81, "sketchanethybridv2": 81, "alexnetfbin": 63, "bincifarfbin": 16, "nin": 16, "vgg_small": 16,
    "resnet20": 16, "resnetfbin18": 16, "resnethybridv318": 16,
}  # fmt: skip


def images(net, num=4):
    shape = (num, net.spec.in_channels, net.spec.input_size, net.spec.input_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def trained(net):
    """The network after three passes and steps, in evaluation mode."""
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(3):
        F.cross_entropy(net(images(net)), torch.arange(4)).backward()
        optimizer.step()
    return net.eval()


@pytest.mark.parametrize("activation", [None, "rprelu"])
@pytest.mark.parametrize(("name", "size"), ABLE.items())
def test_bireal_goes_round_every_binary_convolution_and_packs(name, size, activation, tmp_path):
    net = trained(build(name, block="bireal", activation=activation, input_size=size, **SMALL))
    starts = {f"{path}.{m.start}".lstrip(".") for path, m in shortcuts(net)}
    inputs = {row.path for row in describe(net).layers if row.binary_inputs}
    assert inputs - starts == {path for path in inputs if "downsample" in path}
    assert any(isinstance(module, RPReLU) for module in net.modules()) == (activation == "rprelu")
    x = images(net)
    pack(net).save(tmp_path / "model.dab")
    with torch.no_grad():
        assert torch.equal(load_packed(tmp_path / "model.dab", weights="dense")(x), channels_last_logits(net, x))


def shortcuts(net):
    """(path of the chain it stands in, shortcut)."""
    chains = ((path, chain) for path, chain in net.named_modules() if isinstance(chain, Chain))
    return [(path, child) for path, chain in chains for child in chain if isinstance(child, Shortcut)]


@pytest.mark.parametrize(("name", "size"), ABLE.items())
@pytest.mark.parametrize("block", ["reference", "bireal"])
def test_signs_read_both_sides(name, size, block):
    net, shares = build(name, block=block, input_size=size, **SMALL), {}
    for path, conv in numbered_convs(net).values():
        if isinstance(conv, BinaryConv2d) and conv.binary_input:
            conv.register_forward_pre_hook(lambda _, x, path=path: shares.update({path: (x[0] >= 0).float().mean()}))
    net(images(net))
    assert all(0.02 < share < 0.98 for share in shares.values()), shares


@pytest.mark.parametrize("activation", [None, "rprelu"])
@pytest.mark.parametrize(("name", "size"), {**ABLE, "alexnethybrid": 63, "sketchanethybrid": 81}.items())
def test_no_dropout_stands_right_before_a_sign(name, size, activation):
    net = build(name, block="bireal", activation=activation, input_size=size, **SMALL)
    for module, after in itertools.pairwise(net):
        assert not (isinstance(module, DROPOUTS) and isinstance(after, BinaryConv2d) and after.binary_input)


@pytest.mark.parametrize(
    ("name", "dropouts"),
    [
        ("bincifarfbin", {"reference": ["dropout4", "dropout6"], "bireal": []}),
        ("nin", {"reference": ["dropout3", "dropout6"], "bireal": []}),
        ("sketchanetfbin", {"reference": ["dropout6", "dropout7"], "bireal": ["dropout7"]}),
        ("sketchanethybrid", {"reference": ["dropout6", "dropout7"], "bireal": ["dropout6", "dropout7"]}),
        ("alexnethybrid", {"reference": ["dropout5", "dropout6"], "bireal": ["dropout5", "dropout6"]}),
    ],
)
def test_dropout_stays_where_what_follows_is_no_sign(name, dropouts):
    for block, expected in dropouts.items():
        net = build(name, block=block, num_classes=5, width=0.125)
        assert [path for path, module in net.named_modules() if isinstance(module, DROPOUTS)] == expected


@pytest.mark.parametrize("name", ["sketchanetfbin", "bincifarfbin", "nin", "vgg_small", "resnet20"])
def test_paths_and_numbers_are_those_of_the_reference_order(name):
    reference, bireal = (build(name, block=block, num_classes=5, width=0.125) for block in ("reference", "bireal"))
    paths = [[path for path, _ in numbered_convs(net).values()] for net in (reference, bireal)]
    assert paths[0] == paths[1]


def test_the_downsample_of_bireal_follows_conv1_and_is_real_in_the_yardsticks():
    net = build("bireal18", **SMALL)
    rows = {row.index: row for row in describe(net).layers}
    assert [rows[index].path for index in (6, 7, 8)] == [
        "stage2.0.conv1", "stage2.0.downsample.conv", "stage2.0.conv2",
    ]  # fmt: skip
    assert [(rows[index].binary_weights, rows[index].binary_inputs) for index in (6, 7, 8)] == [
        (True, True), (False, False), (True, True),
    ]  # fmt: skip


def test_a_bireal_block_is_two_convolutions_with_a_shortcut_each():
    net = trained(build("bireal18", **SMALL))
    block = net.stage2[0]
    x = torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        shortcut = block.downsample.bn(block.downsample.conv(F.avg_pool2d(x, 2)))
        first = block.bn1(block.conv1(x)) + shortcut
        second = block.bn2(block.conv2(first)) + first
        assert torch.equal(block(x), second)


def test_a_react_block_has_an_rprelu_after_each_sum_and_a_shift_before_each_sign():
    net = trained(build("react18", **SMALL))
    block = net.stage1[0]
    x = torch.randn(2, 16, 6, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        first = block.rprelu1(block.bn1(block.conv1(x)) + x)
        second = block.rprelu2(block.bn2(block.conv2(first)) + first)
        assert torch.equal(block(x), second)
    assert block.conv1.input_shift.abs().max() > 0
    assert net.spec.options["input_quantizer"] == "rsign"


@pytest.mark.parametrize("size", [7, 8, 15])
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 10, 3, stride=2, padding=1), nn.Conv2d(4, 3, 5),
        nn.Conv2d(4, 4, 7), nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 1, stride=2), nn.Conv2d(4, 6, 4, stride=2, padding=1),
    ],
    ids=str,
)  # fmt: skip
def test_a_shortcut_without_parameters_has_the_shape_of_the_convolution(conv, size):
    x = torch.randn(2, 4, size, size)
    shortcut = Chain(free_shortcut(conv))
    assert list(shortcut.parameters()) == []
    assert shortcut(x).shape == conv(x).shape
    assert torch.equal(shortcut(x)[:, 0], shortcut(x)[:, 4]) if conv.out_channels > 4 else True
    torch.testing.assert_close(shortcut(torch.ones_like(x)), torch.ones_like(conv(x)))


def test_a_shortcut_of_the_same_shape_is_the_identity():
    assert free_shortcut(nn.Conv2d(4, 4, 3, padding=1)) == {}


def test_rprelu_stands_in_for_every_relu_in_reference_order():
    net = build("resnetfbin18", activation="rprelu", **SMALL)
    assert not any(isinstance(module, nn.ReLU) for module in net.modules())
    relus = build("resnetfbin18", **SMALL)
    assert count(net, RPReLU) == count(relus, nn.ReLU)


def count(net, kind):
    return sum(isinstance(module, kind) for module in net.modules())


def test_options_change_the_defaults_of_the_variant_or_replace_them():
    changed = build("react18", options={"ste": "polynomial"}, **SMALL).spec.options
    assert (changed["ste"], changed["input_quantizer"]) == ("polynomial", "rsign")
    replaced = build("react18", options=LayerOptions(), **SMALL)
    assert replaced.spec.options == asdict(LayerOptions())
    assert replaced.stage1[0].conv1.options == LayerOptions()


@pytest.mark.parametrize(
    "options",
    [
        {"name": "react18"},
        {"name": "resnetfbin18", "block": "bireal", "layers": ["stage[12].*"], "input_size": 32},
        {"name": "bincifarfbin", "options": {"input_quantizer": "two_valued"}, "weights": "dab_learned"},
        {"name": "vgg_small", "inputs": ["conv[45]"], "activation": "rprelu"},
    ],
)
def test_a_spec_survives_json_and_builds_the_same_architecture(options):
    net = build(**SMALL | options)
    again = build(**json.loads(json.dumps(asdict(net.spec))))
    assert again.spec == net.spec
    assert describe(again) == describe(net)
    again.load_state_dict(net.state_dict())


@pytest.mark.parametrize("weights", ["dab_learned", "dab_warm", "lsbq", "adabin", "xnor_centered"])
@pytest.mark.parametrize("inputs", ["sign", "rsign", "two_valued"])
def test_every_quantizer_and_input_packs_bit_for_bit(weights, inputs, tmp_path):
    net = build("bincifarfbin", weights=weights, options={"input_quantizer": inputs}, input_size=16, **SMALL)
    x = images(trained(net))
    packed = pack(net)
    packed.save(tmp_path / "model.dab")
    with torch.no_grad():
        assert torch.equal(load_packed(tmp_path / "model.dab", weights="dense")(x), channels_last_logits(net, x))
    assert packed.float_bytes == describe(net).float_bytes
