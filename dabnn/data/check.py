"""Checking a dataset against its manifest: files, checksums, and every sample, read as plain WebDataset archives.

The archives are read from front to back, whatever the index says of them; what it says is then compared with that.
Nothing is written, and no member is ever extracted.
"""

import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from dabnn.data.archive import ArchivedSample, StrangeMember, read_archive
from dabnn.data.build_plan import Listing
from dabnn.data.images import decode_image
from dabnn.data.location import Location
from dabnn.data.manifest import Manifest, Shard, load_manifest
from dabnn.data.processes import LocalProcesses, Tell, available_cpus
from dabnn.data.reader import shard_place
from dabnn.data.shard_cache import ShardCache, default_folder
from dabnn.data.shards import ShardIndex, file_sha256, index_path, parse_index
from dabnn.errors import DabError

_MIN_IMAGES_PER_PROCESS = 2000
_MAX_LABEL_BYTES = 32


@dataclass(frozen=True)
class Problem:
    """Something wrong with a dataset.

    Attributes:
        shard: The file's name; empty where it is about the whole dataset.
        kind: `missing`, `size`, `checksum`, `foreign`, `archive`, `member`, `duplicate`, `count`, `decode`, `label`,
            `index` or `source`.
        detail: What was found and what was expected, with the sample where it is about one.
    """

    shard: str
    kind: str
    detail: str


@dataclass(frozen=True)
class _CheckTask:
    number: int
    root: Location
    shard: Shard
    num_classes: int


@dataclass(frozen=True)
class _Checked:
    number: int
    problems: list[Problem]


