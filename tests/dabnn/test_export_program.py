import zipfile

import pytest
import torch
from exported_nets import CLASSES, images, packed_from_file

from dabnn.errors import InvalidInputError
from dabnn.export_program import export_program, load_program, wrong_constants

MODELS = {
    "both binary": {"name": "bincifarfbin"},
    "weights binary": {"name": "bincifar", "bin_start": 2, "bin_end": 7},
    "inputs two-valued": {"name": "bincifarfbin", "bin_start": 3, "options": {"input_quantizer": "two_valued"}},
}


@pytest.mark.parametrize(("model", "half"), [*((model, False) for model in MODELS), ("weights binary", True)])
def test_the_program_gives_the_logits_of_the_packed_model_bit_for_bit(model, half, tmp_path):
    packed, packed_bytes = packed_from_file(tmp_path, half=half, **MODELS[model])
    file = tmp_path / "model.pt2"
    assert export_program(packed, file) == file.stat().st_size < packed_bytes + 60_000
    program = load_program(file)
    for num in (1, 2, 5):
        x = images(num, packed.spec, seed=num)
        assert torch.equal(program(x), packed(x))
        assert torch.equal(program(x.to(memory_format=torch.channels_last)), packed(x))
    assert wrong_constants(packed, file) == []
    assert (program.spec, program.classes, program.normalization) == (packed.spec, CLASSES, packed.normalization)


def test_the_program_needs_operators_of_torch_and_of_kernels_only_and_names_no_folder(tmp_path):
    packed, _ = packed_from_file(tmp_path, name="bincifarfbin")
    export_program(packed, tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert {target.namespace for target in called} == {"aten", "dab"}
    assert sum(target.namespace == "dab" for target in called) >= 6
    with zipfile.ZipFile(tmp_path / "model.pt2") as archive:
        assert all(b".py" not in archive.read(name) for name in archive.namelist())


def test_constants_that_differ_are_named(tmp_path):
    packed, _ = packed_from_file(tmp_path, name="bincifarfbin")
    export_program(packed, tmp_path / "model.pt2")
    other, _ = packed_from_file(tmp_path, name="bincifarfbin", seed=4)
    assert "net.conv4.weight_bits" in wrong_constants(other, tmp_path / "model.pt2")


@pytest.mark.parametrize("damage", ["cut off", "a bit", "something else", "missing"])
def test_a_damaged_program_is_refused(damage, tmp_path):
    file = tmp_path / "model.pt2"
    if damage in ("cut off", "a bit"):
        packed, _ = packed_from_file(tmp_path, name="bincifarfbin")
        export_program(packed, file)
        data = bytearray(file.read_bytes())
        data[len(data) // 3] ^= 1
        file.write_bytes(data if damage == "a bit" else data[:5000])
    elif damage == "something else":
        file.write_bytes(b"no program" * 100)
    with pytest.raises(InvalidInputError, match=rf"^{file}: "):
        load_program(file)
