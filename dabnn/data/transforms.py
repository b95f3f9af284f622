"""From a decoded image to the network's input: the pixels that torchvision's v2 transforms give.

| name | an image for training | an image for evaluation |
| --- | --- | --- |
| plain | resized to S x S | the same |
| crop_flip | resized to S x S, padded by S // 8 with black, cut out at random, mirrored | resized to S x S |
| sketch | shorter side resized to R, any part of it, mirrored, rotated, inverted | R, centre crop, inverted |
| sketch_no_flip | as sketch, never mirrored | as sketch |
| imagenet | any part of it, mirrored | shorter side resized to R, centre crop |

S is the network's input size, R is `resized_side(S)`. "Any part" is 8 to 100 % of the area at an aspect of 3/4 to 4/3,
resized to S x S. Mirrored means every other image. These are the transforms of the reference program (arXiv
1804.02941): plain for its CIFAR-10, crop_flip for CIFAR-100 (4 pixels of 32), sketch for TU-Berlin and sketch_no_flip
for Sketchy, imagenet. Two things differ: rotation uncovers corners of paper, not of ink, and its angle is not whole.
What a run adds to them (`AugmentSpec`) is in docs/transforms.md.

What depends on the size of an image works on Pillow images one by one, all else on batches: `fit` makes an image of
the network's size, `finish` augments a batch of those, both in uint8, and `batch` scales and normalises. torchvision
itself is not imported: it pulls in torch's compiler, which makes a process start later by as much as torch does.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dabnn.choices import unknown_choice
from dabnn.data.augment import Augmentation
from dabnn.data.crops import (
    NUM_ATTEMPTS,
    NUM_CROPS,
    NUMBERS_PER_ATTEMPT,
    any_part,
    centre_box,
    part_of_resized,
    ten_crops,
)
from dabnn.data.draws import Draws, Purpose
from dabnn.data.images import convert_channels
from dabnn.data.manifest import ImageInfo
from dabnn.data.randaugment import MAX_MAGNITUDE
from dabnn.errors import InvalidInputError
from dabnn.spec import AugmentSpec

if TYPE_CHECKING:
    from PIL.Image import Image

NAMES = ("auto", "plain", "crop_flip", "sketch", "sketch_no_flip", "imagenet")
# Those that cut the input out of a larger image, so that there is more than one crop to evaluate.
CROPPING = ("sketch", "sketch_no_flip", "imagenet")
_SKETCHES = ("sketch", "sketch_no_flip")
_PAPER = 255
_MAX_ANGLE = 10.0
_PART_NUMBERS = NUM_ATTEMPTS * NUMBERS_PER_ATTEMPT
_PART_SCALE, _PART_RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Transform:
    """Turns images into normalised tensors of one size; `make_transform` makes one.

    Attributes:
        input_size: Height and width that the network takes, in pixels.
        in_channels: 1 (gray) or 3 (RGB).
        mean: Per channel, of values in [0, 1], after inversion.
        std: Per channel, of values in [0, 1].
        augmentation: What is done at random, or None.
        side: What the shorter side is resized to, the aspect kept; 0 resizes to a square of the input size instead,
            None leaves the image as it is.
        is_inverted: Whether dark strokes on light paper become light ones on black.
        is_ten_crop: Whether an image becomes its ten crops.
    """

    input_size: int
    in_channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Augmentation | None = None
    side: int | None = 0
    is_inverted: bool = False
    is_ten_crop: bool = False

    @property
    def fitted_size(self) -> tuple[int, int]:
        """Width and height of what `fit` returns."""
        return (self.input_size, self.input_size * (NUM_CROPS if self.is_ten_crop else 1))

    @property
    def added(self) -> AugmentSpec:
        """What a run adds to the transform."""
        return AugmentSpec() if self.augmentation is None else self.augmentation.spec

    def keeps(self, size: tuple[int, int]) -> bool:
        """Whether `fit` returns an image of this width and height, in the right channels, as it is."""
        has_part = self.augmentation is not None and self.augmentation.has_part
        return self.side == 0 and size == self.fitted_size and not has_part

    def parts(self, draws: Draws) -> list[list[float]]:
        """Returns for each sample the random numbers that `fit` takes: none, where it is not random."""
        if self.augmentation is None or not self.augmentation.has_part:
            return [[]] * len(draws.indices)
        numbers: list[list[float]] = draws.uniform(Purpose.PART, _PART_NUMBERS).tolist()
        return numbers

    def fit(self, image: "Image", numbers: Sequence[float]) -> "Image":
        """Converts the colours and resizes (bilinear, antialiased) to the network's size, or crops to it.

        Args:
            image: A decoded image of any size.
            numbers: What `parts` returned for this sample.

        Returns:
            S x S; with `is_ten_crop` S x 10 S, one crop below the other.
        """
        from PIL.Image import Resampling

        image = convert_channels(image, self.in_channels)
        square = (self.input_size, self.input_size)
        size = self._resized(image.size)
        if numbers:
            part = part_of_resized(image, size, any_part(size, _PART_SCALE, _PART_RATIO, numbers))
            return part if part.size == square else part.resize(square, Resampling.BILINEAR)
        if self.is_ten_crop:
            return ten_crops(part_of_resized(image, size, (0, 0, *size)), self.input_size)
        return part_of_resized(image, size, centre_box(size, self.input_size))

    def finish(self, pixels: NDArray[np.uint8], draws: Draws) -> Tensor:
        """Augments and inverts a batch.

        Args:
            pixels: uint8 (n, height, width, channels) of `fitted_size`; may be overwritten.
            draws: Of the n samples.

        Returns:
            uint8 (n, C, S, S), or (n, 10, C, S, S) with `is_ten_crop`.
        """
        if self.augmentation is not None:
            pixels = self.augmentation.apply(pixels, draws)
        if self.is_inverted:
            pixels = np.subtract(255, pixels, dtype=np.uint8)
        if self.augmentation is not None:
            self.augmentation.erase(pixels, draws, [round(255 * value) for value in self.mean])
        shape = (NUM_CROPS, self.input_size) if self.is_ten_crop else (self.input_size,)
        planes = torch.from_numpy(pixels).reshape(len(pixels), *shape, self.input_size, self.in_channels)
        return planes.movedim(-1, -3).contiguous()

    def sample(self, image: "Image") -> Tensor:
        """Returns what `fit` and `finish` make of one image for evaluation: uint8 (C, S, S), or (10, C, S, S)."""
        nothing = Draws(0, 0, np.zeros(1, dtype=np.int64))
        fitted = np.array(self.fit(image, self.parts(nothing)[0]))
        return self.finish(fitted.reshape(1, *fitted.shape[:2], self.in_channels), nothing)[0]

    def batch(self, pixels: Tensor) -> Tensor:
        """Scales and normalises: `(pixels * (1 / 255) - mean) / std`, in float32 and in this order.

        Args:
            pixels: uint8 (N, C, S, S), or (N, 10, C, S, S), on any device. Floating ones are normalised already, as
                those that mixup made are, and come back as they are.

        Returns:
            float32 of the same shape.
        """
        if pixels.is_floating_point():
            return pixels
        mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (self.mean, self.std))
        return pixels.to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / 255).sub_(mean).div_(std)

    def __call__(self, image: "Image") -> Tensor:
        """Transforms a single image for evaluation; float32 (C, S, S), or (10, C, S, S)."""
        return self.batch(self.sample(image)[None])[0]

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        if self.side is None:
            return size
        if self.side == 0:
            return (self.input_size, self.input_size)
        shorter = min(size)
        return (self.side * size[0] // shorter, self.side * size[1] // shorter)


def make_transform(
    name: str,
    *,
    input_size: int,
    in_channels: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    training: bool,
    ten_crop: bool = False,
    augment: AugmentSpec | None = None,
) -> Transform:
    """Makes a transform by name; the table at the top of this module says what each does, and `auto` is `plain`.

    Args:
        name: One of `NAMES`.
        input_size: Height and width that the network takes, in pixels.
        in_channels: 1 or 3.
        mean: Per channel, of values in [0, 1]; see `normalization_for`.
        std: Per channel, of values in [0, 1].
        training: Whether to augment.
        ten_crop: Whether an image for evaluation becomes ten crops, see `dabnn.data.crops`.
        augment: What is added to the transform in training.

    Returns:
        The transform.

    Raises:
        InvalidInputError: The name is unknown, or the numbers do not fit each other.
    """
    if name not in NAMES:
        raise unknown_choice("data.transform", name, NAMES)
    if in_channels not in (1, 3):
        raise InvalidInputError(f"model.in_channels: {in_channels}; images have 1 (gray) or 3 (RGB) channels")
    if input_size < 1:
        raise InvalidInputError(f"model.input_size: {input_size}; an image is at least 1 pixel wide")
    if (len(mean), len(std)) != (in_channels, in_channels):
        raise InvalidInputError(f"data.mean, data.std: {len(mean)} and {len(std)} values for {in_channels} channels")
    if ten_crop and name not in CROPPING:
        raise InvalidInputError(
            f"data.ten_crop: {name} resizes images to the very size of the input, which leaves nothing to crop; use "
            f"one of {', '.join(CROPPING)}"
        )
    side = resized_side(input_size) if name in CROPPING else 0
    return Transform(
        input_size,
        in_channels,
        mean,
        std,
        augmentation=_augmentation(name, input_size, augment or AugmentSpec()) if training else None,
        side=None if training and name == "imagenet" else side,
        is_inverted=name in _SKETCHES,
        is_ten_crop=ten_crop and not training,
    )


def normalization_for(
    name: str,
    image: ImageInfo,
    in_channels: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns the mean and standard deviation that a transform normalises with.

    Inverting pixels in [0, 1] leaves their deviation and turns a mean m into 1 - m.

    Args:
        name: Name of the transform.
        image: What the training images look like; used where nothing else is given.
        in_channels: 1 or 3.
        mean: A fixed mean per channel, of the pixels as the network gets them: inverted, where the transform inverts.
        std: A fixed deviation per channel.
    """
    found_mean, found_std = image.normalization(in_channels)
    if name in _SKETCHES:
        found_mean = tuple(1 - value for value in found_mean)
    return tuple(found_mean if mean is None else mean), tuple(found_std if std is None else std)


