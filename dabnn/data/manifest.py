"""The manifest of a dataset: `manifest.json` beside the shards, written last, so that its presence means complete.

It names the classes, every shard with its size and checksums, and the statistics a transform needs. Where the samples
lie inside a shard is in that shard's index file (`shards`). Format version 2 keeps a list for each field of the shards,
so that 100,000 of them open in a fraction of a second; version 1, an object for each shard, is still read.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from dabnn.data.location import Location
from dabnn.data.remote import shown
from dabnn.errors import DabError, InvalidInputError

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 2
_FORMAT_VERSIONS = (1, FORMAT_VERSION)
# What a dataset is does not depend on where it came from or lies.
_NOT_IN_DIGEST = frozenset({"source", "source_digest", "source_options"})
_PLACE_FIELDS = ("url", "mtime_ns")


class Shard(NamedTuple):
    """One tar file. A tuple, since a hundred thousand of them are made when a manifest is opened.

    Attributes:
        name: File name; its index lies in the dataset's folder under this name.
        num_samples: Samples in it.
        num_bytes: Its length.
        sha256: Of its content.
        index_sha256: Of its index.
        url: Where the tar file lies, a path or URL, when that is not beside the manifest.
        mtime_ns: When it was last written to, of a file of this machine that was indexed where it lies; None where
            that is not known.
    """

    name: str
    num_samples: int
    num_bytes: int
    sha256: str
    index_sha256: str
    url: str | None = None
    mtime_ns: int | None = None


@dataclass(frozen=True)
class Split:
    """The shards of `train` or `val`, in order: a sample's index counts through them.

    Attributes:
        num_samples: Samples of all shards.
        num_bytes: Bytes of all shards.
        shards: The tar files.
        class_counts: Samples of each class, in the order of the labels; empty where a version 1 manifest has none.
    """

    num_samples: int
    num_bytes: int
    shards: tuple[Shard, ...]
    class_counts: tuple[int, ...] = ()

    @classmethod
    def of(cls, shards: tuple[Shard, ...], class_counts: Sequence[int] = ()) -> "Split":
        """Returns the split that consists of these shards."""
        num_samples = sum(shard.num_samples for shard in shards)
        return cls(num_samples, sum(shard.num_bytes for shard in shards), shards, tuple(class_counts))


@dataclass(frozen=True)
class ImageInfo:
    """What the images look like.

    Attributes:
        channels: 1 where every image of the dataset is gray, else 3.
        height: Median height in pixels, of the train split.
        width: Median width in pixels, of the train split.
        mean: Mean of each channel over all pixels of the train split, in [0, 1].
        std: Standard deviation of each channel over all pixels of the train split, in [0, 1].
        gray_mean: The mean after conversion to gray.
        gray_std: The standard deviation after conversion to gray.
        min_height: Of the lowest image of all splits; 0 where that is not known, as the other three.
        max_height: Of the highest image of all splits.
        min_width: Of the narrowest image of all splits.
        max_width: Of the widest image of all splits.
    """

    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    gray_mean: float
    gray_std: float
    min_height: int = 0
    max_height: int = 0
    min_width: int = 0
    max_width: int = 0

    def normalization(self, in_channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Returns the mean and standard deviation for a network with 1 or 3 input channels.

        A deviation below one gray level (blank images) is raised to it, so that it can be divided by.
        """
        if in_channels == 1:
            mean, std = [self.gray_mean], [self.gray_std]
        else:
            repeats = in_channels // self.channels
            mean, std = [*self.mean] * repeats, [*self.std] * repeats
        return tuple(mean), tuple(max(value, 1 / 255) for value in std)


