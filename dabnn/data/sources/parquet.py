"""Tables of images in Parquet files, as on the Hugging Face hub: a column of image bytes and a column of labels.

Only whole row groups can be read. Each process keeps some in memory, and shards are mixed within windows of row groups
(`Source.blocks`), so that a table larger than memory is not decoded again for each image.
"""

import bisect
import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dabnn.data.images import EXTENSIONS
from dabnn.data.sources.records import SPLITS, WINDOW_BYTES, Record, Source, numbered_classes, split_notes
from dabnn.data.sources.split_files import files_by_split, stamp_of, train_and_val
from dabnn.data.sources.tree import extension_of
from dabnn.errors import DabError, InvalidInputError

if TYPE_CHECKING:
    from pyarrow import ChunkedArray, Schema
    from pyarrow.parquet import ParquetFile

_IMAGE_COLUMNS, _LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label")
_SIGNATURES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg", b"RIFF": "webp", b"BM": "bmp", b"P6": "ppm", b"P5": "ppm"}


@dataclass(frozen=True)
class _Columns:
    """Which columns hold the images and the labels, and the class names where the file tells them."""

    image: str
    label: str
    classes: tuple[str, ...] | None


def parquet(path: Path) -> Source:
    """Lists a table of images: a column `image` of `bytes` (and `path`), and a column `label`.

    Args:
        path: A folder with `train-*.parquet` and `validation-*.parquet` or `test-*.parquet` in it or in folders below.

    Returns:
        The source. Class names are those of the Hugging Face schema; else the numbers, or the sorted texts. An image is
        named after its file and row.

    Raises:
        InvalidInputError: The files or columns are not there, or a row has no image or no valid label.
    """
    from pyarrow import ArrowException

    files, notes = train_and_val(path, ".parquet")
    try:
        columns = _find_columns(files["train"][0])
        labels = {file: _labels(file, columns) for listed in files.values() for file in listed}
        classes = columns.classes or _classes(labels.values(), str(path))
        listed = {split: _records(path, files[split], columns, labels, classes) for split in SPLITS}
    except ArrowException as error:
        raise InvalidInputError(f"{path}: a file is no Parquet file, or damaged: {error}; get it again") from error
    splits = {split: records for split, (records, _) in listed.items()}
    return Source(
        name=str(path.resolve()),
        classes=classes,
        splits=splits,
        read=ParquetRead(path, columns.image),
        format="parquet",
        notes=(
            f"read as Parquet: {len(classes):,} classes, images from {columns.image!r}, labels from {columns.label!r}",
            *notes,
            *split_notes(classes, splits),
        ),
        blocks={split: blocks for split, (_, blocks) in listed.items()},
        stamp=stamp_of(path, files),
        has_class_list=columns.classes is not None,
    )


def is_parquet(path: Path) -> bool:
    """Tells whether a folder has training images in Parquet files, in it or in a folder below."""
    return path.is_dir() and "train" in files_by_split(path, ".parquet")


def _open(file: Path) -> "ParquetFile":
    from pyarrow.parquet import ParquetFile

    return ParquetFile(file)


def _find_columns(file: Path) -> _Columns:
    with _open(file) as table:
        schema = table.schema_arrow
    features = _features(schema)
    images = [name for name in schema.names if _has_bytes(schema.field(name).type)]
    image = next((name for name in (*_IMAGE_COLUMNS, *images) if name in images), None)
    classes = [name for name, feature in features.items() if "names" in feature and name in schema.names]
    label = next((name for name in (*_LABEL_COLUMNS, *classes) if name in schema.names), None)
    if image is None or label is None:
        raise InvalidInputError(
            f"{file}: no column of images (a struct with `bytes`, named {' or '.join(_IMAGE_COLUMNS)}) with one of "
            f"labels (named {' or '.join(_LABEL_COLUMNS)}); the columns are {', '.join(schema.names)}"
        )
    names = features.get(label, {}).get("names")
    return _Columns(image, label, tuple(str(name) for name in names) if isinstance(names, list) else None)


def _has_bytes(kind: Any) -> bool:
    import pyarrow as pa

    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return False
    bytes_type = kind.field("bytes").type
    return bool(pa.types.is_binary(bytes_type) or pa.types.is_large_binary(bytes_type))


def _features(schema: "Schema") -> Mapping[str, dict[str, Any]]:
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    listed = features.items() if isinstance(features, dict) else ()
    return {name: feature for name, feature in listed if isinstance(feature, dict)}


def _labels(file: Path, columns: _Columns) -> list[Any]:
    with _open(file) as table:
        if columns.label not in table.schema_arrow.names or columns.image not in table.schema_arrow.names:
            raise InvalidInputError(f"{file}: no columns {columns.image} and {columns.label}, as the other files have")
        labels: list[Any] = table.read(columns=[columns.label]).column(0).to_pylist()
    for row, label in enumerate(labels):
        if type(label) not in (int, str) or (type(label) is int and label < 0):
            raise InvalidInputError(
                f"{file}: row {row} has the label {label!r}, neither a number from 0 nor a text; take the row out"
            )
    return labels


