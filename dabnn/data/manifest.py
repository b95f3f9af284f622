"""The manifest of a dataset: `manifest.json` beside the shards, written last, so that its presence means complete.

It names the classes, every shard with its size and checksums, and the statistics a transform needs. Where the samples
lie inside a shard is in that shard's index file (`shards`).
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dabnn.errors import DabError, InvalidInputError

MANIFEST_NAME = "manifest.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Shard:
    """One tar file: its name in the dataset's folder, its samples and bytes, and the sha256 of it and of its index."""

    name: str
    num_samples: int
    num_bytes: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True)
class Split:
    """The shards of `train` or `val`, in order: a sample's index counts through them."""

    num_samples: int
    num_bytes: int
    shards: tuple[Shard, ...]

    @classmethod
    def of(cls, shards: tuple[Shard, ...]) -> "Split":
        """Returns the split that consists of these shards."""
        return cls(sum(shard.num_samples for shard in shards), sum(shard.num_bytes for shard in shards), shards)


@dataclass(frozen=True)
class ImageInfo:
    """What the images of the train split look like.

    Attributes:
        channels: 1 where every image of the dataset is gray, else 3.
        height: Median height in pixels.
        width: Median width in pixels.
        mean: Mean of each channel over all pixels, in [0, 1].
        std: Standard deviation of each channel over all pixels, in [0, 1].
        gray_mean: The mean after conversion to gray.
        gray_std: The standard deviation after conversion to gray.
    """

    channels: int
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    gray_mean: float
    gray_std: float

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
        source: Where it was built from: the absolute path of a folder, or `builtin:NAME`.
        classes: Class names; a label is a position in this tuple.
        image: What the train images look like.
        splits: `train` and `val`.
        format_version: Version of the files' layout.
    """

    source: str
    classes: tuple[str, ...]
    image: ImageInfo
    splits: Mapping[str, Split]
    format_version: int = FORMAT_VERSION

    @cached_property
    def digest(self) -> str:
        """The sha256 of the canonical content; where the images were read from does not count."""
        content = {key: value for key, value in asdict(self).items() if key != "source"}
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    def split(self, name: str) -> Split:
        """Returns a split by name, or raises `InvalidInputError` naming those there are."""
        if name not in self.splits:
            raise InvalidInputError(f"{name}: the dataset has no such split, only {', '.join(self.splits)}")
        return self.splits[name]


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `manifest.json` atomically: a reader sees the whole of it or none."""
    partial = folder / f"{MANIFEST_NAME}.partial"
    with partial.open("w", encoding="utf-8") as file:
        json.dump(asdict(manifest), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / MANIFEST_NAME)


def load_manifest(dest: Path) -> Manifest:
    """Reads the manifest of a dataset.

    Args:
        dest: The dataset's folder.

    Returns:
        The manifest.

    Raises:
        InvalidInputError: There is no manifest, so nothing was built here or the build did not end, or it is of
            another format version.
        DabError: The manifest is damaged or cannot be read.
    """
    path = Path(dest) / MANIFEST_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InvalidInputError(
            f"{dest}: no {MANIFEST_NAME}, so no complete dataset; write one with `dab data build SRC {dest}`"
        ) from None
    except (OSError, ValueError) as error:
        raise DabError(f"{path}: cannot be read ({error}); delete the folder and build it again") from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise InvalidInputError(
            f"{path}: format version {version}, this program reads {FORMAT_VERSION}; build the dataset again"
        )
    try:
        return _parse(content)
    except (KeyError, TypeError, ValueError) as error:
        raise DabError(f"{path}: damaged ({error!r}); delete the folder and build it again") from error


def _parse(content: dict[str, Any]) -> Manifest:
    image = dict(content["image"])
    image["mean"], image["std"] = tuple(image["mean"]), tuple(image["std"])
    splits = {}
    for name, stored in content["splits"].items():
        split = Split.of(tuple(Shard(**shard) for shard in stored["shards"]))
        if (split.num_samples, split.num_bytes) != (stored["num_samples"], stored["num_bytes"]):
            raise ValueError(f"the totals of split {name} are not the sums over its shards")
        splits[name] = split
    return Manifest(content["source"], tuple(content["classes"]), ImageInfo(**image), splits)
