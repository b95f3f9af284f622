"""Parts of an image that a network evaluates: its centre, or the ten crops whose answers `dabnn.evaluate` averages.

The positions are those of torchvision's `CenterCrop` and `TenCrop`. Pixels are cut out as they are: the reference
program (arXiv 1804.02941) went through floating point on the way, which lowered 159 of the 256 gray levels by one.
"""

import torch
from torch import Tensor


def centre_crop(pixels: Tensor, size: int) -> Tensor:
    """Cuts the middle out of an image.

    Args:
        pixels: (C, H, W), with H and W at least `size`.
        size: Height and width of the result.

    Returns:
        (C, size, size), from row round((H - size) / 2) and column round((W - size) / 2) on, halves to even: a view.
    """
    top, left = (round((length - size) / 2) for length in pixels.shape[1:])
    return pixels[:, top : top + size, left : left + size]


def ten_crops(pixels: Tensor, size: int) -> Tensor:
    """Cuts out the centre and the four corners of an image, and the same five of its mirror image.

    Args:
        pixels: (C, H, W), with H and W at least `size`.
        size: Height and width of a crop.

    Returns:
        (10, C, size, size): top left, top right, bottom left, bottom right, centre, then those of the mirror image.
    """
    return torch.stack([*_five_crops(pixels, size), *_five_crops(pixels.flip(-1), size)])


def _five_crops(pixels: Tensor, size: int) -> list[Tensor]:
    start, end = slice(None, size), slice(-size, None)
    corners = [pixels[:, rows, columns] for rows in (start, end) for columns in (start, end)]
    return [*corners, centre_crop(pixels, size)]
