"""Programs and ONNX files that lie: nothing in them runs, and each is refused by name."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_nets import images, packed_from_file

from dabnn.errors import InvalidInputError
from dabnn.export_program import export_program, load_program
from dabnn.packed import PackedModel

Entries = dict[str, bytes]
MODEL, WEIGHTS = "archive/models/model.json", "archive/data/weights/model_weights_config.json"
CONSTANTS, ABOUT = "archive/data/constants/model_constants_config.json", "archive/extra/dab.json"


class Mark:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return open, (str(self.path), "w")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PackedModel:
    return packed_from_file(tmp_path_factory.mktemp("packed"), name="bincifarfbin")[0]


@pytest.fixture(scope="module")
def program(packed: PackedModel, tmp_path_factory: pytest.TempPathFactory) -> Entries:
    """The entries of an honest program."""
    file = tmp_path_factory.mktemp("program") / "model.pt2"
    export_program(packed, file)
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A file that an attack makes."""
    return tmp_path / "marker"


def written(folder: Path, entries: Entries, kind: int = zipfile.ZIP_STORED) -> Path:
    path = folder / "model.pt2"
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def edited(entries: Entries, name: str, edit: Callable[[Any], None]) -> Entries:
    content = json.loads(entries[name])
    edit(content)
    return entries | {name: json.dumps(content).encode()}


def pickled(marker: Path) -> bytes:
    data = io.BytesIO()
    torch.save(Mark(marker), data)
    return data.getvalue()


def of_graph(entries: Entries, edit: Callable[[dict[str, Any]], None]) -> Entries:
    return edited(entries, MODEL, lambda model: edit(model["graph_module"]["graph"]))


def weight_as_pickle(entries: Entries, marker: Path) -> Entries:
    def edit(config: dict[str, Any]) -> None:
        next(iter(config["config"].values()))["use_pickle"] = True

    return edited(entries, WEIGHTS, edit) | {"archive/data/weights/weight_0": pickled(marker)}


def weights_of_long_ago(entries: Entries, marker: Path) -> Entries:
    return entries | {"archive/data/weights/model.pt": pickled(marker)}


def inputs_as_pickle(entries: Entries, marker: Path) -> Entries:
    return entries | {"archive/data/sample_inputs/model.pt": pickled(marker)}


def constant_as_pickle(entries: Entries, marker: Path) -> Entries:
    config = {
        "config": {"x": {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}}
    }
    payload = {"archive/data/constants/opaque_obj_0": pickle.dumps(Mark(marker))}
    return entries | {CONSTANTS: json.dumps(config).encode()} | payload


def function_as_operator(entries: Entries, marker: Path) -> Entries:
    def edit(graph: dict[str, Any]) -> None:
        argument = {"name": "", "arg": {"as_string": f"touch {marker}"}, "kind": 1}
        node = {"target": "torch.os.system", "inputs": [argument], "outputs": [], "metadata": {}, "name": "attack"}
        graph["nodes"].insert(0, node)

    return of_graph(entries, edit)


def size_as_code(entries: Entries, marker: Path) -> Entries:
    def edit(graph: dict[str, Any]) -> None:
        code = f"open({str(marker)!r}, 'w').close() or 1"
        graph["tensor_values"]["images"]["sizes"][0]["as_expr"]["expr_str"] = code

    return of_graph(entries, edit)


def argument_as_code(entries: Entries, marker: Path) -> Entries:
    def edit(model: dict[str, Any]) -> None:
        signature = model["graph_module"]["module_call_graph"][0]["signature"]
        signature["forward_arg_names"] = [f"images=open({str(marker)!r}, 'w')"]

    return edited(entries, MODEL, edit)


def file_of_torch(entries: Entries, marker: Path) -> Entries:
    def edit(graph: dict[str, Any]) -> None:
        arguments = {"filename": {"as_string": str(marker)}, "shared": {"as_bool": True}, "size": {"as_int": 4}}
        node = {
            "target": "torch.ops.aten.from_file.default",
            "inputs": [{"name": name, "arg": value, "kind": 1} for name, value in arguments.items()],
            "outputs": [{"as_tensor": {"name": "linear_9"}}],
            "metadata": {},
            "name": "linear_9",
        }
        graph["nodes"].append(node)
        graph["tensor_values"]["linear_9"] = graph["tensor_values"]["images"]

    return of_graph(entries, edit)


