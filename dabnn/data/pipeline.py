"""Everything between the stored bytes of samples and a batch: reading, decoding, augmentation, mixing, normalisation.

Which samples make a batch is decided by `order`, who asks for them is `stream`. What becomes of a sample depends on the
seed, the epoch and the sample (and its partner) alone.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dabnn.data.decoded_cache import DecodedCache
from dabnn.data.draws import Draws
from dabnn.data.images import Sheet, convert_channels, decode_image
from dabnn.data.mixing import mix
from dabnn.data.reader import SampleReader
from dabnn.data.transforms import Transform

if TYPE_CHECKING:
    from PIL.Image import Image

# A sheet of this many pixels, 4 bytes each, stays in the cache of a core.
_SHEET_PIXELS = 2**18


@dataclass(frozen=True)
class Prepared:
    """What became of the samples that were asked for, in their order; those that cannot be decoded are left out.

    Attributes:
        images: (n, C, S, S), normalised float32 or uint8; (n, 10, C, S, S) where the transform makes ten crops.
        labels: int64 (n,).
        indices: int64 (n,): each sample's index in the split.
        bad: Shard, key, name and trouble of each sample that was left out.
        partner_labels: int64 (n,): with mixing, the labels of the images that were mixed in.
        weights: float32 (n,): with mixing, the share of the first label: loss = w CE(label) + (1 - w) CE(partner).
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    bad: tuple[str, ...] = ()
    partner_labels: Tensor | None = None
    weights: Tensor | None = None


