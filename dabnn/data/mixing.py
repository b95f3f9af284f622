r"""Two images in one: mixup (Zhang et al., arXiv 1710.09412) and CutMix (Yun et al., arXiv 1905.04899).

With a share w ~ Beta(alpha, alpha) of the sample's own image x, and the partner's image x':

- mixup: w x + (1 - w) x', of normalised pixels;
- CutMix: x with a rectangle of x' in it, at a uniform centre, sqrt(1 - w) times as high and wide as the image and cut
  off at its edges; w then becomes the share of x that is left.

The loss is w CE(label) + (1 - w) CE(partner's label). Where both are switched on, even chances decide for each sample.
Both images are augmented as their own samples are, and the share is drawn for each sample by itself.
"""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dabnn.data.draws import Draws, Purpose
from dabnn.spec import AugmentSpec

_ATTEMPTS, _PER_ATTEMPT = 8, 3
_PER_GAMMA = 1 + _ATTEMPTS * _PER_ATTEMPT
_KIND, _ROW, _COLUMN, _FIRST_SHARE = 0, 1, 2, 3
_NUM_NUMBERS = _FIRST_SHARE + 2 * _PER_GAMMA


def mix(
    pixels: Tensor, partners: NDArray[np.int64], spec: AugmentSpec, draws: Draws, normalise: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Mixes each of the first images with its partner.

    Args:
        pixels: uint8 (m, C, H, W): n <= m samples, then those that are partners only.
        partners: (n,): positions among all of them; a sample that is its own partner stays as it is.
        spec: How.
        draws: Of the n samples.
        normalise: From uint8 pixels to what mixup is a mean of.

    Returns:
        The n images, float where mixup is switched on and else uint8, and float32 (n,): the share of each one's label.
    """
    numbers = draws.uniform(Purpose.MIXING, _NUM_NUMBERS)
    own = np.arange(len(partners))
    is_cut = numbers[:, _KIND] < (0.5 if spec.mixup and spec.cutmix else float(spec.cutmix > 0))
    is_mixed = partners != own
    weights = np.ones(len(partners), dtype=np.float32)
    images = pixels[: len(partners)].clone()
    cut = np.flatnonzero(is_cut & is_mixed)
    if len(cut):
        shares = beta(spec.cutmix, numbers[cut, _FIRST_SHARE:])
        boxes = cut_boxes(shares, images.shape[2], images.shape[3], numbers[cut][:, [_ROW, _COLUMN]])
        for row, (top, bottom, left, right) in zip(cut.tolist(), boxes.tolist(), strict=True):
            images[row, :, top:bottom, left:right] = pixels[partners[row], :, top:bottom, left:right]
        area = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])
        weights[cut] = 1 - area / (images.shape[2] * images.shape[3])
    if not spec.mixup:
        return images, torch.from_numpy(weights)
    images = normalise(images)
    blended = np.flatnonzero(~is_cut & is_mixed)
    weights[blended] = beta(spec.mixup, numbers[blended, _FIRST_SHARE:])
    rows, share = torch.from_numpy(blended), torch.from_numpy(weights[blended])[:, None, None, None]
    images[rows] = share * images[rows] + (1 - share) * normalise(pixels[torch.from_numpy(partners[blended])])
    return images, torch.from_numpy(weights)


def cut_boxes(shares: NDArray[np.float64], height: int, width: int, numbers: NDArray[np.float64]) -> NDArray[np.int64]:
    """Returns CutMix's rectangles, as torchvision's `CutMix` computes them.

    Args:
        shares: (n,): of the image, that are to be kept.
        height: Of the images.
        width: Of the images.
        numbers: (n, 2): row and column of the centre, as fractions in [0, 1).

    Returns:
        int64 (n, 4): top, bottom, left, right, cut off at the image's edges.
    """
    sides = []
    for length, centre in ((height, numbers[:, 0]), (width, numbers[:, 1])):
        middle = np.floor(centre * length)
        half = np.floor(0.5 * np.sqrt(1 - shares) * length)
        sides += [np.clip(middle - half, 0, length), np.clip(middle + half, 0, length)]
    return np.stack(sides, axis=1).astype(np.int64)


def beta(alpha: float, numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns G / (G + G') for independent G, G' ~ Gamma(alpha), which is distributed as Beta(alpha, alpha).

    Args:
        alpha: Above 0.
        numbers: (n, 50), uniform in [0, 1).
    """
    first, second = (
        _log_gamma_variate(alpha, numbers[:, :_PER_GAMMA]),
        _log_gamma_variate(alpha, numbers[:, _PER_GAMMA:]),
    )
    # The logarithms do not underflow where alpha is small; their difference may be too large for exp.
    return 1 / (1 + np.exp(np.minimum(second - first, 700.0)))


def _log_gamma_variate(alpha: float, numbers: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns logarithms of Gamma(alpha) variates.

    Marsaglia and Tsang: A simple method for generating gamma variables, 2000. For alpha below 1, Gamma(alpha) =
    Gamma(alpha + 1) U^(1 / alpha). An attempt fails with a probability below 5 %; after eight failures, once in 10^10,
    the most likely value is taken.
    """
    boost, attempts = 1 - numbers[:, 0], numbers[:, 1:].reshape(len(numbers), _ATTEMPTS, _PER_ATTEMPT)
    shape = (alpha if alpha >= 1 else alpha + 1) - 1 / 3
    normal = np.sqrt(-2 * np.log(1 - attempts[..., 0])) * np.cos(2 * np.pi * attempts[..., 1])
    cube = (1 + normal / np.sqrt(9 * shape)) ** 3
    log_cube = np.log(np.where(cube > 0, cube, 1.0))
    is_good = (cube > 0) & (np.log(1 - attempts[..., 2]) < normal**2 / 2 + shape - shape * cube + shape * log_cube)
    chosen = np.take_along_axis(log_cube, is_good.argmax(axis=1)[:, None], axis=1)[:, 0]
    found: NDArray[np.float64] = np.log(shape) + np.where(is_good.any(axis=1), chosen, 0.0)
    return found if alpha >= 1 else found + np.log(boost) / alpha
