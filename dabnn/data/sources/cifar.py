"""CIFAR-10 and CIFAR-100 as published: the python and the binary archives, or the folders that they unpack to.

The images are raw pixels; a record is read as a PNG file, which loses nothing. The same images get the same names from
either archive. What the python archives hold are pickles, which can run any code that their author chose; they are
read by an unpickler that knows NumPy arrays and nothing else.
"""

import io
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dabnn.data.sources.members import safe_name
from dabnn.data.sources.records import Record, Source, split_notes
from dabnn.errors import InvalidInputError

_SIDE = 32
_PIXEL_BYTES = 3 * _SIDE * _SIDE
# CIFAR-100's training set has 150 MB.
_MAX_MEMBER_BYTES = 2**30
# Level 6 makes files smaller by 7 bytes of 2,290, in a tenth more time.
_PNG_LEVEL = 3


@dataclass(frozen=True)
class Layout:
    """One of the four archives: what it is called, and which of its files hold what.

    Attributes:
        format: `cifar10` or `cifar100`.
        kind: `python` or `binary`.
        folder: The folder in the archive.
        train: Its files with the training images.
        val: Its file with the test images.
        names: Its file with the class names.
        labels: python: the key of the labels. binary: the bytes before the pixels, of which the last is the label.
    """

    format: str
    kind: str
    folder: str
    train: tuple[str, ...]
    val: str
    names: str
    labels: str | int

    @property
    def archive(self) -> str:
        """The archive's usual file name."""
        return f"{self.format.replace('cifar', 'cifar-')}-{self.kind}.tar.gz"

    @property
    def files(self) -> tuple[str, ...]:
        """The files that must be there."""
        return (*self.train, self.val, self.names)


LAYOUTS = (
    Layout(
        format="cifar10",
        kind="python",
        folder="cifar-10-batches-py",
        train=tuple(f"data_batch_{number}" for number in range(1, 6)),
        val="test_batch",
        names="batches.meta",
        labels="labels",
    ),
    Layout(
        format="cifar10",
        kind="binary",
        folder="cifar-10-batches-bin",
        train=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
        val="test_batch.bin",
        names="batches.meta.txt",
        labels=1,
    ),
    Layout("cifar100", "python", "cifar-100-python", ("train",), "test", "meta", "fine_labels"),
    Layout("cifar100", "binary", "cifar-100-binary", ("train.bin",), "test.bin", "fine_label_names.txt", 2),
)


@dataclass(frozen=True)
class _Table:
    classes: tuple[str, ...]
    pixels: Mapping[str, NDArray[np.uint8]]
    labels: Mapping[str, NDArray[np.int64]]


def cifar(path: Path, dataset: str | None = None) -> Source:
    """Lists CIFAR-10 or CIFAR-100 (the 100 fine classes); the test images become `val`.

    Args:
        path: One of the four archives, the folder it unpacks to, or a folder with either in it.
        dataset: `cifar10` or `cifar100`, where only that is wanted.

    Returns:
        The source; records are named after the batch and the position in it.

    Raises:
        InvalidInputError: None of the four layouts is there, or it is damaged.
    """
    place, layout = require_layout(path, dataset)
    table = _load(place, layout, place.stat().st_mtime_ns)
    splits = {
        split: tuple(
            Record(f"{stem}/{row:05d}.png", label, "png", _PIXEL_BYTES, (stem, row))
            for stem in (name.removesuffix(".bin") for name in names)
            for row, label in enumerate(table.labels[stem].tolist())
        )
        for split, names in (("train", layout.train), ("val", (layout.val,)))
    }
    return Source(
        name=str(place.resolve()),
        classes=table.classes,
        splits=splits,
        read=CifarRead(place, layout),
        format=layout.format,
        notes=(
            f"read as {layout.format}, {layout.kind} version, from {place.name}; the test images became val",
            *split_notes(table.classes, splits),
        ),
        stamp=_stamp(place, layout),
        has_class_list=True,
    )


def find_layout(path: Path, dataset: str | None = None) -> tuple[Path, Layout] | None:
    """Returns the archive or folder of CIFAR files at a path, or directly below it, and which it is; None: neither."""
    layouts = [layout for layout in LAYOUTS if dataset in (None, layout.format)]
    if path.is_file():
        names = _first_folder(path)
        return next(((path, layout) for layout in layouts if layout.folder == names), None)
    for layout in layouts:
        for folder in (path, path / layout.folder):
            if all((folder / name).is_file() for name in layout.files):
                return folder, layout
    for layout in layouts:
        if (path / layout.archive).is_file():
            return path / layout.archive, layout
    return None


def require_layout(path: Path, dataset: str | None) -> tuple[Path, Layout]:
    """Returns what `find_layout` does.

    Raises:
        InvalidInputError: There are no CIFAR files.
    """
    found = find_layout(path, dataset)
    if found is None:
        wanted = [layout for layout in LAYOUTS if dataset in (None, layout.format)]
        looked_for = " or ".join(
            f"{layout.archive} or {layout.folder}/{{{','.join(layout.files)}}}" for layout in wanted
        )
        raise InvalidInputError(f"{path}: no {dataset or 'CIFAR'} files; looked for {looked_for}")
    return found


