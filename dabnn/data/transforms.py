"""From a decoded image to the network's input: bit for bit what torchvision's v2 transforms give.

The part that depends on the image's size, or on chance, works on single images in uint8; scaling and normalization
work on the whole batch, where they cost a tenth. torchvision itself is imported for augmentation only: it pulls in
torch's compiler, which makes the start of every process longer by as much as torch does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dabnn.choices import unknown_choice
from dabnn.data.images import convert_channels
from dabnn.errors import InvalidInputError

if TYPE_CHECKING:
    from PIL.Image import Image

NAMES = ("auto", "plain", "crop_flip")


@dataclass(frozen=True)
class Transform:
    """Turns images into normalised tensors of one size; `make_transform` makes one.

    Attributes:
        input_size: Height and width that the network takes, in pixels.
        in_channels: 1 (gray) or 3 (RGB).
        mean: Per channel, of values in [0, 1].
        std: Per channel, of values in [0, 1].
        augmentation: A random transform of a uint8 tensor (C, S, S), or None. Its randomness must come from torch's
            default generator, which the stream seeds for each sample.
    """

    input_size: int
    in_channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augmentation: Callable[[Tensor], Tensor] | None = None

    def sample(self, image: "Image") -> Tensor:
        """Converts the colours, resizes (bilinear, antialiased, to a square) where the size differs, and augments.

        Args:
            image: A decoded image of any size.

        Returns:
            uint8 (C, S, S).
        """
        from PIL.Image import Resampling

        image = convert_channels(image, self.in_channels)
        if image.size != (self.input_size, self.input_size):
            image = image.resize((self.input_size, self.input_size), Resampling.BILINEAR)
        rows = torch.from_numpy(np.array(image))
        pixels = rows[None] if self.in_channels == 1 else rows.permute(2, 0, 1)
        return pixels if self.augmentation is None else self.augmentation(pixels)

    def batch(self, pixels: Tensor) -> Tensor:
        """Scales and normalises: `(pixels * (1 / 255) - mean) / std`, in float32 and in this order.

        Args:
            pixels: uint8 (N, C, S, S).

        Returns:
            float32 (N, C, S, S).
        """
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return pixels.to(torch.float32, memory_format=torch.contiguous_format).mul_(1 / 255).sub_(mean).div_(std)

    def __call__(self, image: "Image") -> Tensor:
        """Transforms a single image; float32 (C, S, S)."""
        return self.batch(self.sample(image)[None])[0]


def make_transform(
    name: str, *, input_size: int, in_channels: int, mean: tuple[float, ...], std: tuple[float, ...], training: bool
) -> Transform:
    """Makes a transform by name.

    `plain` resizes and normalises. `crop_flip`, in training, also pads by an eighth of the size with black, crops at
    random and mirrors every other image; in evaluation it is `plain`. `auto` is `plain`.

    Args:
        name: `auto`, `plain` or `crop_flip`.
        input_size: Height and width that the network takes, in pixels.
        in_channels: 1 or 3.
        mean: Per channel, of values in [0, 1]; see `ImageInfo.normalization`.
        std: Per channel, of values in [0, 1].
        training: Whether to augment.

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
        raise InvalidInputError(f"mean, std: {len(mean)} and {len(std)} values for {in_channels} channels")
    augmentation = None
    if name == "crop_flip" and training:
        from torchvision.transforms import v2

        augmentation = v2.Compose([v2.RandomCrop(input_size, padding=input_size // 8), v2.RandomHorizontalFlip()])
    return Transform(input_size, in_channels, mean, std, augmentation)
