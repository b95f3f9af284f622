"""The zoo against `reference_models.json`: the structure of the 31 reference models as measured on their own code.

A convolution there is [channels in, out, kernel, stride, padding, groups, has bias, takes signs, height of its output].
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from packed_form import channels_last_logits
from torch import nn

from dabnn.errors import InvalidInputError
from dabnn.models import build, describe, names
from dabnn.packed import binary_layers, load_packed, pack
from dabnn.plans import numbered_convs

REFERENCE = json.loads((Path(__file__).parent / "reference_models.json").read_text())
YARDSTICKS = ("resnet20", "vgg_small", "bireal18", "react18")
# name: smallest image that makes a quick test, its channels
SIZES = {
    "alexnet": 63,
    "sketchanet": 81,
    "googlenet": 17,
    "squeezenet": 21,
    "mobilenet": 32,
    "resnet": 16,
    "densenet": 8,
}
BINARY_FAMILIES = ("sketchanet", "alexnet", "googlenet", "squeezenet", "resnet", "bincifar")


def on_meta(name, **options):
    """A network without memory, for its structure."""
    with torch.device("meta"):
        return build(name, **{"num_classes": REFERENCE.get(name, {"num_classes": 10})["num_classes"], **options})


def small(name, **options):
    size = next((size for family, size in SIZES.items() if name.startswith(family)), 32 if "vgg16" in name else 16)
    return build(name, **{"num_classes": 5, "width": 0.25, "input_size": size, "seed": 3, **options})


def images(net, num=4):
    shape = (num, net.spec.in_channels, net.spec.input_size, net.spec.input_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_the_zoo_is_the_reference_list_and_the_yardsticks():
    assert set(names()) == {*REFERENCE, *YARDSTICKS}
    assert len(REFERENCE) == 31


@pytest.mark.parametrize("name", REFERENCE)
def test_structure_is_the_reference_structure(name):
    expected = REFERENCE[name]
    net = on_meta(name)
    table = describe(net)
    assert table.num_params == expected["num_params"]
    assert list(table.input_shape) == expected["input_shape"]
    assert table.variant == expected["variant"].removesuffix(" (always)")
    convs = [conv for _, conv in numbered_convs(net).values()]
    found = [
        [
            row.in_channels, row.out_channels, row.kernel[0], row.stride[0], row.padding[0], conv.groups,
            int(conv.bias is not None), int(row.binary_inputs), round((row.macs / conv.weight.numel()) ** 0.5),
        ]
        for row, conv in zip(table.layers, convs, strict=True)
    ]  # fmt: skip
    assert found == expected["convs"]
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert [[norm.num_features, int(norm.affine), norm.eps] for norm in norms] == expected["norms"]
    dropouts = {(type(m).__name__, m.p) for m in net.modules() if isinstance(m, nn.Dropout | nn.Dropout2d)}
    functional = [["Dropout", 0.2]] if name == "densenet" else []
    assert sorted(map(list, dropouts)) == expected["dropout"] + functional


@pytest.mark.parametrize("name", names())
def test_default_weights_are_all_but_the_first_convolution_and_the_classifier(name):
    table = describe(on_meta(name))
    binary = [row.index for row in table.layers if row.binary_weights]
    last = len(table.layers) if name in YARDSTICKS or name.startswith("googlenet") else len(table.layers) - 1
    downsamples = (7, 12, 17) if name in ("bireal18", "react18") else ()
    expected = [index for index in range(2, last + 1) if index not in downsamples]
    assert binary == ([] if table.variant == "float" else expected)


@pytest.mark.parametrize("name", names())
def test_every_model_trains_a_step_and_exports(name, tmp_path):
    net = small(name)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    x = images(net)
    torch.manual_seed(0)  # dropout
    logits = net(x)
    nn.functional.cross_entropy(logits, torch.arange(len(x))).backward()
    optimizer.step()
    assert logits.shape == (4, 5)
    assert (logits < 0).any()
    moved = zip(net.named_parameters(), before, strict=True)
    assert [path for (path, parameter), old in moved if "conv" in path and torch.equal(parameter, old)] == []
    packed = pack(net.eval())
    file_bytes = packed.save(tmp_path / "model.dab")
    expected = describe(net).packed_bytes
    assert expected < file_bytes < expected + 110 * len(packed.tensors) + 2500
    has_signs = any(layer.binary_input for layer in binary_layers(net).values())
    # Weights that stay bits beside real inputs add up in another order, which may turn signs.
    loaded = load_packed(tmp_path / "model.dab", weights="dense" if has_signs else "bits")
    with torch.no_grad():
        logits, expected = loaded(x), channels_last_logits(net, x)
    if has_signs:
        assert torch.equal(logits, expected)
    else:  # two-valued weights are channels-last only once packed, and real inputs round
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("name", "minimum"),
    [("sketchanetfbin", 20), ("resnetfbin18", 22), ("googlenetfbin", 12), ("squeezenetfbin", 5)],
)
def test_published_models_shrink_as_promised(name, minimum, tmp_path):
    packed = pack(build(name, num_classes=REFERENCE[name]["num_classes"]))
    assert packed.float_bytes / packed.save(tmp_path / "model.dab") >= minimum


@pytest.mark.slow
def test_alexnet_shrinks_as_promised(tmp_path):
    packed = pack(build("alexnetfbin", num_classes=1000))
    assert packed.float_bytes / packed.save(tmp_path / "full.dab") >= 10
    assert packed.float_bytes / packed.save(tmp_path / "half.dab", half=True) >= 16


@pytest.mark.parametrize(
    ("channels", "percent"),
    [(64, 2.84), (128, 1.43), (256, 0.72), (512, 0.36)],
)
def test_what_dab_costs_over_xnor_is_the_published_share(channels, percent):
    rows = [row for row in describe(on_meta("bireal18", input_size=224)).layers if row.in_channels == row.out_channels]
    row = next(row for row in rows if row.out_channels == channels and row.binary_inputs)
    assert 100 * row.dab_word_ops / row.xnor_word_ops == pytest.approx(percent, abs=0.005)


def test_the_share_of_a_network_is_that_of_its_sums():
    table = describe(small("resnetfbin18"))
    both = [row for row in table.layers if row.binary_weights and row.binary_inputs]
    assert table.dab_extra == sum(row.dab_word_ops for row in both) / sum(row.xnor_word_ops for row in both)
    assert describe(small("resnetwbin18")).dab_extra is None


def test_bytes_of_the_layers_and_the_rest_add_up():
    net = small("squeezenetfbin")
    table = describe(net)
    saved = sum(row.float_bytes - row.packed_bytes for row in table.layers)
    # The first BN follows a convolution: two of four values stay. The others precede a sign: one and a bit.
    widths = [module.num_features for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    folded = 8 * widths[0] + sum(12 * width - -(-width // 8) for width in widths[1:])
    assert table.packed_bytes == table.float_bytes - saved - folded


def test_learned_levels_are_no_part_of_the_float_network():
    assert (
        describe(small("bincifarfbin", weights="dab_learned")).float_bytes
        == describe(small("bincifarfbin")).float_bytes
    )


@pytest.mark.parametrize(("size", "kernel", "stride"), [(32, 3, 1), (64, 3, 1), (65, 7, 2), (224, 7, 2)])
@pytest.mark.parametrize("name", ["resnet18", "resnetfbin18", "bireal18"])
def test_residual_networks_have_a_stem_for_small_and_one_for_large_images(name, size, kernel, stride):
    net = on_meta(name, input_size=size)
    assert (net.conv1.kernel_size[0], net.conv1.stride[0]) == (kernel, stride)
    assert hasattr(net, "pool1") == (stride == 2)


@pytest.mark.parametrize("name", ["nin", "vgg16_bncifar", "densenet", "resnet18"])
def test_the_number_of_classes_is_free(name):
    net = small(name, num_classes=7).eval()
    with torch.no_grad():
        assert net(images(net)).shape == (4, 7)


@pytest.mark.parametrize("name", ["resnethybrid18", "resnethybridv218", "resnethybridv318"])
def test_block_two_of_the_hybrids_reads_block_one(name):
    net, seen = small(name).eval(), {}
    net.stage1[0].register_forward_hook(lambda _, __, output: seen.update(first=output))
    net.stage1[1].register_forward_pre_hook(lambda _, inputs: seen.update(second=inputs[0]))
    with torch.no_grad():
        net(images(net))
    assert seen["second"] is seen["first"]


def test_the_float_twin_of_resnetwbin18_is_the_resnet18_of_torchvision():
    from torchvision.models import resnet18

    net = build("resnetwbin18", num_classes=9, in_channels=3, input_size=65, plan={}, seed=1)
    other = resnet18(num_classes=9)
    renamed = {
        name.replace("stage", "layer")
        .replace("downsample.conv", "downsample.0")
        .replace("downsample.bn", "downsample.1"): t
        for name, t in net.state_dict().items()
    }
    renamed["fc.weight"], renamed["fc.bias"] = renamed.pop("conv.weight").flatten(1), torch.zeros(9)
    other.load_state_dict(renamed)
    x = images(net, 2)
    with torch.no_grad():
        torch.testing.assert_close(net.train()(x), other.train()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", [0, 1])
def test_linear_layers_are_drawn_from_the_seed_too(seed):
    first, second = (small("vgg_small", seed=seed) for _ in range(2))
    assert torch.equal(first.fc.weight, second.fc.weight)
    assert not torch.equal(first.fc.weight, small("vgg_small", seed=seed + 1).fc.weight)
    assert first.fc.weight.abs().max() <= first.fc.in_features**-0.5
    assert first.fc.bias.abs().max() == 0


def test_depthwise_weights_are_binarized_by_themselves_but_not_centred_by_tap():
    net = small("mobilenet", bin_start=2, bin_end=27)
    assert binary_layers(net)["pair1.conv1"].code().mask.shape == (8, 1, 3, 3)
    with pytest.raises(InvalidInputError, match=r"^binarize\.center: tap"):
        small("mobilenet", bin_start=2, bin_end=27, center="tap")


def test_depthwise_signs_have_no_packed_form():
    net = small("mobilenet", plan={"binary_weights": [2], "binary_inputs": [2]})
    with pytest.raises(
        InvalidInputError, match=r"^binarize\.inputs: a layer with groups=8, .*Give that layer real inputs"
    ):
        pack(net)


@pytest.mark.parametrize(("name", "smallest"), [("googlenetfbin", 17), ("squeezenet", 21), ("alexnetwbin", 63)])
def test_the_smallest_image_is_named(name, smallest):
    with pytest.raises(InvalidInputError, match=rf"^model\.input_size: {smallest - 1} .*Use {smallest} or more"):
        small(name, input_size=smallest - 1)


def test_layers_are_named_by_number_path_or_expression():
    net = small("resnetfbin18", layers=[3, "stage2.0.conv1", "stage4[.].*"], inputs=[r"stage1\..*"])
    assert net.spec.layers == (3, 6, 16, 17, 18, 19, 20)
    assert net.spec.inputs == (2, 3, 4, 5)
    rows = describe(net).layers
    assert tuple(row.index for row in rows if row.binary_weights) == net.spec.layers
    assert tuple(row.index for row in rows if row.binary_inputs) == net.spec.inputs
    plan = small("resnetfbin18", plan={"binary_weights": ["stage1.0.conv2"], "binary_inputs": [2]})
    assert plan.spec.plan == {"binary_weights": (3,), "binary_inputs": (2,)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [2], "bin_end": 3}, r"^binarize\.layers: names the layers with binary weights already"),
        ({"layers": [2], "plan": {}}, r"^binarize\.plan: names all layers already"),
        ({"layers": ["conv22"]}, r"^binarize\.layers: 'conv22' names no layer"),
        ({"block": "birael"}, r"^model\.block: 'birael' .*Did you mean 'bireal'"),
        ({"activation": "rpelu"}, r"^model\.activation: 'rpelu' .*Did you mean 'rprelu'"),
        (
            {"name": "googlenetfbin", "block": "bireal"},
            r"^model\.block: googlenetfbin cannot take 'bireal'.*resnetfbin18",
        ),
        ({"name": "resnetwbin18", "block": "bireal"}, r"^model\.block: resnetwbin18 cannot take 'bireal'"),
        ({"name": "react18", "block": "reference"}, r"^model\.block: react18 cannot take 'reference'"),
        ({"block": "bireal", "activation": "relu"}, r"^model\.activation: a relu before a sign leaves only \+1"),
        ({"options": {"stee": "ede"}}, r"^binarize\.options: 'stee' .*Did you mean 'ste'"),
        ({"options": {"ste": "edee"}}, r"^binarize\.ste: 'edee'"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(InvalidInputError, match=message):
        small(**{"name": "bincifarfbin"} | options)


def test_a_network_without_data_does_not_import_torchs_compiler():
    """It would take 2 s and 170 MB of every `load_packed`."""
    program = (
        "import sys\n"
        "from dabnn.models import outline, skeleton\n"
        "skeleton('resnetfbin18', num_classes=10), outline('resnetfbin18', num_classes=10)\n"
        "sys.exit('torch._dynamo' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