def _first_folder(path: Path) -> str:
    try:
        with tarfile.open(path) as archive:
            member = archive.next()
            return member.name.removeprefix("./").partition("/")[0] if member else ""
    except (tarfile.TarError, OSError, EOFError):
        return ""


def _stamp(place: Path, layout: Layout) -> str:
    files = [place] if place.is_file() else [place / name for name in layout.files]
    return "\n".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files)


@dataclass(frozen=True)
class CifarRead:
    """Reads an image as a PNG file; each process keeps the pixels of the data set in memory (180 MB)."""

    place: Path
    layout: Layout

    def __call__(self, record: Record) -> bytes:
        """Returns the PNG file."""
        if record.place is None:
            raise ValueError(f"{record.name}: not a record of {self.place}")
        table = _load(self.place, self.layout, self.place.stat().st_mtime_ns)
        return _png(table.pixels[record.place[0]][record.place[1]])


def _png(planes: NDArray[np.uint8]) -> bytes:
    """Returns red, green and blue planes as a PNG file with Paeth's filter on all rows (ISO/IEC 15948, 9.4).

    Of 2,000 photographs that took 0.10 ms each and 2,290 bytes; Pillow, which tries all filters, 0.17 ms and 2,281.
    """
    pixels = planes.reshape(3, _SIDE, _SIDE).transpose(1, 2, 0).astype(np.int16)
    left, above, corner = (np.zeros_like(pixels) for _ in range(3))
    left[:, 1:], above[1:], corner[1:, 1:] = pixels[:, :-1], pixels[:-1], pixels[:-1, :-1]
    from_left, from_above = above - corner, left - corner
    far_left, far_above, far_corner = np.abs(from_left), np.abs(from_above), np.abs(from_left + from_above)
    is_left = (far_left <= far_above) & (far_left <= far_corner)
    predicted = np.where(is_left, left, np.where(far_above <= far_corner, above, corner))
    rows = np.full((_SIDE, 1 + 3 * _SIDE), 4, dtype=np.uint8)
    rows[:, 1:] = (pixels - predicted).reshape(_SIDE, -1)
    return _PNG_HEAD + _png_chunk(b"IDAT", zlib.compress(rows.tobytes(), _PNG_LEVEL)) + _png_chunk(b"IEND", b"")


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


_PNG_HEAD = b"\x89PNG\r\n\x1a\n" + _png_chunk(b"IHDR", struct.pack(">IIBBBBB", _SIDE, _SIDE, 8, 2, 0, 0, 0))


@lru_cache(maxsize=1)
def _load(place: Path, layout: Layout, modified_ns: int) -> _Table:  # noqa: ARG001 - a key of the cache
    files = _archive_files(place, layout) if place.is_file() else _folder_files(place, layout)
    parse: Callable[[Path, Layout, bytes], tuple[NDArray[np.uint8], NDArray[np.int64]]]
    if layout.kind == "python":
        parse = _parse_pickle
        names = _unpickle(place / layout.names, files[layout.names]).get(f"{_names_key(layout)}")
        classes = tuple(_text(name) for name in names) if isinstance(names, list) else ()
    else:
        parse = _parse_binary
        classes = tuple(line.strip() for line in files[layout.names].decode("latin1").splitlines() if line.strip())
    if not classes or len(set(classes)) != len(classes):
        raise InvalidInputError(f"{place / layout.names}: no list of class names, each once; get the archive again")
    pixels, labels = {}, {}
    for name in (*layout.train, layout.val):
        stem = name.removesuffix(".bin")
        pixels[stem], labels[stem] = parse(place / name, layout, files[name])
        _require_labels(place / name, labels[stem], len(pixels[stem]), len(classes))
    return _Table(classes, pixels, labels)


def _names_key(layout: Layout) -> str:
    return "label_names" if layout.format == "cifar10" else "fine_label_names"


def _require_labels(path: Path, labels: NDArray[np.int64], num_images: int, num_classes: int) -> None:
    if len(labels) != num_images or num_images == 0:
        raise InvalidInputError(f"{path}: {num_images:,} images and {len(labels):,} labels; get the archive again")
    if labels.min() < 0 or labels.max() >= num_classes:
        position = int(np.flatnonzero((labels < 0) | (labels >= num_classes))[0])
        raise InvalidInputError(
            f"{path}: image {position} has the label {labels[position]}, outside 0 to {num_classes - 1}; get the "
            "archive again"
        )


