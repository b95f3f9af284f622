"""Programs and ONNX files that lie: nothing in them runs, and each is refused by name."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from exported_nets import images, packed_from_file

from dabnn.convert import load_model
from dabnn.errors import InvalidInputError
from dabnn.export_onnx import export_onnx
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


@pytest.fixture(scope="module")
def honest_onnx(packed: PackedModel, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    file = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_onnx(packed, file)
    return file.read_bytes()


def saying(folder: Path, form: str, entries: Entries, data: bytes, changes: dict[str, str | None]) -> Path:
    """A file with other metadata; None takes a value out."""
    if form == "pt2":
        about = json.loads(entries[ABOUT]) | changes
        told = {name: text for name, text in about.items() if text is not None}
        return written(folder, entries | {ABOUT: json.dumps(told).encode()})
    model = onnx.load_from_string(data)
    about = {prop.key: prop.value for prop in model.metadata_props} | changes
    del model.metadata_props[:]
    for name, text in about.items():
        if text is not None:
            model.metadata_props.add(key=name, value=text)
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


LIES: dict[str, tuple[dict[str, str | None], str]] = {
    "no std": ({"std": None}, "its normalization is {.*, where dab writes mean, std"),
    "one mean": (
        {"mean": "[0.5]"},
        r"its normalization\.mean is \[0\.5\], where dab writes numbers, one a channel of 3",
    ),
    "no mean": ({"mean": '"x"'}, r"its normalization\.mean is 'x'"),
    "two classes": ({"classes": '["a", "b"]'}, r"its classes is \['a', 'b'\], where dab writes 7 names"),
    "numbers": ({"classes": "[1, 2, 3, 4, 5, 6, 7]"}, "its classes is"),
    "cut off": ({"classes": '["a'}, "its classes is no JSON"),
    "provenance": ({"provenance": "[1]"}, r"its provenance is \[1\], where dab writes names with texts"),
    "a number": ({"spec": "3"}, "its network cannot be built"),
    "another": ({"spec": '{"name": "none", "num_classes": 3}'}, "its network cannot be built"),
    "format": ({"format": "x"}, "says nothing of a dab network"),
}


@pytest.mark.parametrize("form", ["onnx", "pt2"])
@pytest.mark.parametrize("lie", LIES)
def test_what_a_file_says_of_itself_is_held_against_its_network(
    lie: str, form: str, program: Entries, honest_onnx: bytes, tmp_path: Path
) -> None:
    changes, message = LIES[lie]
    file = saying(tmp_path, form, program, honest_onnx, changes)
    with pytest.raises(InvalidInputError, match=rf"^{file}: {message}"):
        load_model(file)


@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_a_network_that_is_not_the_one_it_is_said_to_be_is_refused_when_it_runs(
    form: str, program: Entries, honest_onnx: bytes, packed: PackedModel, tmp_path: Path
) -> None:
    spec = {"name": "bincifarfbin", "num_classes": 3, "in_channels": 3, "input_size": 32, "width": 0.125}
    changes: dict[str, str | None] = {"spec": json.dumps(spec), "classes": None}
    model = load_model(saying(tmp_path, form, program, honest_onnx, changes))
    with pytest.raises(InvalidInputError, match=r"^\S*: its network (cannot be run|gives)"):
        model(torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize("form", ["onnx", "pt2"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), r"images: torch\.uint8, .* Normalize bytes first"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.bfloat16), r"images: torch\.bfloat16"),
        (torch.zeros(1, 3, 8, 8), "images: shape"),
        (None, "images: a NoneType"),
    ],
)
def test_images_of_another_kind_are_refused_as_by_a_packed_model(
    form: str, wrong: Any, message: str, program: Entries, honest_onnx: bytes, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInputError, match=rf"^{message}"):
        load_model(saying(tmp_path, form, program, honest_onnx, {}))(wrong)


@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_autocast_and_gradients_do_not_reach_into_a_file(
    form: str, program: Entries, honest_onnx: bytes, packed: PackedModel, tmp_path: Path
) -> None:
    model = load_model(saying(tmp_path, form, program, honest_onnx, {}))
    x = images(2, packed.spec)
    expected = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x.clone().requires_grad_()), expected)


def test_an_onnx_model_that_onnxruntime_does_not_run_is_refused(honest_onnx: bytes, tmp_path: Path) -> None:
    model = onnx.load_from_string(honest_onnx)
    model.graph.node[0].op_type = "StringSplit" if model.graph.node[0].op_type != "StringSplit" else "Relu"
    file = tmp_path / "model.onnx"
    onnx.save(model, file)
    with pytest.raises(InvalidInputError, match=rf"^{file}: is no whole ONNX model, or none that onnxruntime"):
        load_model(file)
