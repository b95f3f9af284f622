"""The zoo against the structure of the reference models, whose numbers are written out here."""

import json
from dataclasses import asdict

import pytest
import torch
from torch import nn

from dabnn.errors import InvalidInputError
from dabnn.layers import BinaryConv2d
from dabnn.models import build, describe
from dabnn.plans import LayerPlan, numbered_convs

SKETCH_CONVS = [
    (1, 64, 15), (64, 128, 5), (128, 256, 3), (256, 256, 3), (256, 256, 3), (256, 512, 7), (512, 512, 1), (512, 250, 1),
]  # fmt: skip
CIFAR_CONVS = [
    (3, 128, 3), (128, 128, 3), (128, 256, 3), (256, 256, 3), (256, 512, 3), (512, 512, 3),
    (512, 1024, 4), (1024, 10, 1),
]  # fmt: skip
ALL, ENDS = set(range(1, 9)), {1, 8}

# name: parameters, convolutions with a bias, BN widths in order, sign inputs, dropout rate
REFERENCE = {
    "sketchanet": (8_512_634, ALL, [64, 128, 256, 256, 256, 512, 512], [], 0.1),
    "sketchanetwbin": (8_510_714, ENDS, [64, 128, 256, 256, 256, 512, 512], [], 0.1),
    "sketchanetfbin": (8_509_818, ENDS, [64, 64, 128, 256, 256, 256, 512], [2, 3, 4, 5, 6, 7], 0.2),
    "sketchanethybrid": (8_510_330, ENDS, [64, 64, 128, 256, 256, 512, 512], [2, 3, 4, 5], 0.2),
    "sketchanethybridv2": (8_509_818, ENDS, [64, 64, 128, 256, 256, 256, 512], [2, 3, 4, 5, 6], 0.2),
    "bincifar": (12_982_154, ALL, [128, 128, 128, 256, 256, 512, 512, 1024], [], 0.4),
    "bincifarfbin": (12_980_106, ALL, [128, 128, 128, 256, 256, 512, 512], [2, 3, 4, 5, 6, 7], 0.4),
}
C, B, R, S, P, D = "conv", "bn", "relu", "sign", "pool", "dropout"
ORDER = {
    "sketchanet": [C, B, R, P] * 2 + [C, B, R] * 3 + [P] + [C, B, R, D] * 2 + [C],
    "sketchanetfbin": [C, B, R, P, B, S, C, R, P] + [B, S, C, R] * 3 + [P] + [B, S, C, R, D] * 2 + [C],
    "sketchanethybrid": [C, B, R, P, B, S, C, R, P] + [B, S, C, R] * 3 + [P] + [C, B, R, D] * 2 + [C],
    "sketchanethybridv2": [C, B, R, P, B, S, C, R, P]
    + [B, S, C, R] * 3 + [P] + [B, S, C, R, D] + [C, B, R, D] + [C],
    "bincifar": [C, B, R, B, C, R, P, B, C, R, B, C, R, P, D, B, C, R, B, C, R, P, D, B, C, R, B, C],
    "bincifarfbin": [C, B, R, B, S, C, R, P] + [B, S, C, R] * 2 + [P, D] + [B, S, C, R] * 2 + [P, D, B, S, C, R, C],
}  # fmt: skip
ORDER["sketchanetwbin"] = ORDER["sketchanet"]


def reference_classes(name: str) -> int:
    return 250 if name.startswith("sketchanet") else 10


def order(net: nn.Module) -> list[str]:
    words: list[str] = []
    for path, module in net.named_children():
        if isinstance(module, BinaryConv2d) and module.binary_input:
            words.append(S)
        words.append(path.rstrip("0123456789"))
    return words[:-1] if words[-1] == "flatten" else words


def weights_of(net: nn.Module) -> list[int]:
    return [row.index for row in describe(net).layers if row.binary_weights]


def inputs_of(net: nn.Module) -> list[int]:
    return [row.index for row in describe(net).layers if row.binary_inputs]


@pytest.mark.parametrize("name", REFERENCE)
def test_structure_is_the_reference_structure(name: str) -> None:
    num_params, with_bias, bn_widths, signs, dropout = REFERENCE[name]
    net = build(name, num_classes=reference_classes(name))
    convs = {index: conv for index, (_, conv) in numbered_convs(net).items()}
    assert sum(parameter.numel() for parameter in net.parameters()) == describe(net).num_params == num_params
    assert {index for index, conv in convs.items() if conv.bias is not None} == with_bias
    shapes = [(conv.in_channels, conv.out_channels, conv.kernel_size[0]) for conv in convs.values()]
    assert shapes == (SKETCH_CONVS if name.startswith("sketchanet") else CIFAR_CONVS)
    assert [module.num_features for module in net.modules() if isinstance(module, nn.BatchNorm2d)] == bn_widths
    assert inputs_of(net) == signs
    assert {module.p for module in net.modules() if isinstance(module, nn.Dropout2d)} == {dropout}
    assert order(net) == ORDER[name]


