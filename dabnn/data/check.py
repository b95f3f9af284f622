"""Checking a dataset against its manifest: files, checksums, and every sample, read as plain WebDataset archives."""

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dabnn.data.images import EXTENSIONS, decode_image
from dabnn.data.manifest import Manifest, Shard, load_manifest
from dabnn.data.shards import ShardIndex, file_sha256, index_path, load_index
from dabnn.errors import DabError


@dataclass(frozen=True)
class Problem:
    """Something wrong with a dataset.

    Attributes:
        shard: The file's name.
        kind: `missing`, `size`, `checksum`, `foreign`, `archive`, `count`, `decode`, `label` or `index`.
        detail: What was found and what was expected, with the sample where it is about one.
    """

    shard: str
    kind: str
    detail: str


def check_dataset(dest: Path, *, on_progress: Callable[[int, int], None] | None = None) -> list[Problem]:
    """Verifies every shard and sample of a dataset.

    A shard that is missing or of the wrong size is not read further. One of the right size whose checksum differs is,
    so that the damaged sample is named too.

    Args:
        dest: The dataset's folder.
        on_progress: Called as `on_progress(done, total)` with counts of samples, after each shard.

    Returns:
        The problems, shard by shard; none means that the dataset is what was built.

    Raises:
        InvalidInputError: There is no manifest.
    """
    dest = Path(dest)
    manifest = load_manifest(dest)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    total = sum(shard.num_samples for shard in shards)
    problems: list[Problem] = []
    done = 0
    for shard in shards:
        problems.extend(_check_shard(dest, shard, manifest))
        done += shard.num_samples
        if on_progress is not None:
            on_progress(done, total)
    known = {shard.name for shard in shards}
    problems.extend(
        Problem(path.name, "foreign", "a tar file that the manifest does not list; move it away or build again")
        for path in sorted(dest.glob("*.tar"))
        if path.name not in known
    )
    return problems


def _check_shard(dest: Path, shard: Shard, manifest: Manifest) -> Iterator[Problem]:
    path = dest / shard.name
    if not path.is_file():
        yield Problem(shard.name, "missing", "the manifest lists it, but there is no such file; build again")
        return
    num_bytes = path.stat().st_size
    if num_bytes != shard.num_bytes:
        yield Problem(shard.name, "size", f"{num_bytes} bytes, the manifest says {shard.num_bytes}; build again")
        return
    sha256 = file_sha256(path)
    if sha256 != shard.sha256:
        yield Problem(shard.name, "checksum", f"sha256 {sha256}, the manifest says {shard.sha256}; build again")
    index = None
    try:
        index = load_index(dest, shard)
    except DabError as error:
        yield Problem(shard.name, "index", str(error))
    yield from _check_samples(path, shard, index, manifest.classes)


def _check_samples(path: Path, shard: Shard, index: ShardIndex | None, classes: tuple[str, ...]) -> Iterator[Problem]:
    num_samples = 0
    try:
        with path.open("rb") as file:
            for sample in read_archive(path):
                for kind, detail in _check_sample(sample, len(classes)):
                    yield Problem(shard.name, kind, f"sample {sample['__key__']}: {detail}")
                if index is not None and not _is_indexed(file, index, num_samples, sample):
                    yield Problem(shard.name, "index", f"sample {sample['__key__']}: {index_path(path).name} differs")
                num_samples += 1
    except (tarfile.TarError, EOFError, ValueError) as error:
        yield Problem(shard.name, "archive", f"not readable as a WebDataset archive: {error}")
    if num_samples != shard.num_samples:
        yield Problem(shard.name, "count", f"{num_samples} samples, the manifest says {shard.num_samples}")


def read_archive(path: Path) -> Iterator[dict[str, Any]]:
    """Reads a shard from front to back with webdataset's own reader.

    Args:
        path: A tar file.

    Yields:
        A sample: `__key__`, and the bytes of each member under its extension.
    """
    from webdataset.tariterators import group_by_keys, tar_file_expander

    with path.open("rb") as stream:
        yield from group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}]))


def _check_sample(sample: dict[str, Any], num_classes: int) -> Iterator[tuple[str, str]]:
    label = sample.get("cls", b"").decode(errors="replace")
    if not label.isdecimal() or int(label) >= num_classes:
        yield "label", f"label {label!r} is outside the {num_classes} classes"
    images = _images(sample)
    if len(images) != 1:
        yield "decode", f"{len(images)} images, expected 1"
    for data in images:
        try:
            decode_image(data)
        except ValueError as error:
            yield "decode", f"does not decode: {error}"


def _images(sample: dict[str, Any]) -> list[bytes]:
    return [data for extension, data in sample.items() if extension in EXTENSIONS]


def _is_indexed(file: BinaryIO, index: ShardIndex, position: int, sample: dict[str, Any]) -> bool:
    if position >= len(index.keys) or index.keys[position] != sample["__key__"]:
        return False
    file.seek(index.offsets[position])
    data = file.read(index.sizes[position])
    return [data] == _images(sample) and str(index.labels[position]).encode() == sample.get("cls")