def _folder_files(folder: Path, layout: Layout) -> dict[str, bytes]:
    try:
        return {name: (folder / name).read_bytes() for name in layout.files}
    except OSError as error:
        raise InvalidInputError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _archive_files(path: Path, layout: Layout) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                name = os.path.basename(safe_name(path, member.name))  # noqa: PTH119 - no file of this machine
                if not member.isdir() and (not member.isreg() or member.size > _MAX_MEMBER_BYTES):
                    raise InvalidInputError(
                        f"{path}: member {member.name!r} is a link, a device or {member.size:,} bytes large, which no "
                        "CIFAR archive has; get it from where it was published"
                    )
                stream = archive.extractfile(member) if name in layout.files else None
                if stream is not None:
                    files[name] = stream.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InvalidInputError(f"{path}: damaged or truncated ({error}); get the archive again") from error
    missing = [name for name in layout.files if name not in files]
    if missing:
        raise InvalidInputError(f"{path}: has no {', '.join(missing)}; it is truncated or not {layout.archive}")
    return files


def _parse_binary(path: Path, layout: Layout, data: bytes) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    num_labels = int(layout.labels)
    row_bytes = num_labels + _PIXEL_BYTES
    if len(data) % row_bytes:
        raise InvalidInputError(
            f"{path}: {len(data):,} bytes are no whole number of images of {row_bytes:,}; it is truncated, get it again"
        )
    rows = np.frombuffer(data, np.uint8).reshape(-1, row_bytes)
    return rows[:, num_labels:], rows[:, num_labels - 1].astype(np.int64)


def _parse_pickle(path: Path, layout: Layout, data: bytes) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    table = _unpickle(path, data)
    array, labels = table.get("data"), table.get(str(layout.labels))
    is_labels = isinstance(labels, list) and all(type(label) is int for label in labels)
    pixels = array.values if isinstance(array, _PickledArray) else np.zeros(0, np.uint8)
    if pixels.shape[1:] != (_PIXEL_BYTES,):
        raise InvalidInputError(f"{path}: no uint8 array of {_PIXEL_BYTES} pixels an image under 'data'; get it again")
    if not is_labels:
        raise InvalidInputError(f"{path}: no list of whole numbers under {layout.labels!r}; get it again")
    return pixels, np.asarray(labels, dtype=np.int64)


def _unpickle(path: Path, data: bytes) -> dict[str, Any]:
    try:
        table = _ArrayUnpickler(io.BytesIO(data), encoding="bytes").load()
    except pickle.UnpicklingError as error:
        raise InvalidInputError(
            f"{path}: {error}. It was not unpickled further, since a pickle can run any code; get the archive from "
            "where it was published"
        ) from error
    except (EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, MemoryError) as error:
        raise InvalidInputError(f"{path}: damaged ({type(error).__name__}: {error}); get the archive again") from error
    if not isinstance(table, dict):
        raise InvalidInputError(f"{path}: holds no table; get the archive again")
    return {_text(key): value for key, value in table.items()}


def _text(value: object) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


class _PickledType:
    """Stands for `numpy.dtype`: bytes without a sign are the only type of pixels."""

    def __init__(self, name: object, *_: object) -> None:
        if _text(name) != "u1":
            raise pickle.UnpicklingError(f"has an array of type {_text(name)!r}, not of bytes")

    def __setstate__(self, state: object) -> None:
        """Ignores byte order and alignment, which single bytes do not have."""


class _PickledArray:
    """Stands for an array that NumPy pickled: NumPy's own reader would make an array of any size that it is told."""

    values: NDArray[np.uint8]

    def __init__(self, *_: object) -> None:
        self.values = np.zeros(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Takes the shape and the bytes; raises ValueError where they do not fit."""
        _, shape, _, is_fortran, data = state
        self.values = np.frombuffer(data, np.uint8).reshape(shape, order="F" if is_fortran else "C")


def _from_buffer(data: object, kind: object, shape: object, order: object) -> _PickledArray:
    """Stands for `numpy.core.numeric._frombuffer`, by which NumPy writes arrays from pickle protocol 5 on."""
    array = _PickledArray()
    array.__setstate__((1, shape, kind, order == "F", data))
    return array


def _encode(text: object, encoding: object = "latin1") -> bytes:
    """Stands for `_codecs.encode`, by which Python 3 writes bytes for Python 2."""
    if not isinstance(text, str) or encoding not in (b"latin1", "latin1"):
        raise pickle.UnpicklingError("has bytes in an encoding other than latin1")
    return text.encode("latin1")


class _ArrayUnpickler(pickle.Unpickler):
    """Finds the names that a pickled array of bytes has, and gives none of them the meaning that NumPy would."""

    _KNOWN: Mapping[tuple[str, str], Any] = {
        ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
        ("numpy.core.numeric", "_frombuffer"): _from_buffer,
        ("numpy", "ndarray"): "numpy.ndarray",
        ("numpy", "dtype"): _PickledType,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Returns what stands for a name.

        Raises:
            UnpicklingError: The name is another.
        """
        known = self._KNOWN.get((module.replace("numpy._core", "numpy.core"), name))
        if known is None:
            raise pickle.UnpicklingError(f"asks for {module}.{name}, where only NumPy arrays may be")
        return known