def check_dataset(
    dest: Path | str,
    *,
    source: str | None = None,
    num_processes: int | None = 1,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Problem]:
    """Verifies every shard and sample of a dataset.

    A shard that is missing or of the wrong size is not read further. One of the right size whose checksum differs is,
    so that the damaged sample is named too.

    Args:
        dest: The dataset's folder, or its URL: its shards are then fetched into the cache.
        source: What it was built from, listed again as it was for the build; None: the source is not looked at.
        num_processes: Processes of this machine, as many as are useful with None; see `build_dataset`.
        on_progress: Called as `on_progress(done, total)` with counts of samples, after each shard.

    Returns:
        The problems, shard by shard; none means that the dataset is what was built.

    Raises:
        InvalidInputError: There is no manifest, or the source cannot be listed.
        DabError: A process died.
    """
    root = Location.of(dest)
    manifest = load_manifest(dest)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    tasks = [_CheckTask(number, root, shard, len(manifest.classes)) for number, shard in enumerate(shards)]
    total = sum(shard.num_samples for shard in shards)
    done = 0

    def tell(number: int) -> None:
        nonlocal done
        done += number
        if on_progress is not None:
            on_progress(done, total)

    num_processes = num_processes or min(available_cpus(), -(-total // _MIN_IMAGES_PER_PROCESS))
    checked = sorted(LocalProcesses(num_processes)(_check_shard, tasks, tell), key=lambda found: found.number)
    problems = [problem for found in checked for problem in found.problems]
    problems += _foreign_files(root.path, shards) if root.is_local else []
    return problems if source is None else [*problems, *_check_source(source, manifest)]


def _foreign_files(dest: Path, shards: list[Shard]) -> Iterator[Problem]:
    known = {shard.name for shard in shards} | {Path(shard.url).name for shard in shards if shard.url}
    for path in sorted(dest.glob("*.tar")):
        if path.name not in known:
            yield Problem(path.name, "foreign", "a tar file that the manifest does not list; move it or build again")


def _check_source(source: str, manifest: Manifest) -> Iterator[Problem]:
    if not manifest.source_digest:
        yield Problem("", "source", "the manifest is of format version 1 and knows no digest; build again to have one")
        return
    options = dict(manifest.source_options or {})
    if options.get("split_lists"):
        options["split_lists"] = Path(options["split_lists"])
    found = Listing(source, **options).open()
    if found.digest == manifest.source_digest:
        return
    counts = ", ".join(
        f"{split} {len(records):,} now and {manifest.splits[split].num_samples:,} then"
        for split, records in found.splits.items()
        if split in manifest.splits
    )
    yield Problem(
        "",
        "source",
        f"{source} lists other images, labels or sizes than when the dataset was built ({counts} images); build again",
    )


def _check_shard(task: _CheckTask, tell: Tell) -> _Checked:
    problems = list(_shard_problems(task.root, task.shard, task.num_classes))
    tell(task.shard.num_samples)
    return _Checked(task.number, [replace(problem, shard=task.shard.name) for problem in problems])


def _shard_problems(root: Location, shard: Shard, num_classes: int) -> Iterator[Problem]:
    try:
        path = _local_file(root, shard)
        num_bytes = path.stat().st_size
        if num_bytes != shard.num_bytes:
            yield Problem("", "size", f"{num_bytes} bytes, the manifest says {shard.num_bytes}; build again")
            return
        sha256 = file_sha256(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        yield Problem("", "missing", f"the manifest lists it, but there is no {error.filename or error}; build again")
        return
    except OSError as error:
        yield Problem("", "missing", f"{error.filename} cannot be read: {error.strerror}; ask for the permission")
        return
    except DabError as error:
        yield Problem("", "missing", str(error))
        return
    if sha256 != shard.sha256:
        yield Problem("", "checksum", f"sha256 {sha256}, the manifest says {shard.sha256}; build again")
    index = None
    name = index_path(Path(shard.name)).name
    try:
        index = parse_index(root.read_bytes(name), shard, root.child(name))
    except (OSError, DabError, KeyError, TypeError, ValueError) as error:
        yield Problem("", "index", f"{name}: cannot be read, or is not the index of this shard ({error}); build again")
    yield from _sample_problems(path, shard, index, num_classes)


def _local_file(root: Location, shard: Shard) -> Path:
    """Returns the shard as a file of this machine; one that lies elsewhere is fetched into the cache."""
    place = Location.of(root.child(shard.url or shard.name))
    if place.is_local and root.is_local:
        return place.path
    return ShardCache(default_folder()).path(shard_place(root, shard), shard)


def _sample_problems(path: Path, shard: Shard, index: ShardIndex | None, num_classes: int) -> Iterator[Problem]:
    num_samples = 0
    seen: set[str] = set()
    try:
        for entry in read_archive(path):
            if isinstance(entry, StrangeMember):
                yield Problem("", "member", f"{entry.name!r}: {entry.reason}")
                continue
            if entry.key in seen:
                yield Problem("", "duplicate", f"sample {entry.key}: the key was there before")
            seen.add(entry.key)
            for kind, detail in _check_sample(entry, num_classes):
                yield Problem("", kind, f"sample {entry.key}: {detail}")
            if index is not None and not _is_indexed(index, num_samples, entry):
                yield Problem("", "index", f"sample {entry.key}: {index_path(Path(shard.name)).name} differs")
            num_samples += 1
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        yield Problem("", "archive", f"not readable as a WebDataset archive: {error}")
    if num_samples != shard.num_samples:
        yield Problem("", "count", f"{num_samples} samples, the manifest says {shard.num_samples}")


def _check_sample(sample: ArchivedSample, num_classes: int) -> Iterator[tuple[str, str]]:
    if len(sample.labels) != 1:
        yield "label", f"{len(sample.labels)} labels ({sample.key}.cls), expected 1"
    for data in sample.labels:
        label = data[:_MAX_LABEL_BYTES].decode(errors="replace").strip()
        if not label.isdecimal() or int(label) >= num_classes:
            yield "label", f"label {label!r} is outside the {num_classes} classes"
    if len(sample.images) != 1:
        yield "decode", f"{len(sample.images)} images, expected 1"
    for image in sample.images:
        try:
            decode_image(image)
        except ValueError as error:
            yield "decode", f"does not decode: {error}"


def _is_indexed(index: ShardIndex, position: int, sample: ArchivedSample) -> bool:
    if position >= len(index.keys) or index.keys[position] != sample.key:
        return False
    places = list(zip(sample.offsets, map(len, sample.images), strict=True))
    label = str(index.labels[position]).encode()
    return places == [(index.offsets[position], index.sizes[position])] and [
        data.strip() for data in sample.labels
    ] == [label]
