import json
import resource
from dataclasses import asdict

import numpy as np
import pytest
import torch
from packed_form import channels_last_logits
from safetensors import safe_open
from safetensors.torch import save_file

from dabnn import packed_file
from dabnn.errors import DabError, InvalidInputError
from dabnn.models import build
from dabnn.packed import Normalization, PackedConv2d, Provenance, load_packed, pack

SMALL = {"num_classes": 7, "width": 0.125, "in_channels": 3, "input_size": 16}
MODELS = {
    "both binary": {"name": "bincifarfbin"},
    "weights binary": {"name": "bincifar", "bin_start": 2, "bin_end": 7},
    "some inputs binary": {"name": "bincifarfbin", "inputs": [3, 5]},
    "an input binary without its weights": {"name": "bincifarfbin", "bin_start": 3},
    "xnor": {"name": "bincifarfbin", "weights": "xnor"},
    "sign": {"name": "bincifarfbin", "weights": "sign"},
    "not centred": {"name": "bincifarfbin", "center": "none"},
    "nothing binary": {"name": "bincifar"},
}


def network(**options):
    """A small network whose batch statistics have seen images, in evaluation mode."""
    net = build(**{**SMALL, "seed": 3, **options})
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for _ in range(3):
            net(images(8, net.spec))
    return net.eval()


