"""Size, colour and channel statistics of a set of images, from integer histograms: exact, and in any order the same.

Each process that builds shards counts its own; the counts are numbers that can be stored and added.
"""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dabnn.data.images import GRAY_MODES, Sheet, convert_channels
from dabnn.data.manifest import ImageInfo

if TYPE_CHECKING:
    from PIL.Image import Image

_RGB, _GRAY = slice(0, 3), 3
# Pillow counts the pixels of many small images at once in a tenth of the time of one by one.
_WAITING_PIXELS = 2**18
_SMALL_PIXELS, _NUM_IN_SHEET = 2**14, 64


class ImageStatistics:
    """Counts pixel values and sizes, image by image."""

    def __init__(self) -> None:
        self._counts = np.zeros((4, 256), dtype=np.int64)
        self._heights: Counter[int] = Counter()
        self._widths: Counter[int] = Counter()
        self._other_sizes: tuple[set[int], set[int]] = (set(), set())
        self._is_gray = True
        self._waiting: dict[int, list[NDArray[np.uint8]]] = {1: [], 3: []}
        self._num_waiting = 0
        self._sheet: _Sheet | None = None
        self._last_size = (0, 0)

    def add(self, image: "Image") -> None:
        """Counts an image's pixels and size: red, green, blue, and gray."""
        is_gray = image.mode in GRAY_MODES
        self._add_size(image.size, is_gray=is_gray)
        channels = 1 if is_gray else 3
        self._wait(np.asarray(convert_channels(image, channels)).reshape(-1, channels))
        if image.size == self._last_size and image.width * image.height <= _SMALL_PIXELS:
            self._empty_sheet()
            self._sheet = _Sheet(image.size, channels)
        self._last_size = image.size

    def add_file(self, data: bytes) -> bool:
        """Decodes and counts a small image file that is like the last two images: at half the cost of one by one.

        Args:
            data: The file.

        Returns:
            Whether it was counted. If not, it is another kind of image, or damaged.
        """
        if self._sheet is None or not self._sheet.add(data):
            return False
        self._add_size(self._sheet.size, is_gray=self._sheet.channels == 1)
        if self._sheet.is_full:
            self._empty_sheet()
        return True

    def merge(self, state: Mapping[str, Any]) -> None:
        """Adds what another object counted, as its `state` says."""
        self._counts += np.array(state["counts"], dtype=np.int64)
        for own, counted in ((self._heights, state["heights"]), (self._widths, state["widths"])):
            own.update({int(size): number for size, number in counted})
        self._is_gray = self._is_gray and bool(state["is_gray"])

    def merge_sizes(self, state: Mapping[str, Any]) -> None:
        """Adds what another object found, of images whose pixels do not count: the range of sizes, and colour."""
        for sizes, counted in zip(self._other_sizes, (state["heights"], state["widths"]), strict=True):
            sizes.update(size for size, _ in counted)
        self._is_gray = self._is_gray and bool(state["is_gray"])

    def state(self) -> dict[str, Any]:
        """Returns what was counted, as values that JSON knows."""
        self._empty_sheet()
        self._count_waiting()
        return {
            "counts": self._counts.tolist(),
            "heights": sorted(self._heights.items()),
            "widths": sorted(self._widths.items()),
            "is_gray": self._is_gray,
        }

    def summary(self) -> ImageInfo:
        """Returns what was counted; the pixels of at least one image must have been."""
        self._empty_sheet()
        self._count_waiting()
        channels = 1 if self._is_gray else 3
        means, stds = zip(*(_mean_and_std(counts) for counts in self._counts), strict=True)
        heights, widths = (
            own.keys() | others for own, others in zip((self._heights, self._widths), self._other_sizes, strict=True)
        )
        return ImageInfo(
            channels=channels,
            height=_median(self._heights),
            width=_median(self._widths),
            mean=means[:channels],
            std=stds[:channels],
            gray_mean=means[_GRAY],
            gray_std=stds[_GRAY],
            min_height=min(heights),
            max_height=max(heights),
            min_width=min(widths),
            max_width=max(widths),
        )

    def _add_size(self, size: tuple[int, int], *, is_gray: bool) -> None:
        self._is_gray = self._is_gray and is_gray
        self._widths[size[0]] += 1
        self._heights[size[1]] += 1

    def _empty_sheet(self) -> None:
        if self._sheet is not None:
            self._wait(self._sheet.take())

    def _wait(self, pixels: NDArray[np.uint8]) -> None:
        self._waiting[pixels.shape[1]].append(pixels)
        self._num_waiting += len(pixels)
        if self._num_waiting >= _WAITING_PIXELS:
            self._count_waiting()

    def _count_waiting(self) -> None:
        from PIL import Image

        for channels, waiting in self._waiting.items():
            if sum(map(len, waiting)) == 0:
                continue
            # As one image of one row: for a histogram it does not matter where a pixel lies.
            pixels = np.concatenate(waiting)
            row = Image.fromarray(pixels[None, :, 0] if channels == 1 else pixels[None])
            self._counts[_GRAY] += np.array(convert_channels(row, 1).histogram())
            self._counts[_RGB] += np.array(row.histogram()).reshape(channels, 256)
            waiting.clear()
        self._num_waiting = 0


class _Sheet:
    """Small images of one size and kind, decoded side by side."""

    def __init__(self, size: tuple[int, int], channels: int) -> None:
        self.size, self.channels = size, channels
        self._sheet = Sheet(_NUM_IN_SHEET, size, channels)
        self._num = 0

    @property
    def is_full(self) -> bool:
        return self._num == _NUM_IN_SHEET

    def add(self, data: bytes) -> bool:
        is_decoded = self._sheet.decode(self._num, data)
        self._num += is_decoded
        return is_decoded

    def take(self) -> NDArray[np.uint8]:
        """Returns the pixels of the images that were added, (num_pixels, channels), and forgets them."""
        pixels = self._sheet.pixels()[: self._num].reshape(-1, self.channels)
        self._num = 0
        return pixels


def _mean_and_std(counts: NDArray[np.int64]) -> tuple[float, float]:
    # Python integers: the sum of squares of a large dataset leaves 64 bits.
    total = int(counts.sum())
    first = sum(level * count for level, count in enumerate(counts.tolist()))
    second = sum(level * level * count for level, count in enumerate(counts.tolist()))
    variance = (second * total - first * first) / (total * total)
    return first / total / 255, variance**0.5 / 255


def _median(counts: Counter[int]) -> int:
    remaining = (counts.total() + 1) // 2
    for value in sorted(counts):
        remaining -= counts[value]
        if remaining <= 0:
            return value
    raise ValueError("no image was counted")
