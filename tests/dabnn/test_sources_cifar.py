"""CIFAR from the four archives and their folders, and what no CIFAR archive has."""

import io
import pickle
import pickletools
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from source_files import contents, tar_bytes, write_files

from dabnn.data import build_dataset
from dabnn.data.sources import open_source
from dabnn.errors import InvalidInputError

NAMES = {
    "cifar10": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
    "cifar100": [f"thing_{number:02d}" for number in range(100)],
}
BATCHES = {
    "cifar10": [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"],
    "cifar100": ["train", "test"],
}
FOLDERS = {
    ("cifar10", "python"): "cifar-10-batches-py",
    ("cifar10", "binary"): "cifar-10-batches-bin",
    ("cifar100", "python"): "cifar-100-python",
    ("cifar100", "binary"): "cifar-100-binary",
}
ARCHIVES = {key: f"{key[0].replace('cifar', 'cifar-')}-{key[1]}.tar.gz" for key in FOLDERS}
by_archive = pytest.mark.parametrize(("dataset", "kind"), FOLDERS)


def rows(dataset: str, batch: int, num: int = 20) -> tuple[np.ndarray, list[int]]:
    generator = np.random.default_rng(batch)
    pixels = generator.integers(0, 256, (num, 3072), dtype=np.uint8)
    return pixels, generator.integers(0, len(NAMES[dataset]), num).tolist()


def text_of_python_2(table: dict[str, Any]) -> bytes:
    """Pickles as the published archives are: protocol 2, with the strings of Python 2, which are bytes in Python 3."""

    def old_string(data: bytes) -> bytes:
        return b"T" + len(data).to_bytes(4, "little") + data

    def value(item: Any) -> bytes:
        if isinstance(item, str):
            return old_string(item.encode())
        if isinstance(item, list):
            return b"](" + b"".join(value(entry) for entry in item) + b"e"
        if isinstance(item, int):
            return b"K" + bytes([item])
        shape = b"".join(b"M" + size.to_bytes(2, "little") for size in item.shape)
        dtype = b"cnumpy\ndtype\n" + old_string(b"u1") + b"K\x00K\x01\x87R(K\x03" + old_string(b"|") + b"NNN"
        dtype += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + old_string(b"b") + b"\x87R"
        return made + b"(K\x01" + shape + b"\x86" + dtype + b"\x89" + old_string(item.tobytes()) + b"tb"

    body = b"}(" + b"".join(value(key) + value(item) for key, item in table.items()) + b"u"
    return b"\x80\x02" + body + b"."


def python_files(dataset: str, dump: Callable[[dict[str, Any]], bytes] = text_of_python_2) -> dict[str, bytes]:
    folder = FOLDERS[dataset, "python"]
    label_key, names_key = ("labels", "label_names") if dataset == "cifar10" else ("fine_labels", "fine_label_names")
    meta = "batches.meta" if dataset == "cifar10" else "meta"
    files = {f"{folder}/{meta}": dump({names_key: NAMES[dataset]}), f"{folder}/readme.html": b"<html>"}
    for position, batch in enumerate(BATCHES[dataset]):
        pixels, labels = rows(dataset, position)
        table = {"batch_label": "a batch", label_key: labels, "data": pixels, "filenames": ["a.png"] * len(labels)}
        files[f"{folder}/{batch}"] = dump(table)
    return files


def binary_files(dataset: str) -> dict[str, bytes]:
    folder = FOLDERS[dataset, "binary"]
    names = "batches.meta.txt" if dataset == "cifar10" else "fine_label_names.txt"
    files = {f"{folder}/{names}": "\n".join([*NAMES[dataset], ""]).encode()}
    for position, batch in enumerate(BATCHES[dataset]):
        pixels, labels = rows(dataset, position)
        coarse = b"" if dataset == "cifar10" else b"\x07"
        images = [coarse + bytes([label]) + row.tobytes() for row, label in zip(pixels, labels, strict=True)]
        files[f"{folder}/{batch}.bin"] = b"".join(images)
    return files


def write_archive(folder: Path, dataset: str, kind: str) -> Path:
    files = python_files(dataset) if kind == "python" else binary_files(dataset)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ARCHIVES[dataset, kind]
    path.write_bytes(tar_bytes(files, "w:gz"))
    return path


def test_the_pickles_of_the_test_are_of_the_published_kind() -> None:
    """Their opcodes are those of the published files, and Python's own unpickler reads them."""
    pixels, labels = rows("cifar10", 0)
    data = text_of_python_2({"data": pixels, "labels": labels})
    assert {"PROTO", "BINSTRING", "GLOBAL", "BUILD"} <= {opcode.name for opcode, _, _ in pickletools.genops(data)}


@by_archive
def test_an_archive_gives_the_pixels_of_each_image(tmp_path: Path, dataset: str, kind: str) -> None:
    source = open_source(str(write_archive(tmp_path, dataset, kind)))
    assert (source.format, source.classes) == (dataset, tuple(NAMES[dataset]))
    batches = {"train": list(enumerate(BATCHES[dataset]))[:-1], "val": list(enumerate(BATCHES[dataset]))[-1:]}
    for split, listed in batches.items():
        expected = [pair for position, _ in listed for pair in zip(*rows(dataset, position), strict=True)]
        assert len(source.splits[split]) == len(expected)
        for record, (pixels, label) in zip(source.splits[split], expected, strict=True):
            image = Image.open(io.BytesIO(source.read(record)))
            assert (image.format, record.label) == ("PNG", label)
            np.testing.assert_array_equal(np.asarray(image), pixels.reshape(3, 32, 32).transpose(1, 2, 0))


@by_archive
def test_the_unpacked_folder_gives_the_same(tmp_path: Path, dataset: str, kind: str) -> None:
    packed = open_source(str(write_archive(tmp_path / "packed", dataset, kind)))
    files = python_files(dataset) if kind == "python" else binary_files(dataset)
    write_files(tmp_path / "open", files)
    for place in (tmp_path / "open", tmp_path / "open" / FOLDERS[dataset, kind], tmp_path / "packed"):
        source = open_source(str(place))
        assert source.digest == packed.digest
        assert contents(source, "val") == contents(packed, "val")


@pytest.mark.parametrize("dataset", NAMES)
def test_the_python_and_the_binary_archive_give_the_same_records(tmp_path: Path, dataset: str) -> None:
    sources = [open_source(str(write_archive(tmp_path, dataset, kind))) for kind in ("python", "binary")]
    assert sources[0].digest == sources[1].digest
    assert contents(sources[0], "val") == contents(sources[1], "val")


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_batches_that_python_3_wrote_again_are_read(tmp_path: Path, protocol: int) -> None:
    files = python_files("cifar10", lambda table: pickle.dumps(table, protocol))
    source = open_source(str(write_files(tmp_path, files)))
    again = open_source(str(write_archive(tmp_path / "packed", "cifar10", "python")))
    assert contents(source, "val") == contents(again, "val")


def test_a_chosen_set_is_taken_where_both_are(tmp_path: Path) -> None:
    write_archive(tmp_path, "cifar10", "binary")
    write_archive(tmp_path, "cifar100", "binary")
    assert [len(open_source(str(tmp_path), name).classes) for name in NAMES] == [10, 100]


def test_the_reader_can_be_sent_to_another_process(tmp_path: Path) -> None:
    source = open_source(str(write_archive(tmp_path, "cifar10", "python")))
    record = source.splits["val"][3]
    assert pickle.loads(pickle.dumps(source.read))(record) == source.read(record)


def test_a_dataset_is_built_from_an_archive(tmp_path: Path) -> None:
    manifest = build_dataset(str(write_archive(tmp_path, "cifar10", "python")), tmp_path / "data")
    assert {name: split.num_samples for name, split in manifest.splits.items()} == {"train": 100, "val": 20}


class Evil:
    """An object whose pickle runs a command when it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.target,))


@pytest.mark.parametrize(
    "attack",
    [
        pytest.param(lambda target: pickle.dumps({"data": Evil(target)}), id="a function"),
        pytest.param(lambda target: b"cos\nsystem\n(S'touch " + bytes(target) + b"'\ntR.", id="a command"),
        pytest.param(lambda target: b"cnumpy\nload\n(S'/etc/passwd'\ntR.", id="another function of numpy"),
        pytest.param(lambda target: b"cnumpy.core.multiarray\n_reconstruct.__globals__\n.", id="an attribute"),
        pytest.param(lambda target: pickle.dumps(np.array([{}, []], dtype=object)), id="an array of objects"),
    ],
)
def test_a_pickle_that_asks_for_more_than_arrays_is_refused(tmp_path: Path, attack: Callable[[Path], bytes]) -> None:
    files = python_files("cifar10") | {"cifar-10-batches-py/data_batch_3": attack(tmp_path / "touched")}
    write_files(tmp_path / "source", files)
    with pytest.raises(InvalidInputError, match=r"data_batch_3: .* It was not unpickled further"):
        open_source(str(tmp_path / "source"))
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    "table",
    [
        b"cnumpy\nndarray\n(J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86tR.",
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(J\xff\xff\xff\x7ftS'b'\ntR.",
        pickle.dumps([1, 2]),
        pickle.dumps({"data": np.zeros((3, 7), np.uint8), "labels": [1, 2, 3]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": ["1", "2"]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1, 2, 3]}),
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [1, 10]}),
        b"",
        b"\x80",
        b"not a pickle",
    ],
)
def test_a_damaged_batch_is_named(tmp_path: Path, table: bytes) -> None:
    files = python_files("cifar10") | {"cifar-10-batches-py/data_batch_2": table}
    with pytest.raises(InvalidInputError, match="data_batch_2: "):
        open_source(str(write_files(tmp_path, files)))


def test_random_damage_never_escapes_as_another_error(tmp_path: Path) -> None:
    files = python_files("cifar10")
    whole = files["cifar-10-batches-py/batches.meta"] + b"\0"
    write_files(tmp_path, files)
    for position in range(0, len(whole) - 1, 2):
        damaged = bytearray(whole)
        damaged[position] ^= 1 + position * 37 % 255
        (tmp_path / "cifar-10-batches-py" / "batches.meta").write_bytes(damaged)
        with suppress(InvalidInputError):
            open_source(str(tmp_path))


@by_archive
def test_a_truncated_archive_is_refused(tmp_path: Path, dataset: str, kind: str) -> None:
    path = write_archive(tmp_path, dataset, kind)
    whole = path.read_bytes()
    for size in (len(whole) // 2, len(whole) - 400):
        path.write_bytes(whole[:size])
        with pytest.raises(InvalidInputError, match="truncated"):
            open_source(str(path), dataset)


def test_a_truncated_binary_batch_and_a_wrong_label_are_named(tmp_path: Path) -> None:
    files = binary_files("cifar10")
    cut = files | {"cifar-10-batches-bin/data_batch_4.bin": files["cifar-10-batches-bin/data_batch_4.bin"][:-1]}
    with pytest.raises(InvalidInputError, match=r"data_batch_4\.bin: 61,459 bytes are no whole number of images"):
        open_source(str(write_files(tmp_path / "cut", cut)))
    wrong = files | {"cifar-10-batches-bin/test_batch.bin": b"\x0a" + bytes(3072)}
    with pytest.raises(InvalidInputError, match=r"test_batch\.bin: image 0 has the label 10, outside 0 to 9"):
        open_source(str(write_files(tmp_path / "wrong", wrong)))


def test_a_member_that_leads_outside_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(tar_bytes(python_files("cifar10") | {"../evil": b"x"}, "w:gz"))
    with pytest.raises(InvalidInputError, match=r"a member named '\.\./evil'"):
        open_source(str(path))


def test_a_folder_without_cifar_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(
        InvalidInputError, match=r"no cifar100 files; looked for cifar-100-python\.tar\.gz or cifar-100-"
    ):
        open_source(str(tmp_path), "cifar100")