@dataclass(frozen=True)
class Manifest:
    """A complete dataset.

    Attributes:
        source: Where it was built from: an absolute path, a URL, or `builtin:NAME`.
        classes: Class names; a label is a position in this tuple.
        image: What the images look like.
        splits: `train` and `val`.
        source_digest: The sha256 of what the source listed (names, labels, sizes); empty in version 1.
        stored: How images were changed before they were stored (`resize`, `encoding`, `quality`); None: as they came.
        source_options: How the source was listed (`format`, `val_fraction`, `seed`, `split_lists`); None in version 1.
        format_version: Version of the files' layout.
    """

    source: str
    classes: tuple[str, ...]
    image: ImageInfo
    splits: Mapping[str, Split]
    source_digest: str = ""
    stored: Mapping[str, Any] | None = None
    source_options: Mapping[str, Any] | None = None
    format_version: int = FORMAT_VERSION

    @cached_property
    def digest(self) -> str:
        """The sha256 of the canonical content; where images were read from and where shards lie does not count."""
        content = {key: value for key, value in _content(self).items() if key not in _NOT_IN_DIGEST}
        if self.format_version > 1:
            for split in content["splits"].values():
                split["shards"] = {key: value for key, value in split["shards"].items() if key not in _PLACE_FIELDS}
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def split(self, name: str) -> Split:
        """Returns a split by name, or raises `InvalidInputError` naming those there are."""
        if name not in self.splits:
            raise InvalidInputError(f"{name}: the dataset has no such split, only {', '.join(self.splits)}")
        return self.splits[name]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `manifest.json` atomically: a reader sees the whole of it or none."""
    partial = folder / f"{MANIFEST_NAME}.partial"
    # One call of dumps: json.dump would encode in Python, ten times as slowly.
    text = json.dumps(_content(manifest), indent=1 if manifest.format_version == 1 else None)
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / MANIFEST_NAME)


def load_manifest(root: Path | str) -> Manifest:
    """Reads the manifest of a dataset.

    Args:
        root: The dataset's folder or URL.

    Returns:
        The manifest.

    Raises:
        InvalidInputError: There is no manifest, so nothing was built here or the build did not end, or it is of
            another format version.
        DabError: The manifest is damaged or cannot be read.
    """
    location = Location.of(root)
    path = shown(location.child(MANIFEST_NAME))
    try:
        content = json.loads(location.read_bytes(MANIFEST_NAME))
    except (FileNotFoundError, NotADirectoryError):
        how = f"write one with `dab data build SRC {root}`"
        if not location.is_local:
            how = "write one with `dab data build SRC FOLDER` and upload the whole folder"
        raise InvalidInputError(f"{location}: no {MANIFEST_NAME}, so no complete dataset; {how}") from None
    except PermissionError:
        raise DabError(
            f"{path}: permission denied; make the folder and its files readable for the user that runs this"
        ) from None
    except (OSError, ValueError) as error:
        raise DabError(f"{path}: cannot be read ({error}); delete the folder and build it again") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version not in _FORMAT_VERSIONS:
        raise InvalidInputError(
            f"{path}: format version {version}, this program reads 1 and 2; build the dataset again"
        )
    try:
        return _parse(content)
    except (KeyError, TypeError, ValueError) as error:
        raise DabError(f"{path}: damaged ({error!r}); delete the folder and build it again") from error


def _content(manifest: Manifest) -> dict[str, Any]:
    """Returns what `manifest.json` of the manifest's own format version holds."""
    content: dict[str, Any] = {
        "format_version": manifest.format_version,
        "source": manifest.source,
        "classes": manifest.classes,
        "image": asdict(manifest.image),
    }
    if manifest.format_version == 1:
        splits = {name: _split_content_1(split) for name, split in manifest.splits.items()}
        for key in ("min_height", "max_height", "min_width", "max_width"):
            del content["image"][key]
        return {**content, "splits": splits}
    splits = {name: _split_content(split) for name, split in manifest.splits.items()}
    for key in ("source_digest", "stored", "source_options"):
        value = getattr(manifest, key)
        content[key] = dict(value) if isinstance(value, Mapping) else value
    return {**content, "splits": splits}


def _split_content(split: Split) -> dict[str, Any]:
    columns = zip(*split.shards, strict=True) if split.shards else [()] * len(Shard._fields)
    shards: dict[str, Any] = dict(zip(Shard._fields, columns, strict=True))
    if not any(shards["url"]):
        shards["url"] = None
    if not any(shards["mtime_ns"]):
        del shards["mtime_ns"]
    sizes = {"num_samples": split.num_samples, "num_bytes": split.num_bytes}
    return {**sizes, "class_counts": split.class_counts, "shards": shards}


def _split_content_1(split: Split) -> dict[str, Any]:
    fields = Shard._fields[: -len(_PLACE_FIELDS)]
    shards = [dict(zip(fields, shard, strict=False)) for shard in split.shards]
    return {"num_samples": split.num_samples, "num_bytes": split.num_bytes, "shards": shards}


def _parse(content: dict[str, Any]) -> Manifest:
    version = content["format_version"]
    image = dict(content["image"])
    image["mean"], image["std"] = tuple(image["mean"]), tuple(image["std"])
    splits = {}
    for name, stored in content["splits"].items():
        shards = _shards_1(stored["shards"]) if version == 1 else _shards(stored["shards"])
        split = Split.of(shards, stored.get("class_counts", ()))
        if (split.num_samples, split.num_bytes) != (stored["num_samples"], stored["num_bytes"]):
            raise ValueError(f"the totals of split {name} are not the sums over its shards")
        _refuse_strange_names([shard.name for shard in shards])
        splits[name] = split
    return Manifest(
        content["source"],
        tuple(content["classes"]),
        ImageInfo(**image),
        splits,
        content.get("source_digest", ""),
        content.get("stored"),
        content.get("source_options"),
        version,
    )


def _shards(columns: Mapping[str, Any]) -> tuple[Shard, ...]:
    required = [columns[field] for field in Shard._fields[: -len(_PLACE_FIELDS)]]
    unknown = [None] * len(required[0])
    urls, times = columns["url"] or unknown, columns.get("mtime_ns") or unknown
    return tuple(map(Shard._make, zip(*required, urls, times, strict=True)))


def _shards_1(rows: Sequence[Mapping[str, Any]]) -> tuple[Shard, ...]:
    return tuple(Shard(**row) for row in rows)


def _refuse_strange_names(names: Sequence[str]) -> None:
    """Raises `ValueError` unless all are different names of files: a path would lead out of the dataset's folder."""
    if len(set(names)) < len(names):
        raise ValueError("two shards have the same name")
    # All of them at once first, since there may be very many.
    if any(character in "".join(names) for character in "/\\\0") or not {"", ".", ".."}.isdisjoint(names):
        strange = next(name for name in names if name in ("", ".", "..") or any(c in name for c in "/\\\0"))
        raise ValueError(f"the shard name {strange!r} is no plain file name")
