"""Looking at a dataset before training on it: how many samples each class has, and what a network gets to see.

The contact sheet shows samples after the transform, before their values are normalised: `train` as it is augmented in
the first epoch, `val` as it is evaluated.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dabnn.data.manifest import Manifest, load_manifest
from dabnn.data.order import permutation, random_keys

if TYPE_CHECKING:
    from PIL.Image import Image

NUM_SHOWN = 64
_NUM_COLUMNS = 8
_MIN_TILE_PIXELS = 96
_LABEL_PIXELS, _GAP_PIXELS = 16, 4
_LARGEST_DEFAULT_SIZE = 224


@dataclass(frozen=True)
class Sheet:
    """A contact sheet.

    Attributes:
        image: The picture.
        labels: The label of each sample on it, row by row.
        bad: Samples that could not be decoded, and are missing on it.
        input_size: Height and width of the samples.
    """

    image: "Image"
    labels: tuple[int, ...]
    bad: tuple[str, ...]
    input_size: int


def class_counts(root: Path | str, split: str) -> tuple[int, ...]:
    """Returns the samples of each class of a split; where the manifest does not say (version 1), from the indexes.

    Raises:
        InvalidInputError: There is no manifest or no such split.
        DabError: An index cannot be read.
    """
    manifest = load_manifest(root)
    entry = manifest.split(split)
    if entry.class_counts:
        return entry.class_counts
    from dabnn.data.reader import SampleReader

    reader = SampleReader(root, entry, len(manifest.classes))
    labels = reader.labels(np.arange(entry.num_samples))
    reader.close()
    return tuple(np.bincount(labels, minlength=len(manifest.classes)).tolist())


def contact_sheet(
    root: Path | str,
    split: str = "train",
    *,
    transform: str = "auto",
    input_size: int | None = None,
    num_shown: int = NUM_SHOWN,
    seed: int = 0,
) -> Sheet:
    """Draws random samples of a split, with the names of their classes, as a network sees them.

    Args:
        root: The dataset.
        split: `train`, which is augmented, or `val`.
        transform: One of `dabnn.data.transforms.NAMES`.
        input_size: Height and width that the network takes; by default that of the images, at most 224.
        num_shown: Samples, at most.
        seed: Another seed shows other samples.

    Returns:
        The sheet.

    Raises:
        InvalidInputError: There is no manifest, no such split, or no such transform.
        DabError: A shard cannot be read.
    """
    from dabnn.data.pipeline import Pipeline
    from dabnn.data.reader import SampleReader
    from dabnn.data.transforms import make_transform

    manifest = load_manifest(root)
    entry = manifest.split(split)
    channels = manifest.image.channels
    made = make_transform(
        transform,
        input_size=input_size or min(max(manifest.image.height, manifest.image.width), _LARGEST_DEFAULT_SIZE),
        in_channels=channels,
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
        training=split == "train",
    )
    pipeline = Pipeline(SampleReader(root, entry, len(manifest.classes)), made, seed)
    prepared = pipeline.batch(_some(entry.num_samples, num_shown, seed), 0, finished=False)
    pipeline.close()
    labels = tuple(prepared.labels.tolist())
    pixels = prepared.images.permute(0, 2, 3, 1).numpy()
    return Sheet(_draw(pixels, labels, manifest), labels, prepared.bad, made.input_size)


def _some(num_samples: int, num_shown: int, seed: int) -> NDArray[np.int64]:
    """Returns the indices of some samples, each once; of a large set without a permutation of all of it."""
    if num_samples <= 4 * num_shown:
        return permutation(num_samples, seed)[:num_shown]
    drawn = (random_keys(2 * num_shown, seed) % num_samples).astype(np.int64)
    _, first = np.unique(drawn, return_index=True)
    return drawn[np.sort(first)][:num_shown]


def _draw(pixels: NDArray[np.uint8], labels: tuple[int, ...], manifest: Manifest) -> "Image":
    from PIL import Image, ImageDraw, ImageFont

    side = pixels.shape[1]
    tile = side * max(1, -(-_MIN_TILE_PIXELS // side))
    columns = max(1, min(_NUM_COLUMNS, len(labels)))
    rows = max(1, -(-len(labels) // columns))
    step = (tile + _GAP_PIXELS, tile + _LABEL_PIXELS + _GAP_PIXELS)
    sheet = Image.new("RGB", (columns * step[0] + _GAP_PIXELS, rows * step[1] + _GAP_PIXELS), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_LABEL_PIXELS - _GAP_PIXELS)
    for position, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        left, top = (
            _GAP_PIXELS + place * size
            for place, size in zip((position % columns, position // columns), step, strict=True)
        )
        shown = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).resize(
            (tile, tile), Image.Resampling.NEAREST
        )
        sheet.paste(shown, (left, top))
        name = manifest.classes[label]
        while len(name) > 1 and draw.textlength(name, font=font) > tile:
            name = f"{name[:-2]}…"
        draw.text((left, top + tile), name, fill="black", font=font)
    return sheet
