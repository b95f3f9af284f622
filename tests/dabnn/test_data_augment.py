"""Augmentation: torchvision's own operations given the parameters, and the distributions that the formulas promise."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from dabnn.data.augment import erase, mirror, shift
from dabnn.data.crops import any_part, part_of_resized, random_part
from dabnn.data.draws import Draws, Purpose
from dabnn.data.randaugment import OPERATIONS, randaugment
from dabnn.data.rotation import rotate
from dabnn.data.transforms import make_transform
from dabnn.errors import InvalidInputError
from dabnn.spec import AugmentSpec


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def uniform(num: int, per_sample: int, purpose: Purpose = Purpose.PART) -> np.ndarray:
    return Draws(0, 0, np.arange(num)).uniform(purpose, per_sample)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_shifted_image_is_torchvisions_crop_of_the_padded_one(channels: int) -> None:
    pixels, numbers = noise(40, 9, 7, channels), uniform(40, 2)
    for before, after, (down, across) in zip(pixels, shift(pixels, 2, numbers), numbers, strict=True):
        padded = F.pad(torch.from_numpy(before).permute(2, 0, 1), [2])
        expected = F.crop(padded, int(down * 5), int(across * 5), 9, 7)
        assert torch.equal(torch.from_numpy(after).permute(2, 0, 1), expected)


def test_every_shift_is_as_likely_as_any_other() -> None:
    pixels = np.arange(1, 65, dtype=np.uint8).reshape(1, 8, 8, 1).repeat(5000, 0)
    first = shift(pixels, 1, uniform(5000, 2))[:, 4, 4, 0]
    values, counts = np.unique(first, return_counts=True)
    assert len(values) == 9
    assert abs(counts / 5000 - 1 / 9).max() < 0.02


@pytest.mark.parametrize("channels", [1, 3])
def test_half_of_the_images_are_mirrored(channels: int) -> None:
    pixels, numbers = noise(1000, 5, 4, channels), uniform(1000, 1)[:, 0]
    mirrored = pixels.copy()
    mirror(mirrored, numbers)
    is_mirrored = numbers < 0.5
    assert np.array_equal(mirrored[is_mirrored], pixels[is_mirrored, :, ::-1])
    assert np.array_equal(mirrored[~is_mirrored], pixels[~is_mirrored])
    assert 450 < is_mirrored.sum() < 550


def test_an_erased_rectangle_has_the_area_and_aspect_of_the_paper() -> None:
    pixels = noise(4000, 64, 48, 3) // 2
    before = pixels.copy()
    erase(pixels, 0.25, (200, 201, 202), uniform(4000, 41))
    is_erased = (pixels == (200, 201, 202)).all(axis=3)
    assert np.array_equal(pixels[~is_erased], before[~is_erased])
    changed = is_erased.any(axis=(1, 2))
    assert abs(changed.mean() - 0.25) < 0.03
    heights, widths = is_erased.any(axis=2).sum(axis=1)[changed], is_erased.any(axis=1).sum(axis=1)[changed]
    areas = heights * widths
    assert np.array_equal(areas, is_erased.sum(axis=(1, 2))[changed])
    assert areas.min() / (64 * 48) > 0.018
    assert areas.max() / (64 * 48) < 0.34
    assert (heights / widths).min() > 0.26
    assert (heights / widths).max() < 3.7


def test_a_part_has_the_area_and_aspect_of_torchvisions_default() -> None:
    parts = np.array([any_part((90, 70), (0.08, 1.0), (3 / 4, 4 / 3), row) for row in uniform(4000, 40).tolist()])
    left, top, right, bottom = parts.T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (right <= 90).all()
    assert (bottom <= 70).all()
    areas, aspects = (right - left) * (bottom - top) / (90 * 70), (right - left) / (bottom - top)
    torch.manual_seed(0)
    crop = v2.RandomResizedCrop(1, antialias=True)
    theirs = [crop.make_params([Image.new("L", (90, 70))]) for _ in range(4000)]
    their_areas = np.array([found["height"] * found["width"] for found in theirs]) / (90 * 70)
    their_aspects = np.array([found["width"] / found["height"] for found in theirs])
    for quantile in (0.05, 0.25, 0.5, 0.75, 0.95):
        assert np.quantile(areas, quantile) == pytest.approx(np.quantile(their_areas, quantile), abs=0.04)
        assert np.quantile(aspects, quantile) == pytest.approx(np.quantile(their_aspects, quantile), abs=0.04)


@pytest.mark.parametrize(("size", "expected"), [((100, 10), (43, 0, 56, 10)), ((10, 100), (0, 43, 10, 56))])
def test_where_no_part_fits_the_centre_is_taken(size: tuple[int, int], expected: tuple[int, ...]) -> None:
    large = [0.999] * 40
    assert random_part(size, (0.08, 1.0), (3 / 4, 4 / 3), large) is None
    left, top, right, bottom = any_part(size, (0.08, 1.0), (3 / 4, 4 / 3), large)
    assert abs(np.array([left, top, right, bottom]) - expected).max() <= 1


@pytest.mark.parametrize(("side", "target"), [(224, 256), (1111, 256), (105, 128), (300, 64), (100, 73), (64, 64)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_part_of_a_resized_image_is_that_part_of_the_whole(side: int, target: int, channels: int) -> None:
    image = Image.fromarray(noise(side, side, channels).squeeze())
    whole = image.resize((target, target), Image.Resampling.BILINEAR)
    for box in np.random.default_rng(1).integers(0, target, (40, 4)):
        left, right, top, bottom = *np.sort(box[:2]).tolist(), *np.sort(box[2:]).tolist()
        place = (left, top, right + 1, bottom + 1)
        assert part_of_resized(image, (target, target), place).tobytes() == whole.crop(place).tobytes()


@pytest.mark.parametrize("density", [0.0, 0.002, 0.02, 0.5])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_rotated_drawing_is_pillows(density: float, channels: int) -> None:
    generator = np.random.default_rng(2)
    for height, width in ((1, 1), (2, 9), (31, 32), (33, 64), (60, 41)):
        for angle in (*generator.uniform(-180, 180, 8).tolist(), 0.0, 90.0, -10.0, 1e-9):
            strokes = generator.random((height, width, channels)) < density
            pixels = np.where(strokes, generator.integers(0, 256, strokes.shape), 255).astype(np.uint8)
            image = Image.fromarray(pixels.reshape((height, width, 3) if channels == 3 else (height, width)))
            colour = 7 if channels == 1 else (7, 7, 7)
            expected = np.asarray(image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=colour))
            assert np.array_equal(rotate(pixels, angle, 7), expected.reshape(pixels.shape))


def in_torchvision(name: str, image: Image.Image, magnitude: int, sign: float, paper: int) -> Image.Image:
    """The operation of `v2.RandAugment` with the parameter that its table gives."""
    space = v2.RandAugment._AUGMENTATION_SPACE
    torchvision_name = {"colour": "Color", "autocontrast": "AutoContrast"}.get(
        name, "".join(word.capitalize() for word in name.split("_"))
    )
    magnitudes, is_signed = space[torchvision_name]
    values = magnitudes(31, image.height, image.width)
    value = 0.0 if values is None else float(values[magnitude]) * (sign if is_signed else 1.0)
    transform = v2.RandAugment(fill=paper)
    return transform._apply_image_or_video_transform(
        image, torchvision_name, value, interpolation=v2.InterpolationMode.NEAREST, fill=transform._fill
    )


@pytest.mark.parametrize("name", list(OPERATIONS))
@pytest.mark.parametrize("channels", [1, 3])
def test_every_operation_of_randaugment_is_torchvisions(name: str, channels: int) -> None:
    pixels = noise(37, 41, channels)
    image = Image.fromarray(pixels.squeeze())
    which = (list(OPERATIONS).index(name) + 0.5) / len(OPERATIONS)
    for magnitude in (0, 1, 9, 15, 30):
        for sign in (-1.0, 1.0):
            found = randaugment(pixels, 1, magnitude, [which, 0.25 if sign < 0 else 0.75], 200)
            expected = np.asarray(in_torchvision(name, image, magnitude, sign, 200)).reshape(pixels.shape)
            # torchvision's parameters are float32, so a point between two pixels, or a value between two levels, may
            # fall to the other one.
            difference = np.abs(found.astype(int) - expected)
            is_moved = name.startswith("shear") or name == "rotate"
            assert (difference > 0).mean() < 0.02 if is_moved else difference.max() <= 1


def test_the_operations_of_randaugment_are_torchvisions_in_its_order() -> None:
    assert len(OPERATIONS) == len(v2.RandAugment._AUGMENTATION_SPACE) == 14


def make(**spec: float) -> object:
    return make_transform(
        "plain", input_size=8, in_channels=1, mean=(0.5,), std=(0.2,), training=True, augment=AugmentSpec(**spec)
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"randaugment_ops": 2, "randaugment_magnitude": 31},
            r"^data\.augment\.randaugment: 2 operations of magnitude 31",
        ),
        ({"erasing": 1.5}, r"^data\.augment\.erasing: 1\.5"),
        ({"mixup": -0.1}, r"^data\.augment\.mixup: -0\.1"),
        ({"cutmix": float("inf")}, r"^data\.augment\.cutmix: inf"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(spec: dict[str, float], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        make(**spec)


def test_erasing_fills_with_the_mean_that_the_network_gets() -> None:
    transform = make_transform(
        "sketch",
        input_size=32,
        in_channels=1,
        mean=(0.201,),
        std=(0.3,),
        training=True,
        augment=AugmentSpec(erasing=1.0),
    )
    draws = Draws(0, 0, np.arange(20))
    white = np.full((20, 32, 32, 1), 255, dtype=np.uint8)
    pixels = transform.finish(white, draws)
    assert set(pixels.unique().tolist()) == {0, 51}
    assert float(transform.batch(torch.full((1, 1, 1, 1), 51, dtype=torch.uint8)).abs()) < 1 / 510 / 0.3