def images(num, spec, seed=0):
    shape = (num, spec.in_channels, spec.input_size, spec.input_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.dab"
    pack(network(name="bincifarfbin")).save(path)
    return path


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_the_loaded_file_gives_the_logits_of_the_network_bit_for_bit(options, tmp_path):
    net = network(**options)
    pack(net).save(tmp_path / "model.dab")
    packed = load_packed(tmp_path / "model.dab", weights="dense")
    x = images(5, net.spec, seed=1)
    with torch.no_grad():
        assert torch.equal(packed(x), channels_last_logits(net, x))
    assert packed.spec == net.spec


def test_only_layers_with_binary_inputs_run_on_bits():
    packed = pack(network(name="bincifarfbin", inputs=[3, 5]))
    paths = [path for path, module in packed.net.named_modules() if isinstance(module, PackedConv2d)]
    assert paths == ["conv3", "conv5"]


def test_bits_lie_filter_row_column_channel_with_the_lowest_first(saved):
    net = network(name="bincifarfbin")
    with safe_open(saved, "np") as file:
        stored = file.get_tensor("conv3.weight_bits")
    mask = net.conv3.code().mask
    for filter_index, row, column, channel in [(0, 0, 0, 0), (0, 0, 1, 5), (1, 2, 0, 3), (31, 2, 2, 15)]:
        position = ((filter_index * 3 + row) * 3 + column) * mask.shape[1] + channel
        assert bool(stored[position // 8] >> (position % 8) & 1) == bool(mask[filter_index, channel, row, column])
    assert stored.shape == (-(-mask.numel() // 8),)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 5, 1, 1), (2, 33, 3, 3), (7, 3, 2, 5)])
def test_decoding_a_mask_inverts_encoding(shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(packed_file.decode_mask(packed_file.encode_mask(mask), mask.shape), mask)


def test_the_header_says_what_the_bits_mean(saved):
    with safe_open(saved, "np") as file:
        metadata = file.metadata()
        names_in_file = list(file.keys())
    assert metadata["format"] == "dab-packed"
    assert metadata["version"] == "2"
    assert metadata["bit_order"].startswith("least significant")
    assert metadata["layout"].startswith("F,kh,kw,C")
    assert metadata["padding"].startswith("zeros")
    assert json.loads(metadata["spec"])["name"] == "bincifarfbin"
    assert not any("num_batches_tracked" in name for name in names_in_file)


def test_classes_and_normalization_come_back(tmp_path):
    normalization = Normalization((0.5, 0.4, 0.3), (0.2, 0.2, 0.1))
    classes = [f"class {index}" for index in range(7)]
    packed = pack(network(name="bincifarfbin"), classes=classes, normalization=normalization)
    packed.save(tmp_path / "model.dab")
    loaded = load_packed(tmp_path / "model.dab")
    assert loaded.classes == tuple(classes)
    assert loaded.normalization == normalization


def test_half_precision_rounds_the_scalars_and_keeps_the_bits(tmp_path):
    packed = pack(network(name="bincifarfbin"))
    full_bytes = packed.save(tmp_path / "full.dab")
    assert packed.save(tmp_path / "half.dab", half=True) < full_bytes
    loaded = load_packed(tmp_path / "half.dab")
    assert loaded.is_half
    assert not packed.is_half
    for name, tensor in packed.tensors.items():
        expected = tensor.half() if tensor.is_floating_point() else tensor
        assert torch.equal(loaded.tensors[name], expected)
    assert loaded(images(2, loaded.spec)).dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"block": "bireal"}, {"inputs": [3, 5]}], ids=["reference", "bireal", "few"])
def test_rounding_that_keeps_signs_rounds_the_last_sign_layer_and_what_follows(options, tmp_path):
    packed = pack(network(name="bincifarfbin", **options))
    packed.save(tmp_path / "all.dab", half=True)
    packed.save(tmp_path / "head.dab", half=True, keep_signs=True)
    loaded = load_packed(tmp_path / "head.dab")
    assert (packed.rounded, load_packed(tmp_path / "all.dab").rounded, loaded.rounded) == ("none", "all", "head")
    layers = {name.partition(".")[0] for name, tensor in loaded.tensors.items() if tensor.dtype == torch.float16}
    last = max(options.get("inputs", [7]))
    expected = {f"conv{number}" for number in range(last, 9)} | {f"bn{number}" for number in range(last + 1, 8)}
    assert layers == expected | ({"bn7"} if "block" in options else set())
    paths = [path for path, module in packed.net.named_modules() if isinstance(module, PackedConv2d)]
    signs = [[], []]
    for kept, model in zip(signs, (packed, loaded), strict=True):
        for path in paths:
            model.net.get_submodule(path).register_forward_pre_hook(lambda _, x, kept=kept: kept.append(x[0] >= 0))
        model.net(images(4, packed.spec))
    assert all(torch.equal(own, other) for own, other in zip(*signs, strict=True))


@pytest.mark.parametrize("slope", [1e-9, -1e-9])
@pytest.mark.parametrize("shift", [1.0, -1.0])
def test_a_nearly_dead_channel_is_always_or_never_positive_in_half_precision(slope, shift, tmp_path):
    net = network(name="bincifarfbin")
    with torch.no_grad():
        net.bn4.weight[0], net.bn4.bias[0] = slope, shift  # its sign turns at about 1e9
    packed = pack(net)
    packed.save(tmp_path / "half.dab", half=True)
    loaded = load_packed(tmp_path / "half.dab")
    assert packed.tensors["bn4.threshold"][0].abs() > 65504
    assert loaded.tensors["bn4.threshold"][0].isinf()
    x = torch.randn(2, len(net.bn4.weight), 4, 4)
    with torch.no_grad():
        assert torch.equal(loaded.net.bn4(x)[:, 0], net.bn4(x)[:, 0].sign())


def test_values_beyond_float16_are_refused(tmp_path):
    net = network(name="bincifarfbin")
    with torch.no_grad():
        net.conv8.bias[0] = 1e6
    with pytest.raises(InvalidInputError, match=r"half: conv8\.bias reaches 1e\+06"):
        pack(net).save(tmp_path / "model.dab", half=True)
    assert list(tmp_path.iterdir()) == []


def test_packing_leaves_the_network_alone():
    net = network(name="bincifarfbin").train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    packed = pack(net)
    packed.net.bn1.weight.fill_(9.0)
    assert net.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_loading_leaves_the_random_numbers_alone(saved):
    before = torch.random.get_rng_state()
    load_packed(saved)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_packed_model_asks_for_no_gradients(saved):
    packed = load_packed(saved)
    assert not packed(images(1, packed.spec)).requires_grad
    assert not any(parameter.requires_grad for parameter in packed.net.parameters())


def test_every_damaged_byte_is_found(saved):
    data = saved.read_bytes()
    header_end = 8 + int.from_bytes(data[:8], "little")
    positions = [0, 4, 8, 40, header_end - 2, *np.linspace(header_end, len(data) - 1, 20, dtype=int)]
    for position in positions:
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        saved.write_bytes(damaged)
        with pytest.raises(InvalidInputError, match=str(saved)):
            load_packed(saved)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_a_truncated_file_is_refused(saved, share):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(share * len(data))])
    with pytest.raises(InvalidInputError, match="is no whole safetensors file"):
        load_packed(saved)


def test_files_of_another_kind_are_refused(tmp_path):
    with pytest.raises(InvalidInputError, match="cannot be read"):
        load_packed(tmp_path / "missing.dab")
    with pytest.raises(InvalidInputError, match="cannot be read"):
        load_packed(tmp_path)
    (tmp_path / "text").write_text("These are not the bits that you are looking for.")
    with pytest.raises(InvalidInputError, match="is no whole safetensors file"):
        load_packed(tmp_path / "text")
    save_file({"x": torch.ones(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(InvalidInputError, match="not a packed model"):
        load_packed(tmp_path / "foreign.safetensors")


def test_a_newer_version_is_refused(saved, monkeypatch):
    content = packed_file.read(saved)
    monkeypatch.setattr(packed_file, "VERSION", 3)
    packed_file.write(saved, content)
    monkeypatch.undo()
    with pytest.raises(InvalidInputError, match="format version '3', and this dab reads versions 1 to 2"):
        load_packed(saved)


def test_another_bit_order_is_refused(saved, monkeypatch):
    content = packed_file.read(saved)
    monkeypatch.setitem(packed_file.MEANING, "bit_order", "most significant bit first")
    packed_file.write(saved, content)
    monkeypatch.undo()
    with pytest.raises(InvalidInputError, match="bit_order is 'most significant"):
        load_packed(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "perceptron"}, "cannot be built by this dab"),
        ({"colour": "red"}, "cannot be built by this dab"),
        ({"num_classes": 8}, "conv8.bias is"),
        ({"bin_start": 3}, "conv2.alpha is"),
    ],
)
def test_a_file_whose_network_is_another_is_refused(saved, change, message):
    content = packed_file.read(saved)
    packed_file.write(saved, packed_file.Content(content.spec | change, content.extras, content.tensors))
    with pytest.raises(InvalidInputError, match=message):
        load_packed(saved)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(saved):
    before = saved.read_bytes()
    packed = load_packed(saved)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(DabError, match=r"bytes could not be written .* nothing was left behind"):
            packed.save(saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_missing_folder_is_named(saved, tmp_path):
    with pytest.raises(InvalidInputError, match=r"nowhere does not exist"):
        load_packed(saved).save(tmp_path / "nowhere" / "model.dab")


def test_networks_that_cannot_be_rebuilt_are_refused():
    with pytest.raises(InvalidInputError, match=r"net: Linear carries no model\.spec"):
        pack(torch.nn.Linear(2, 2))
    net = network(name="bincifarfbin")
    net.set_submodule("conv8", torch.nn.Conv2d(4, 4, 1))
    with pytest.raises(InvalidInputError, match=r"^net: conv8 is Conv2d\(4, 4, .*\), and the bincifarfbin of its spec"):
        pack(net)


@pytest.mark.parametrize(
    ("path", "layer", "shown"),
    [
        ("relu2", torch.nn.GELU(), r"relu2 is GELU\(.*has ReLU there"),
        ("pool4", torch.nn.MaxPool2d(2, stride=1), r"pool4 is MaxPool2d\(kernel_size=2, stride=1"),
        ("bn3", torch.nn.BatchNorm2d(16, eps=0.1), r"bn3 is BatchNorm\(16, eps=0\.1, .*has BatchNorm\(16, eps=1e-05"),
        ("bn3", torch.nn.Identity(), r"bn3 is Identity\(\)"),
        ("conv8", torch.nn.Sequential(torch.nn.Conv2d(4, 7, 1)), r"conv8 is Sequential\(\)"),
    ],
)
def test_layers_put_in_by_hand_are_named(path, layer, shown):
    net = network(name="bincifarfbin")
    net.set_submodule(path, layer)
    with pytest.raises(InvalidInputError, match=rf"^net: {shown}.*Take the change back before packing, or"):
        pack(net)


def test_a_layer_that_was_added_is_named():
    net = network(name="bincifarfbin")
    net.add_module("softmax", torch.nn.Softmax(1))
    with pytest.raises(InvalidInputError, match=r"^net: softmax is Softmax\(dim=1\), .* has no layer there"):
        pack(net)


def test_what_changes_no_result_may_differ():
    net = network(name="bincifarfbin")
    net.relu2.inplace, net.dropout4.p, net.bn2.momentum = True, 0.9, 0.5
    x = images(2, net.spec)
    with torch.no_grad():
        assert torch.equal(pack(net)(x), channels_last_logits(net, x))


def test_a_network_in_another_type_is_packed_in_float32():
    packed = pack(network(name="bincifarfbin").double())
    assert {tensor.dtype for tensor in packed.tensors.values()} == {torch.float32, torch.uint8}


def test_the_same_model_makes_the_same_bytes(saved, tmp_path):
    load_packed(saved).save(tmp_path / "again.dab")
    assert (tmp_path / "again.dab").read_bytes() == saved.read_bytes()


def test_run_program_and_data_come_back(tmp_path):
    provenance = Provenance("ab12", "0f0f", "c0ffee", "0.1.0")
    pack(network(name="bincifarfbin"), provenance=provenance).save(tmp_path / "model.dab")
    assert load_packed(tmp_path / "model.dab").provenance == provenance
    content = packed_file.read(tmp_path / "model.dab")
    later = content.extras | {"provenance": {"run_id": "ab12", "weather": "fair"}, "mood": 3}
    packed_file.write(tmp_path / "later.dab", packed_file.Content(content.spec, later, content.tensors))
    assert load_packed(tmp_path / "later.dab").provenance == Provenance(run_id="ab12")


def test_a_file_without_provenance_is_read(saved):
    content = packed_file.read(saved)
    extras = {key: content.extras[key] for key in ("classes", "normalization")}
    packed_file.write(saved, packed_file.Content(content.spec, extras, content.tensors))
    assert load_packed(saved).provenance == Provenance()


def test_there_is_one_class_name_a_logit():
    with pytest.raises(InvalidInputError, match="classes: 2 names for 7 logits"):
        pack(network(name="bincifarfbin"), classes=["cat", "dog"])


def test_the_spec_in_the_file_builds_the_same_architecture(saved):
    packed = load_packed(saved)
    assert build(**asdict(packed.spec)).spec == network(name="bincifarfbin").spec