@pytest.mark.parametrize("name", REFERENCE)
def test_default_ranges_are_the_published_ones(name: str) -> None:
    expected = [] if name in ("sketchanet", "bincifar") else [2, 3, 4, 5, 6, 7]
    assert weights_of(build(name, num_classes=5, width=0.125)) == expected


def test_a_given_range_touches_weights_only() -> None:
    net = build("sketchanethybrid", num_classes=5, width=0.125, bin_start=3, bin_end=8)
    assert weights_of(net) == [3, 4, 5, 6, 7, 8]
    assert inputs_of(net) == [2, 3, 4, 5]


def test_a_float_model_with_a_range_is_the_weight_binary_twin() -> None:
    net = build("bincifar", num_classes=10, width=0.125, bin_start=2, bin_end=7)
    assert weights_of(net) == [2, 3, 4, 5, 6, 7]
    assert inputs_of(net) == []
    assert order(net) == ORDER["bincifar"]


def test_half_a_range_is_completed_by_its_default() -> None:
    assert weights_of(build("bincifar", num_classes=10, width=0.125, bin_start=5)) == [5, 6, 7]
    assert weights_of(build("bincifar", num_classes=10, width=0.125, bin_end=3)) == [2, 3]


def test_without_sign_inputs_the_block_order_stays() -> None:
    net = build("bincifarfbin", num_classes=10, width=0.125, inputs="none")
    assert inputs_of(net) == []
    assert order(net) == [word for word in ORDER["bincifarfbin"] if word != S]


def test_sign_inputs_can_be_listed() -> None:
    assert inputs_of(build("bincifar", num_classes=10, width=0.125, inputs=[3, 6])) == [3, 6]


def test_a_plan_names_all_layers() -> None:
    net = build("bincifarfbin", num_classes=10, width=0.125, plan=LayerPlan.of([4], [5, 6]))
    assert (weights_of(net), inputs_of(net)) == ([4], [5, 6])


@pytest.mark.parametrize(
    "options",
    [
        {"name": "sketchanetfbin", "width": 0.5, "center": "filter"},
        {"name": "bincifar", "inputs": [3, 2], "input_size": 24, "in_channels": 1},
        {"name": "bincifar", "bin_start": 3, "weights": "xnor", "width": 0.1},
        {"name": "bincifarfbin", "width": 0.1, "plan": {"binary_weights": [3], "binary_inputs": []}},
    ],
)
def test_a_spec_survives_json_and_builds_the_same_architecture(options: dict[str, object]) -> None:
    net = build(num_classes=7, **options)
    again = build(**json.loads(json.dumps(asdict(net.spec))))
    assert again.spec == net.spec
    assert describe(again) == describe(net)
    again.load_state_dict(net.state_dict())