def resized_side(input_size: int) -> int:
    """Returns the shorter side of an image before an input of `input_size` is cut out of it.

    256 pixels for 224 and for 225, as in the reference program; in proportion for other sizes, round(8/7 input_size).
    """
    return 256 if input_size == 225 else round(input_size * 8 / 7)


def _augmentation(name: str, input_size: int, spec: AugmentSpec) -> Augmentation | None:
    _check(spec)
    if name in ("auto", "plain"):
        return None if spec == AugmentSpec() else Augmentation(spec=spec)
    if name == "crop_flip":
        return Augmentation(padding=input_size // 8, is_mirrored=True, spec=spec)
    if name == "imagenet":
        return Augmentation(has_part=True, is_mirrored=True, spec=spec)
    return Augmentation(has_part=True, is_mirrored=name == "sketch", max_angle=_MAX_ANGLE, paper=_PAPER, spec=spec)


def _check(spec: AugmentSpec) -> None:
    if spec.randaugment_ops < 0 or not 0 <= spec.randaugment_magnitude <= MAX_MAGNITUDE:
        raise InvalidInputError(
            f"data.augment.randaugment: {spec.randaugment_ops} operations of magnitude {spec.randaugment_magnitude}; "
            f"the magnitude is 0 to {MAX_MAGNITUDE}"
        )
    if not 0 <= spec.erasing <= 1:
        raise InvalidInputError(f"data.augment.erasing: {spec.erasing}; a probability is 0 to 1")
    for name, alpha in (("mixup", spec.mixup), ("cutmix", spec.cutmix)):
        if not 0 <= alpha < math.inf:
            raise InvalidInputError(f"data.augment.{name}: {alpha}; the parameter of Beta is above 0, and 0 for none")