def _classes(labels: Any, where: str) -> tuple[str, ...]:
    known = {label for listed in labels for label in listed}
    numbers = {label for label in known if isinstance(label, int)}
    texts = known - numbers
    if numbers and texts:
        raise InvalidInputError(
            f"{where}: some labels are numbers ({min(numbers)}) and some texts ({min(texts)!r}), so it cannot be told "
            "which of them are the same class; write all files with labels of one type"
        )
    return tuple(sorted(texts)) if texts else numbered_classes(max(numbers, default=-1), where)


def _records(
    root: Path, files: Sequence[Path], columns: _Columns, labels: Mapping[Path, list[Any]], classes: tuple[str, ...]
) -> tuple[tuple[Record, ...], tuple[range, ...]]:
    positions: dict[Any, int] = {name: label for label, name in enumerate(classes)}
    records: list[Record] = []
    blocks = []
    for file in files:
        name = file.relative_to(root).as_posix()
        row = 0
        for num_rows, num_bytes, extensions in _row_groups(file, columns.image):
            for extension in extensions:
                named = labels[file][row]
                label = named if isinstance(named, int) else positions.get(named, len(classes))
                if label >= len(classes):
                    raise InvalidInputError(
                        f"{file}: row {row} has the label {named!r}; there are {len(classes)} classes"
                    )
                record_name = f"{name.removesuffix('.parquet')}/{row:08d}.{extension}"
                records.append(Record(record_name, label, extension, num_bytes, (name, row)))
                row += 1
            blocks.append(range(len(records) - num_rows, len(records)))
    return tuple(records), tuple(block for block in blocks if block)


def _row_groups(file: Path, image: str) -> Iterator[tuple[int, int, list[str]]]:
    """Yields the number of rows of each row group, about the bytes of an image, and the images' extensions."""
    with _open(file) as table:
        has_path = table.schema_arrow.field(image).type.get_field_index("path") >= 0
        first = ""
        for position in range(table.num_row_groups):
            group = table.metadata.row_group(position)
            sizes = [group.column(i) for i in range(group.num_columns)]
            num_bytes = sum(c.total_uncompressed_size for c in sizes if c.path_in_schema == f"{image}.bytes")
            names: list[str | None] = [None] * group.num_rows
            if has_path:
                paths = table.read_row_group(position, columns=[f"{image}.path"]).column(0)
                names = [value["path"] if value else None for value in paths.to_pylist()]
            known = [extension_of(name or "") for name in names]
            if any(extension not in EXTENSIONS for extension in known) and not first:
                first = _first_extension(file, table, image)
            extensions = [extension if extension in EXTENSIONS else first for extension in known]
            yield group.num_rows, num_bytes // max(group.num_rows, 1), extensions


def _first_extension(file: Path, table: "ParquetFile", image: str) -> str:
    batch = next(table.iter_batches(batch_size=1, columns=[f"{image}.bytes"]))
    value = batch.column(0)[0].as_py()
    data = (value or {}).get("bytes") or b""
    for signature, extension in _SIGNATURES.items():
        if data.startswith(signature):
            return extension
    raise InvalidInputError(f"{file}: row 0 has no image that is read here ({', '.join(sorted(EXTENSIONS))})")


class _RowGroups:
    """The row groups that this process read last, up to some bytes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._groups: OrderedDict[tuple[Path, int, int], ChunkedArray] = OrderedDict()
        self._starts: dict[tuple[Path, int], list[int]] = {}

    def read(self, file: Path, image: str, row: int) -> bytes | None:
        """Returns the image bytes of a row of a file; None where it has none."""
        modified_ns = file.stat().st_mtime_ns
        starts = self._starts.get((file, modified_ns))
        if starts is None:
            starts = self._starts[file, modified_ns] = _group_starts(file)
        position = bisect.bisect_right(starts, row) - 1
        key = (file, modified_ns, position)
        if key in self._groups:
            self._groups.move_to_end(key)
        else:
            with _open(file) as table:
                self._groups[key] = table.read_row_group(position, columns=[f"{image}.bytes"]).column(0)
            while len(self._groups) > 1 and sum(group.nbytes for group in self._groups.values()) > self._max_bytes:
                self._groups.popitem(last=False)
        value = self._groups[key][row - starts[position]].as_py()
        data: bytes | None = value["bytes"] if value else None
        return data


def _group_starts(file: Path) -> list[int]:
    with _open(file) as table:
        sizes = [table.metadata.row_group(position).num_rows for position in range(table.num_row_groups)]
    return list(accumulate(sizes, initial=0))[:-1]


# Twice a window, whose ends lie within row groups of the windows beside it.
_ROW_GROUPS = _RowGroups(2 * WINDOW_BYTES)


@dataclass(frozen=True)
class ParquetRead:
    """Reads an image out of a table; a record's place is its file and row."""

    root: Path
    image: str

    def __call__(self, record: Record) -> bytes:
        """Returns the image's bytes.

        Raises:
            DabError: The row has no image, or the file was changed.
        """
        from pyarrow import ArrowException

        if record.place is None:
            raise ValueError(f"{record.name}: not a record of {self.root}")
        file, row = self.root / record.place[0], record.place[1]
        try:
            data = _ROW_GROUPS.read(file, self.image, row)
        except (ArrowException, IndexError) as error:
            raise DabError(f"{file}: row {row} cannot be read: {error}; get the file again") from error
        if data is None:
            raise DabError(f"{file}: row {row} has no image bytes; take the row out, or store the image in the table")
        return data