def test_a_seed_decides_all_parameters_and_leaves_the_generator_alone() -> None:
    state = torch.random.get_rng_state()
    first = build("bincifarfbin", num_classes=10, width=0.125, seed=5)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.randn(3)
    second = build("bincifarfbin", num_classes=10, width=0.125, seed=5)
    other = build("bincifarfbin", num_classes=10, width=0.125, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


def test_weights_are_kaiming_normal_by_fan_out_and_biases_zero() -> None:
    net = build("bincifar", num_classes=10, width=0.5, seed=1)
    for _, conv in numbered_convs(net).values():
        expected = (2 / (conv.out_channels * conv.kernel_size[0] ** 2)) ** 0.5
        # The relative spread of a sample deviation is 1 / sqrt(2 n); five of them is beyond chance.
        assert conv.weight.std().item() == pytest.approx(expected, rel=5 / (2 * conv.weight.numel()) ** 0.5)
        assert conv.bias.abs().max() == 0


@pytest.mark.parametrize(("width", "channels"), [(1.0, 128), (0.25, 32), (0.3, 40), (0.05, 6), (0.001, 1)])
def test_width_rounds_to_eights_and_keeps_one_channel(width: float, channels: int) -> None:
    assert build("bincifar", num_classes=2, width=width).conv1.out_channels == channels


@pytest.mark.parametrize(("name", "size", "kernel"), [("bincifar", 16, 2), ("bincifar", 64, 8)])
@pytest.mark.parametrize("channels", [1, 3])
def test_bincifar_follows_the_image_size(name: str, size: int, kernel: int, channels: int) -> None:
    net = build(name, num_classes=4, input_size=size, in_channels=channels, width=0.0625).eval()
    assert net.conv7.kernel_size == (kernel, kernel)
    assert net(torch.randn(2, channels, size, size)).shape == (2, 4)


@pytest.mark.parametrize(("size", "kernel"), [(81, 1), (128, 2), (224, 6), (225, 7), (256, 8)])
def test_sketchanet_follows_the_image_size(size: int, kernel: int) -> None:
    net = build("sketchanetfbin", num_classes=4, input_size=size, width=0.0625).eval()
    assert net.conv6.kernel_size == (kernel, kernel)
    assert net(torch.randn(1, 1, size, size)).shape == (1, 4)


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (2, 3, 64, 64), (2, 3, 32, 64), (3, 32, 32)])
def test_images_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    net = build("bincifar", num_classes=4, width=0.0625)
    with pytest.raises(InvalidInputError, match=r"^images: shape .*takes \(N, 3, 32, 32\)"):
        net(torch.randn(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "bincifarfbn"}, r"^model\.name: 'bincifarfbn' .*Did you mean 'bincifarfbin'"),
        ({"bin_start": 5, "bin_end": 4}, r"^binarize\.bin_end: 4 lies before"),
        ({"bin_end": 9}, r"^binarize\.bin_end: 9 is outside the model, which has 8 convolutions"),
        ({"inputs": [9]}, r"^binarize\.inputs: \[9\]"),
        ({"inputs": "modell"}, r"^binarize\.inputs: 'modell' .*Did you mean 'model'"),
        ({"weights": "xnr"}, r"^binarize\.weights: 'xnr' .*Did you mean 'xnor'"),
        ({"center": "filtr"}, r"^binarize\.center: 'filtr' .*Did you mean 'filter'"),
        ({"plan": {"binary_weight": [2]}}, r"^binarize\.plan: 'binary_weight' .*Did you mean 'binary_weights'"),
        ({"plan": LayerPlan.of([9])}, r"^binarize\.plan\.weights: \[9\] outside .*Use 1 to 8; `dab models show NAME`"),
        ({"plan": {"binary_inputs": ["convv3"]}}, r"^binarize\.plan\.inputs: 'convv3' names no layer"),
        ({"bin_start": 9}, r"^binarize\.bin_start: 9 is outside .*Use 1 to 8; `dab models show NAME` lists them"),
        (
            {"bin_start": 8},
            r"^binarize\.bin_start: 8 lies behind 7, where the range ends unless binarize\.bin_end",
        ),
        ({"bin_end": 1}, r"^binarize\.bin_end: 1 lies before 2, where the range starts unless binarize\.bin_start"),
        ({"plan": LayerPlan.of([2]), "bin_start": 2}, r"^binarize\.plan: names all layers already"),
        ({"input_size": 20}, r"^model\.input_size: 20 .*multiple of 8, at least 16"),
        ({"input_size": 8}, r"^model\.input_size: 8 .*Use 16 or more"),
        ({"name": "sketchanet", "input_size": 80}, r"^model\.input_size: 80 .*Use 81 or more"),
        ({"num_classes": 0}, r"^model\.num_classes: 0"),
        ({"in_channels": 0}, r"^model\.in_channels: 0"),
        ({"width": 0.0}, r"^model\.width: 0\.0"),
        ({"width": float("nan")}, r"^model\.width: nan"),
    ],
)
def test_a_model_that_cannot_be_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        build(**{"name": "bincifar", "num_classes": 10} | options)


def test_the_table_counts_operations_of_the_published_model() -> None:
    table = describe(build("sketchanetfbin", num_classes=250))
    macs = [row.macs for row in table.layers]
    maps = [71, 31, 15, 15, 15, 1, 1, 1]
    assert macs == [
        c_in * c_out * kernel**2 * size**2 for (c_in, c_out, kernel), size in zip(SKETCH_CONVS, maps, strict=True)
    ]
    assert [row.bit_ops for row in table.layers] == [0, *macs[1:7], 0]
    assert [row.weight_bits for row in table.layers] == [32, 1, 1, 1, 1, 1, 1, 32]
    assert (table.family, table.variant, table.input_shape) == ("sketchanet", "fbin", (1, 225, 225))
    assert json.loads(json.dumps(asdict(table)))["layers"][0]["stride"] == [3, 3]
