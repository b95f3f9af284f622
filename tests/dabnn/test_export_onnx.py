import json

import onnx
import pytest
import torch
from exported_nets import CLASSES, images, network, packed_from_file
from torch import nn

from dabnn.errors import InvalidInputError
from dabnn.export_onnx import export_onnx
from dabnn.models import build, names
from dabnn.packed import Normalization, PackedModel, pack
from dabnn.run_onnx import compare_layers, load_onnx

MODELS = {
    "both binary": {"name": "bincifarfbin"},
    "weights binary": {"name": "bincifar", "bin_start": 2, "bin_end": 7},
    "depthwise weights binary": {"name": "mobilenet", "bin_start": 2, "bin_end": 9, "width": 0.25, "input_size": 32},
    "inputs two-valued": {"name": "bincifarfbin", "bin_start": 3, "options": {"input_quantizer": "two_valued"}},
    "inputs shifted, without their weights": {
        "name": "bincifarfbin",
        "bin_start": 4,
        "options": {"input_quantizer": "rsign"},
    },
    "branches, pools that round up": {"name": "squeezenetfbin", "input_size": 48},
    "averages that reach beyond": {"name": "nin", "bin_start": 2, "bin_end": 8, "inputs": [3, 5], "input_size": 30},
    "free shortcuts": {"name": "resnet20", "input_size": 13},
    "shortcuts round each layer": {"name": "react18"},
    "float, concatenated": {"name": "densenet", "width": 0.4},
}


def all_equal(packed: PackedModel, file) -> None:
    """Compare logits and layers, on several batch sizes."""
    loaded = load_onnx(file)
    for num in (1, 5):
        x = images(num, packed.spec, seed=num)
        logits, expected = loaded(x), packed(x)
        assert torch.equal(logits.argmax(1), expected.argmax(1))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert compare_layers(packed, file, images(5, packed.spec, seed=2))[1] == {}


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
def test_the_file_gives_the_answers_of_the_packed_model_in_onnxruntime(options, tmp_path):
    packed, packed_bytes = packed_from_file(tmp_path, **options)
    num_bytes = export_onnx(packed, tmp_path / "model.onnx")
    assert num_bytes == (tmp_path / "model.onnx").stat().st_size < packed_bytes + 50_000
    all_equal(packed, tmp_path / "model.onnx")


def test_layers_with_binary_inputs_agree_bit_for_bit(tmp_path):
    packed, _ = packed_from_file(tmp_path, name="resnetfbin18")
    export_onnx(packed, tmp_path / "model.onnx")
    assert compare_layers(packed, tmp_path / "model.onnx", images(9, packed.spec)) == (0.0, {})


def test_half_precision_stays_half_in_the_file(tmp_path):
    packed, packed_bytes = packed_from_file(tmp_path, half=True, name="bincifarfbin")
    assert export_onnx(packed, tmp_path / "model.onnx") < packed_bytes + 10_000
    all_equal(packed, tmp_path / "model.onnx")


@pytest.mark.parametrize("name", names())
def test_every_model_of_the_zoo_has_a_form_in_onnx(name, tmp_path):
    size = {"sketchanet": 81, "alexnet": 67, "squeezenet": 32, "googlenet": 32, "mobilenet": 32, "vgg16": 32}
    small = next((value for family, value in size.items() if name.startswith(family)), 16)
    packed = pack(build(name, num_classes=3, input_size=small, width=0.05, seed=0))
    export_onnx(packed, tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    assert {node.domain for node in model.graph.node} == {""}
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    assert [size.dim_value for size in inferred.graph.output[0].type.tensor_type.shape.dim] == [0, 3]


def test_a_full_resnet_is_a_fraction_larger_than_its_packed_file(tmp_path):
    packed = pack(build("resnetfbin18", num_classes=250, seed=0))
    packed_bytes = packed.save(tmp_path / "model.safetensors")
    assert export_onnx(packed, tmp_path / "model.onnx") < 1.02 * packed_bytes < packed.float_bytes / 20


def test_the_bits_are_those_of_the_packed_file(tmp_path):
    packed, _ = packed_from_file(tmp_path, name="bincifarfbin")
    export_onnx(packed, tmp_path / "model.onnx")
    stored = {tensor.name: tensor for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer}
    for name, bits in packed.tensors.items():
        if name.endswith("weight_bits"):
            assert stored[name].raw_data == bits.numpy().tobytes()


def test_the_metadata_say_how_to_use_the_file(tmp_path):
    packed, _ = packed_from_file(tmp_path, name="bincifarfbin")
    export_onnx(packed, tmp_path / "model.onnx")
    found = {prop.key: prop.value for prop in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert json.loads(found["classes"]) == list(CLASSES)
    assert json.loads(found["mean"]) == [0.1, 0.2, 0.3]
    assert json.loads(found["std"]) == [0.5, 0.5, 0.5]
    assert (json.loads(found["transform"]), json.loads(found["input_size"])) == ("plain", 16)
    assert json.loads(found["layers"])["conv3"][1] == "conv3"
    loaded = load_onnx(tmp_path / "model.onnx")
    assert (loaded.spec, loaded.classes) == (packed.spec, CLASSES)
    assert loaded.normalization == Normalization((0.1, 0.2, 0.3), (0.5, 0.5, 0.5), "plain")


def test_a_layer_that_differs_is_named(tmp_path):
    packed, _ = packed_from_file(tmp_path, name="bincifarfbin")
    other = pack(network(name="bincifarfbin"))
    other.tensors["conv4.alpha"][2] *= 1.0001
    export_onnx(other, tmp_path / "model.onnx")
    largest, wrong = compare_layers(packed, tmp_path / "model.onnx", images(2, packed.spec))
    assert list(wrong) == ["conv4"]
    assert wrong["conv4"].startswith(f"conv4: the ONNX layer differs by {largest:.3g} where rounding explains ")


def test_a_layer_without_a_form_is_named(tmp_path, monkeypatch):
    packed, _ = packed_from_file(tmp_path, name="bincifar")
    from dabnn import export_onnx as module

    rules = tuple(rule for rule in module._RULES if rule[0] is not nn.ReLU)
    monkeypatch.setattr(module, "_RULES", rules)
    with pytest.raises(InvalidInputError, match=r"^relu1: ReLU has no form in ONNX here\."):
        export_onnx(packed, tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize("content", [b"", b"no model" * 100, None])
def test_what_is_no_onnx_file_is_refused(content, tmp_path):
    file = tmp_path / "x.onnx"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InvalidInputError, match=rf"^{file}: (is no whole ONNX model|cannot be read)"):
        load_onnx(file)


def test_an_onnx_file_of_another_program_is_refused(tmp_path):
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [value], [out])
    file = tmp_path / "x.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8), file)
    with pytest.raises(InvalidInputError, match=rf"^{file}: says nothing of a dab network"):
        load_onnx(file)


def test_images_of_another_size_are_refused(tmp_path):
    packed, _ = packed_from_file(tmp_path, name="bincifarfbin")
    export_onnx(packed, tmp_path / "model.onnx")
    with pytest.raises(InvalidInputError, match=r"^images: shape \(1, 3, 8, 8\) does not fit"):
        load_onnx(tmp_path / "model.onnx")(torch.zeros(1, 3, 8, 8))
