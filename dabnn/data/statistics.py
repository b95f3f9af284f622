"""Size, colour and channel statistics of a set of images, from integer histograms: exact, and in any order the same.

Each process that builds shards counts its own; the counts are numbers that can be stored and added.
"""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dabnn.data.images import GRAY_MODES, convert_channels
from dabnn.data.manifest import ImageInfo

if TYPE_CHECKING:
    from PIL.Image import Image

_RGB, _GRAY = slice(0, 3), 3
# Pillow counts the pixels of many small images at once in a tenth of the time of one by one.
_WAITING_PIXELS = 2**18


class ImageStatistics:
    """Counts pixel values and sizes, image by image."""

    def __init__(self) -> None:
        self._counts = np.zeros((4, 256), dtype=np.int64)
        self._heights: Counter[int] = Counter()
        self._widths: Counter[int] = Counter()
        self._unmeasured: tuple[set[int], set[int]] = (set(), set())
        self._is_gray = True
        self._waiting: dict[int, list[NDArray[np.uint8]]] = {1: [], 3: []}
        self._num_waiting = 0

    def add_size(self, image: "Image") -> None:
        """Takes note of size and colour, but not of pixels; one image in colour makes the dataset one of 3 channels."""
        self._is_gray = self._is_gray and image.mode in GRAY_MODES
        self._unmeasured[0].add(image.height)
        self._unmeasured[1].add(image.width)

    def add(self, image: "Image") -> None:
        """Counts an image's pixels and size: red, green, blue, and gray."""
        is_gray = image.mode in GRAY_MODES
        self._is_gray = self._is_gray and is_gray
        self._heights[image.height] += 1
        self._widths[image.width] += 1
        channels = 1 if is_gray else 3
        self._waiting[channels].append(np.asarray(convert_channels(image, channels)).reshape(-1, channels))
        self._num_waiting += image.height * image.width
        if self._num_waiting >= _WAITING_PIXELS:
            self._count_waiting()

    def merge(self, state: Mapping[str, Any]) -> None:
        """Adds what another object counted, as its `state` says."""
        self._counts += np.array(state["counts"], dtype=np.int64)
        for own, counted in ((self._heights, state["heights"]), (self._widths, state["widths"])):
            own.update({int(size): number for size, number in counted})
        for sizes, others in zip(self._unmeasured, state["unmeasured"], strict=True):
            sizes.update(others)
        self._is_gray = self._is_gray and bool(state["is_gray"])

    def state(self) -> dict[str, Any]:
        """Returns what was counted, as values that JSON knows."""
        self._count_waiting()
        return {
            "counts": self._counts.tolist(),
            "heights": sorted(self._heights.items()),
            "widths": sorted(self._widths.items()),
            "unmeasured": [sorted(sizes) for sizes in self._unmeasured],
            "is_gray": self._is_gray,
        }

    def summary(self) -> ImageInfo:
        """Returns what was counted; the pixels of at least one image must have been."""
        self._count_waiting()
        channels = 1 if self._is_gray else 3
        means, stds = zip(*(_mean_and_std(counts) for counts in self._counts), strict=True)
        heights, widths = (self._heights.keys() | self._unmeasured[0], self._widths.keys() | self._unmeasured[1])
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

    def _count_waiting(self) -> None:
        from PIL import Image

        for channels, waiting in self._waiting.items():
            if not waiting:
                continue
            # As one image of one row: for a histogram it does not matter where a pixel lies.
            pixels = np.concatenate(waiting)
            row = Image.fromarray(pixels[None, :, 0] if channels == 1 else pixels[None])
            self._counts[_GRAY] += np.array(convert_channels(row, 1).histogram())
            self._counts[_RGB] += np.array(row.histogram()).reshape(channels, 256)
            waiting.clear()
        self._num_waiting = 0


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
