"""Packed files that are damaged, or lie: each is refused by name, and none makes the reader use more than it holds."""

import copy
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from dabnn import packed_file
from dabnn.errors import InvalidInputError
from dabnn.models import build
from dabnn.packed import PackedModel, load_packed, pack
from dabnn.packed_file import Content

ROOT = Path(__file__).parents[2]


def small_model() -> PackedModel:
    net = build("bincifarfbin", num_classes=3, width=0.0625, in_channels=1, input_size=16, seed=3)
    return pack(net.eval(), classes=("a", "b", "c"))


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("honest") / "model.dab"
    small_model().save(path)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.dab"


def loaded_or_refused(path: Path) -> PackedModel | None:
    """The model, or None where the file is refused as it should be; any other error passes."""
    try:
        return load_packed(path)
    except InvalidInputError as error:
        if not str(error).startswith(f"{path}: "):
            raise AssertionError(str(error)) from error
    return None


def raw(header: dict[str, object] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def metadata(spec: str = "{}", extras: str = "{}") -> dict[str, str]:
    return {"format": "dab-packed", "version": "2", **packed_file.MEANING, "spec": spec, "extras": extras}


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
RAW = {
    "empty": (b"", "it has 0 bytes, and the length of a header alone takes 8"),
    "shorter than a length": (b"abc", "it has 3 bytes, and the length of a header alone takes 8"),
    "a long header": (raw(b"{}", length=2**62), "its header is said to take 4,611,686,018,427,387,904 bytes"),
    "a header beyond the end": (raw(b"{}", length=99), "99 bytes, of 2 bytes"),
    "no JSON": (raw(b"{" * 50), "its header is no JSON"),
    "a bomb of brackets": (raw(b'{"a":' + b"[" * 200_000), "its header is no JSON"),
    "a number of many digits": (raw(b'{"a":' + b"9" * 9000 + b"}"), "its header is no JSON"),
    "no object": (raw(b"[1, 2]"), "its header is no JSON object"),
    "no texts": (raw({"__metadata__": {"format": 3}}), "its metadata are no texts"),
    "metadata of another kind": (raw({"__metadata__": [1]}), "its metadata are no texts"),
    "no entry": (raw({"__metadata__": metadata(), "x": 3}), "x has no type, shape and place"),
    "a negative size": (raw({"__metadata__": metadata(), "x": ENTRY | {"shape": [-1]}}), "x are no sizes"),
    "sizes as texts": (raw({"__metadata__": metadata(), "x": ENTRY | {"shape": ["1"]}}), "x are no sizes"),
    "a size of many bits": (raw({"__metadata__": metadata(), "x": ENTRY | {"shape": [2**70]}}), "x are no sizes"),
    "many dimensions": (raw({"__metadata__": metadata(), "x": ENTRY | {"shape": [1] * 9}}), "x has 9 dimensions"),
    "one place": (raw({"__metadata__": metadata(), "x": ENTRY | {"data_offsets": [4]}}), "x has 1 dim"),
    "more than there is": (
        raw({"__metadata__": metadata(), "x": ENTRY | {"shape": [2**40]}}, bytes(4)),
        r"x takes 4,398,046,511,104 bytes, and has 4",
    ),
    "a place beyond the end": (
        raw({"__metadata__": metadata(), "x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        "names 4,398,046,511,104 bytes of tensors, and 0 follow",
    ),
    "another type": (raw({"__metadata__": metadata(), "x": ENTRY | {"dtype": "I64"}}), "x is of type I64"),
    "a spec of another kind": (raw({"__metadata__": metadata("[]")}), "its spec is no JSON object"),
    "a bomb in the spec": (raw({"__metadata__": metadata("[" * 100_000)}), "its spec is no JSON"),
    "no extras": (raw({"__metadata__": metadata(extras="3")}), "its extras is no JSON object"),
    "nothing in it": (raw({"__metadata__": metadata()}), "its network cannot be built"),
}


@pytest.mark.parametrize(("data", "message"), RAW.values(), ids=RAW.keys())
def test_a_container_that_is_not_one_is_refused(data: bytes, message: str, path: Path) -> None:
    path.write_bytes(data)
    with pytest.raises(InvalidInputError, match=rf"^{path}: .*{message}"):
        load_packed(path)


SPECS: dict[str, tuple[dict[str, object], str]] = {
    "a wide network": ({"width": 1e9}, "cannot be built|asks for"),
    "a network without end": ({"width": 1e300}, "cannot be built"),
    "a width that is none": ({"width": float("nan")}, "spec.width is nan, where dab writes a number"),
    "a width as text": ({"width": "1"}, "spec.width is '1'"),
    "many classes": ({"num_classes": 10**12}, "its classes is|asks for"),
    "classes beyond 64 bits": ({"num_classes": 2**70}, "cannot be built"),
    "classes as a truth": ({"num_classes": True}, "spec.num_classes is True, where dab writes a whole number"),
    "a large image": ({"input_size": 8 * 10**9}, "cannot be built|asks for"),
    "many channels": ({"in_channels": 10**15}, "cannot be built|asks for"),
    "another model": ({"name": "alexnetfbin"}, "cannot be built|asks for"),
    "a name of another kind": ({"name": ["bincifarfbin"]}, "spec.name is"),
    "layers as expressions": ({"inputs": ["((a|a)*)*b"]}, "spec.inputs is"),
    "layers that are not there": ({"inputs": [2, 99]}, "cannot be built"),
    "a plan of another kind": ({"plan": [1]}, "spec.plan is"),
    "an unknown set": ({"bin_start": None, "bin_end": None, "plan": {"colour": [1]}}, "cannot be built"),
    "options of another kind": ({"options": {"ste": []}}, "spec.options is"),
    "an unknown option": ({"options": {"colour": "red"}}, "cannot be built"),
    "an unknown argument": ({"seed": 3, "device": "cuda"}, "cannot be built"),
    "an unknown quantizer": ({"weights": "ternary"}, "cannot be built"),
}


@pytest.mark.parametrize(("change", "message"), SPECS.values(), ids=SPECS.keys())
def test_a_specification_that_lies_is_refused(
    change: dict[str, object], message: str, honest: Path, path: Path
) -> None:
    content = packed_file.read(honest)
    packed_file.write(path, Content(content.spec | change, content.extras, content.tensors))
    with pytest.raises(InvalidInputError, match=rf"^{path}: .*({message})"):
        load_packed(path)


EXTRAS: dict[str, tuple[dict[str, object], str]] = {
    "fewer classes": ({"classes": ["a", "b"]}, "its classes is .* where dab writes 3 names"),
    "classes of another kind": ({"classes": [1, 2, 3]}, "its classes is"),
    "a text as classes": ({"classes": "abc"}, "its classes is 'abc'"),
    "a list as normalisation": ({"normalization": [1]}, "its normalization is"),
    "half a normalisation": ({"normalization": {"mean": [0.5]}}, "its normalization is"),
    "more of one": ({"normalization": {"mean": [0], "std": [1], "median": [0]}}, "its normalization is"),
    "too many channels": ({"normalization": {"mean": [0.5, 1], "std": [1.0]}}, "normalization.mean is .* channel of 1"),
    "a deviation of zero": ({"normalization": {"mean": [0.5], "std": [0]}}, "normalization.std is .* positive"),
    "a transform of another kind": (
        {"normalization": {"mean": [0], "std": [1], "transform": 3}},
        "tion.transform is 3",
    ),
    "a provenance of another kind": ({"provenance": "ab12"}, "its provenance is 'ab12'"),
    "numbers in the provenance": ({"provenance": {"run_id": 3}}, "its provenance is"),
}


@pytest.mark.parametrize(("change", "message"), EXTRAS.values(), ids=EXTRAS.keys())
def test_extras_of_another_kind_are_refused(change: dict[str, object], message: str, honest: Path, path: Path) -> None:
    content = packed_file.read(honest)
    packed_file.write(path, Content(content.spec, content.extras | change, content.tensors))
    with pytest.raises(InvalidInputError, match=rf"^{path}: .*({message})"):
        load_packed(path)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("conv3.weight_bits", torch.zeros(3, dtype=torch.uint8), r"conv3\.weight_bits is \(3,\), and its model\.spec"),
        ("conv3.weight_bits", torch.zeros(144), r"conv3\.weight_bits is of type F32; bits are U8"),
        ("bn3.falls_bits", torch.zeros(1, dtype=torch.float16), r"bn3\.falls_bits is of type F16"),
        ("conv3.alpha", torch.zeros(16, dtype=torch.uint8), r"conv3\.alpha is of type U8"),
        ("conv3.alpha", torch.zeros(16, dtype=torch.float64), r"conv3\.alpha is of type F64"),
        ("conv3.alpha", torch.zeros(4, 4), r"conv3\.alpha is \(4, 4\)"),
        ("conv1.weight", torch.zeros(1, 8, 3, 3), r"conv1\.weight is \(1, 8, 3, 3\)"),
        ("conv9.weight", torch.zeros(1), r"conv9\.weight is \(1,\), and its model\.spec asks for no such tensor"),
        ("bn1.running_mean", torch.zeros(8), r"bn1\.\w+ is"),
        ("conv8.bias", None, r"conv8\.bias is missing"),
    ],
)
def test_tensors_of_another_shape_or_type_are_named(
    name: str, tensor: torch.Tensor | None, message: str, honest: Path, path: Path
) -> None:
    content = packed_file.read(honest)
    tensors = {key: value for key, value in content.tensors.items() if key != name}
    packed_file.write(path, Content(content.spec, content.extras, tensors | ({} if tensor is None else {name: tensor})))
    with pytest.raises(InvalidInputError, match=rf"^{path}: {message}"):
        load_packed(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_cut_and_moved_bytes_are_refused(data: st.DataObject, honest: Path, path: Path) -> None:
    original = honest.read_bytes()
    header_end = 8 + int.from_bytes(original[:8], "little")
    # Half of the changes in the header, which is a quarter of the file.
    place = st.integers(0, len(original) - 1) | st.integers(0, header_end)
    damaged = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        first = data.draw(place)
        match data.draw(st.sampled_from(["flip", "cut", "insert", "remove"])):
            case "flip":
                damaged[min(first, len(damaged) - 1)] ^= 1 << data.draw(st.integers(0, 7))
            case "cut":
                del damaged[max(1, first) :]
            case "insert":
                damaged[first:first] = data.draw(st.binary(min_size=1, max_size=9))
            case _:
                del damaged[first : min(first + data.draw(st.integers(1, 9)), len(damaged) - 1)]
    path.write_bytes(damaged)
    loaded = loaded_or_refused(path)
    if loaded is not None:  # JSON has blanks that mean nothing
        assert asdict(loaded.spec) == asdict(small_model().spec)
        assert all(torch.equal(tensor, loaded.tensors[name]) for name, tensor in small_model().tensors.items())


_VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just([1]) | st.just({"a": 1})
)
_JSON = _VALUES | st.lists(_VALUES, max_size=3) | st.dictionaries(st.text(max_size=5), _VALUES, max_size=2)


@settings(max_examples=70, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_wrong_values_with_a_right_checksum_are_refused_or_harmless(
    data: st.DataObject, honest: Path, path: Path
) -> None:
    content = copy.deepcopy(packed_file.read(honest))
    target = data.draw(st.sampled_from([content.spec, content.extras]))
    key = data.draw(st.sampled_from(sorted(target)) | st.text(max_size=5))
    target[key] = data.draw(_JSON)
    packed_file.write(path, content)
    loaded = loaded_or_refused(path)
    if loaded is not None:
        spec = loaded.spec
        assert loaded(torch.zeros(1, spec.in_channels, spec.input_size, spec.input_size)).shape == (1, 3)


def test_a_header_that_no_reader_would_take_is_not_written(path: Path) -> None:
    net = build("bincifarfbin", num_classes=3, width=0.0625, in_channels=1, input_size=16, seed=3)
    packed = pack(net, classes=("x" * 3_000_000, "y" * 2_000_000, "z"))
    with pytest.raises(InvalidInputError, match=rf"^{path}: its header would take 5,0.*Give shorter class names"):
        packed.save(path)
    assert not path.exists()


def test_lies_about_sizes_take_no_memory(honest: Path, tmp_path: Path) -> None:
    """In a process that may not have another 256 MB."""
    content = packed_file.read(honest)
    changes = [change for change, _ in SPECS.values()]
    for number, change in enumerate(changes):
        packed_file.write(tmp_path / f"spec{number}", Content(content.spec | change, content.extras, content.tensors))
    for number, (data, _) in enumerate(RAW.values()):
        (tmp_path / f"raw{number}").write_bytes(data)
    big = save({"x": torch.zeros(2**20)}, metadata(json.dumps(content.spec | {"num_classes": 2**18})))
    (tmp_path / "big").write_bytes(big)
    code = (
        "import pathlib, resource, sys\n"
        "from dabnn.errors import InvalidInputError\n"
        "from dabnn.packed import load_packed\n"
        f"load_packed({str(honest)!r})\n"
        "used = next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmSize')) * 1024\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**28,) * 2)\n"
        f"for path in sorted(pathlib.Path({str(tmp_path)!r}).iterdir()):\n"
        "    try:\n"
        "        load_packed(path)\n"
        "    except InvalidInputError:\n"
        "        continue\n"
        "    sys.exit(f'{path} was read')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_packed_model_needs_torch_and_a_compiler_only(honest: Path) -> None:
    blocked = ["ray", "mlflow", "webdataset", "pydantic", "sklearn", "PIL", "torchvision", "optuna", "typer", "rich"]
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "import torch\n"
        "from dabnn.packed import load_packed\n"
        f"packed = load_packed({str(honest)!r})\n"
        "print(tuple(packed(torch.zeros(2, 1, 16, 16)).shape), packed.classes)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("(2, 3) ('a', 'b', 'c')", "")