@dataclass
class _Loaded:
    """Fitted pixels and labels of samples by position, and what is wrong with those that could not be decoded."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    bad: dict[int, str]


class Pipeline:
    """Turns indices of samples into batches; a copy that was pickled to another process does the same there.

    Args:
        reader: Of the stored samples.
        transform: What becomes of an image.
        seed: Of the augmentations, which depend on it, the epoch and the sample's index alone.
        decoded: Where decoded images are kept, or None.
    """

    def __init__(
        self, reader: SampleReader, transform: Transform, seed: int, decoded: DecodedCache | None = None
    ) -> None:
        self.reader = reader
        self.transform = transform
        self.seed = seed
        self.decoded = decoded

    @property
    def modules(self) -> tuple[str, ...]:
        """What the process that loaders are forked from should import, so that they need not."""
        return (__name__, "PIL.Image", "PIL.JpegImagePlugin", "PIL.PngImagePlugin")

    def batch(
        self,
        indices: NDArray[np.int64],
        epoch: int,
        partners: NDArray[np.int64] | None = None,
        *,
        finished: bool = True,
    ) -> Prepared:
        """Reads, decodes, augments and normalises samples.

        Args:
            indices: Of the samples in the split.
            epoch: That the augmentations are drawn for.
            partners: With mixing, the sample that is mixed into each.
            finished: Whether images are normalised; else they stay uint8, for `Transform.batch` on the device, unless
                mixup has made mean values of them.

        Returns:
            The batch.

        Raises:
            DabError: A shard cannot be read.
        """
        wanted = indices
        if partners is not None:
            wanted = np.concatenate([indices, np.setdiff1d(partners, indices)])
        draws = Draws(self.seed, epoch, wanted)
        loaded = self._load(wanted, self.transform.parts(draws))
        good = np.setdiff1d(np.arange(len(wanted)), list(loaded.bad)) if loaded.bad else np.arange(len(wanted))
        pixels = self.transform.finish(loaded.pixels if not loaded.bad else loaded.pixels[good], draws.only(good))
        own = good[good < len(indices)]
        labels = loaded.labels[good]
        images, mixed_labels, weights = pixels, None, None
        if partners is not None:
            rows = _rows(wanted[good], partners[own])
            images, weights = mix(pixels, rows, self.transform.added, draws.only(own), self.transform.batch)
            mixed_labels = torch.from_numpy(labels[rows])
        return Prepared(
            self.transform.batch(images) if finished else images,
            torch.from_numpy(labels[: len(own)]),
            torch.from_numpy(indices[own]),
            tuple(message for position, message in loaded.bad.items() if position < len(indices)),
            mixed_labels,
            weights,
        )

    @property
    def is_arithmetic(self) -> bool:
        """Whether all that is left to do for a batch is arithmetic on decoded images, a batch at a time."""
        decoded, transform = self.decoded, self.transform
        if decoded is None or transform.added.randaugment_ops or not transform.keeps(decoded.size):
            return False
        return decoded.is_full()

    def prefetch(self, indices: NDArray[np.int64]) -> None:
        """Begins to fetch what holds samples that are read soon, in this order, unless their pixels are there."""
        self.reader.prefetch(indices if self.decoded is None else self.decoded.missing(indices))

    def close(self) -> None:
        """Closes the files; reading again opens them again."""
        self.reader.close()
        if self.decoded is not None:
            self.decoded.close()

    def _load(self, indices: NDArray[np.int64], parts: list[list[float]]) -> _Loaded:
        """Reads samples and makes them fit."""
        if self.decoded is not None:
            return self._load_decoded(self.decoded, indices, parts)
        size = self.transform.fitted_size
        is_kept = self.transform.keeps(size)
        return self._read(indices, size, lambda image, position: self.transform.fit(image, parts[position]), is_kept)

    def _load_decoded(self, decoded: DecodedCache, indices: NDArray[np.int64], parts: list[list[float]]) -> _Loaded:
        """Takes decoded pixels from the cache, after reading those that are not in it."""

        def check(image: "Image", _position: int) -> "Image":
            if image.size != decoded.size:
                found, known = (" x ".join(map(str, size)) for size in (image.size, decoded.size))
                raise ValueError(f"it is {found} pixels large, and all images of the manifest {known}")
            return convert_channels(image, decoded.channels)

        trouble = dict[int, str]()
        missing = decoded.missing(indices)
        for chosen in _chunks(missing, decoded.size):
            read = self._read(chosen, decoded.size, check, is_kept=True)
            good = [position for position in range(len(chosen)) if position not in read.bad]
            decoded.store(chosen[good], read.pixels[good])
            trouble |= {int(chosen[position]): message for position, message in read.bad.items()}
        bad = {position: trouble[index] for position, index in enumerate(indices.tolist()) if index in trouble}
        pixels = decoded.pixels(indices)
        if not self.transform.keeps(decoded.size):
            pixels = self._fit(pixels, parts)
        return _Loaded(pixels, self.reader.labels(indices), bad)

    def _read(
        self, indices: NDArray[np.int64], size: tuple[int, int], fit: "Callable[[Image, int], Image]", is_kept: bool
    ) -> _Loaded:
        """Reads and decodes samples.

        Args:
            indices: Of the samples.
            size: Width and height of what is wanted.
            fit: Makes that of a decoded image and its position among the samples.
            is_kept: Whether it leaves images of this size, in the right channels, as they are.
        """
        labels, bad, sheets = np.empty(len(indices), dtype=np.int64), dict[int, str](), []
        for chosen in _chunks(np.arange(len(indices)), size):
            sheet = Sheet(len(chosen), size, self.transform.in_channels)
            for place, position in enumerate(chosen.tolist()):
                data, labels[position] = self.reader.read(int(indices[position]))
                try:
                    if not (is_kept and sheet.decode(place, data)):
                        sheet.paste(place, fit(decode_image(data), position))
                except ValueError as error:
                    bad[position] = f"{self.reader.describe(int(indices[position]))}: does not decode: {error}"
            sheets.append(sheet.pixels())
        return _Loaded(_joined(sheets, size, self.transform.in_channels), labels, bad)

    def _fit(self, pixels: NDArray[np.uint8], parts: list[list[float]]) -> NDArray[np.uint8]:
        """Makes decoded images fit."""
        from PIL import Image

        size, sheets = self.transform.fitted_size, []
        for chosen in _chunks(np.arange(len(pixels)), size):
            sheet = Sheet(len(chosen), size, self.transform.in_channels)
            for place, position in enumerate(chosen.tolist()):
                image = Image.fromarray(pixels[position, :, :, 0] if pixels.shape[3] == 1 else pixels[position])
                sheet.paste(place, self.transform.fit(image, parts[position]))
            sheets.append(sheet.pixels())
        return _joined(sheets, size, self.transform.in_channels)


def _rows(samples: NDArray[np.int64], partners: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns where among `samples` the partner of each of the first ones is; its own place, where it is missing."""
    order = np.argsort(samples)
    found = order[np.minimum(np.searchsorted(samples, partners, sorter=order), len(samples) - 1)]
    return np.where(samples[found] == partners, found, np.arange(len(partners)))


def _chunks(values: NDArray[np.int64], size: tuple[int, int]) -> Iterator[NDArray[np.int64]]:
    """Cuts samples into as many as a sheet of images of this size holds."""
    step = max(1, _SHEET_PIXELS // (size[0] * size[1]))
    return (values[start : start + step] for start in range(0, len(values), step))


def _joined(sheets: list[NDArray[np.uint8]], size: tuple[int, int], channels: int) -> NDArray[np.uint8]:
    if not sheets:
        return np.empty((0, size[1], size[0], channels), dtype=np.uint8)
    return sheets[0] if len(sheets) == 1 else np.concatenate(sheets)
