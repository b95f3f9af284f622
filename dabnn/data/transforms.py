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

Everything that depends on the image's size, or on chance, works on single images in uint8; scaling and normalization
work on the whole batch, where they cost a tenth. torchvision itself is imported for augmentation only: it pulls in
torch's compiler, which makes the start of every process longer by as much as torch does. A gray drawing of 1111 x 1111
pixels costs 9 ms in training on one core of an AMD EPYC, 5 to 7 of them for its PNG; one in RGB costs twice that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dabnn.choices import unknown_choice
from dabnn.data.crops import centre_crop, ten_crops
from dabnn.data.images import convert_channels
from dabnn.data.manifest import ImageInfo
from dabnn.errors import InvalidInputError

if TYPE_CHECKING:
    from PIL.Image import Image

    Augmentation = Callable[[Image], Image]

NAMES = ("auto", "plain", "crop_flip", "sketch", "sketch_no_flip", "imagenet")
# Those that cut the input out of a larger image, so that there is more than one crop to evaluate.
CROPPING = ("sketch", "sketch_no_flip", "imagenet")
_SKETCHES = ("sketch", "sketch_no_flip")
_PAPER = 255
_MAX_ANGLE = 10.0


@dataclass(frozen=True)
class Transform:
    """Turns images into normalised tensors of one size; `make_transform` makes one.

    Attributes:
        input_size: Height and width that the network takes, in pixels.
        in_channels: 1 (gray) or 3 (RGB).
        mean: Per channel, of values in [0, 1], after inversion.
        std: Per channel, of values in [0, 1].
        augmentation: A random transform of an image to one of the input size, or None. Its randomness must come from
            torch's default generator, which the stream seeds for each sample.
        side: What the shorter side is resized to, the aspect kept; 0 resizes to a square of the input size instead,
            None leaves the image as it is.
        is_inverted: Whether dark strokes on light paper become light ones on black.
        is_ten_crop: Whether an image becomes its ten crops.
    """

    input_size: int
    in_channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: "Augmentation | None" = None
    side: int | None = 0
    is_inverted: bool = False
    is_ten_crop: bool = False

    def sample(self, image: "Image") -> Tensor:
        """Converts the colours, resizes (bilinear, antialiased) where the size differs, augments or crops, inverts.

        Args:
            image: A decoded image of any size.

        Returns:
            uint8 (C, S, S), or (10, C, S, S) with `is_ten_crop`.
        """
        image = self._resize(convert_channels(image, self.in_channels))
        if self.augmentation is not None:
            image = self.augmentation(image)
        rows = torch.from_numpy(np.array(image))
        pixels = rows[None] if self.in_channels == 1 else rows.permute(2, 0, 1)
        if self.is_inverted:
            pixels = 255 - pixels
        return (ten_crops if self.is_ten_crop else centre_crop)(pixels, self.input_size)

    def _resize(self, image: "Image") -> "Image":
        from PIL.Image import Resampling

        if self.side is None:
            return image
        size = (self.input_size, self.input_size)
        if self.side:
            shorter = min(image.size)
            size = (self.side * image.width // shorter, self.side * image.height // shorter)
        return image if image.size == size else image.resize(size, Resampling.BILINEAR)

    def batch(self, pixels: Tensor) -> Tensor:
        """Scales and normalises: `(pixels * (1 / 255) - mean) / std`, in float32 and in this order.

        Args:
            pixels: uint8 (N, C, S, S), or (N, 10, C, S, S).

        Returns:
            float32 of the same shape.
        """
        mean, std = (torch.tensor(values, device=pixels.device)[:, None, None] for values in (self.mean, self.std))
        return pixels.to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / 255).sub_(mean).div_(std)

    def __call__(self, image: "Image") -> Tensor:
        """Transforms a single image; float32 (C, S, S), or (10, C, S, S)."""
        return self.batch(self.sample(image)[None])[0]


def make_transform(
    name: str,
    *,
    input_size: int,
    in_channels: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    training: bool,
    ten_crop: bool = False,
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
        augmentation=_augmentation(name, input_size) if training else None,
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


def _augmentation(name: str, input_size: int) -> "Augmentation | None":
    if name in ("auto", "plain"):
        return None
    from torchvision.transforms import v2

    flip = v2.RandomHorizontalFlip()
    part = v2.RandomResizedCrop(input_size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
    rotation = v2.RandomRotation(_MAX_ANGLE, interpolation=v2.InterpolationMode.BICUBIC, fill=_PAPER)
    steps = {
        "crop_flip": [v2.RandomCrop(input_size, padding=input_size // 8), flip],
        "sketch": [part, flip, rotation],
        "sketch_no_flip": [part, rotation],
        "imagenet": [part, flip],
    }
    composed: Augmentation = v2.Compose(steps[name])
    return composed