ATTACKS = (
    weight_as_pickle,
    weights_of_long_ago,
    inputs_as_pickle,
    constant_as_pickle,
    function_as_operator,
    size_as_code,
    argument_as_code,
    file_of_torch,
)


@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_in_a_program_runs(
    attack: Callable[[Entries, Path], Entries], program: Entries, packed: PackedModel, marker: Path, tmp_path: Path
) -> None:
    file = written(tmp_path, attack(program, marker))
    with pytest.raises(InvalidInputError, match=rf"^{file}: .*[Ee]xport") as refused:
        load_program(file)(images(2, packed.spec))
    assert not marker.exists()
    assert len(str(refused.value)) < 600


def test_guards_and_notes_of_a_program_are_not_read(
    program: Entries, packed: PackedModel, marker: Path, tmp_path: Path
) -> None:
    def edit(model: dict[str, Any]) -> None:
        model["guards_code"] = [f"open({str(marker)!r}, 'w')"]
        model["graph_module"]["graph"]["nodes"][0]["metadata"] = {"source_fn_stack": "x,torch.os.system"}

    x = images(2, packed.spec)
    assert torch.equal(load_program(written(tmp_path, edited(program, MODEL, edit)))(x), packed(x))
    assert not marker.exists()


def without(entries: Entries, name: str) -> Entries:
    return {each: data for each, data in entries.items() if each != name}


NO_PROGRAMS: dict[str, tuple[Callable[[Entries], Entries], str]] = {
    "no dab.json": (lambda e: without(e, ABOUT), r"it holds no dab\.json"),
    "a number": (lambda e: e | {ABOUT: b"3"}, r"its dab\.json is no JSON object of texts"),
    "numbers": (lambda e: e | {ABOUT: b'{"format": 3}'}, r"its dab\.json is no JSON object of texts"),
    "brackets": (lambda e: e | {MODEL: b"[" * 200_000}, r"its model\.json is no JSON"),
    "a list": (lambda e: e | {MODEL: b"[]"}, r"its model\.json is no JSON object"),
    "no graph": (lambda e: e | {MODEL: b"{}"}, "torch .* cannot read this program"),
    "more": (lambda e: e | {"archive/data/aotinductor/model/x.so": b"x"}, r"holds data/aotinductor/model/x\.so, which"),
    "two folders": (lambda e: e | {"other/byteorder": b"big"}, "two folders"),
    "no weights": (lambda e: without(e, WEIGHTS), r"holds no data/weights/model_weights_config\.json"),
    "half a weight": (lambda e: e | {"archive/data/weights/weight_0": b"abc"}, "weight_0 takes 3 bytes"),
    "no weight": (lambda e: without(e, "archive/data/weights/weight_0"), "weight_0 takes 0 bytes"),
}


@pytest.mark.parametrize("kind", NO_PROGRAMS)
def test_an_archive_that_is_no_program_of_ours_is_refused(kind: str, program: Entries, tmp_path: Path) -> None:
    change, message = NO_PROGRAMS[kind]
    file = written(tmp_path, change(program))
    with pytest.raises(InvalidInputError, match=rf"^{file}: .*{message}"):
        load_program(file)


def test_an_archive_that_is_packed_in_another_way_is_refused(program: Entries, tmp_path: Path) -> None:
    file = written(tmp_path, program, zipfile.ZIP_LZMA)
    with pytest.raises(InvalidInputError, match=rf"^{file}: .* packed in a way"):
        load_program(file)
    file = written(tmp_path, program)
    data = bytearray(file.read_bytes())
    place = data.rindex(b"PK\x01\x02")
    data[place + 8] |= 1  # encrypted, says the list of contents
    file.write_bytes(data)
    with pytest.raises(InvalidInputError, match=rf"^{file}: .* packed in a way"):
        load_program(file)
