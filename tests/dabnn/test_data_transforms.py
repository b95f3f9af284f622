"""Transforms: equal to torchvision's own, and refused where they cannot be."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from dabnn.data.crops import any_part, ten_crops
from dabnn.data.draws import Draws, Purpose
from dabnn.data.manifest import ImageInfo
from dabnn.data.transforms import CROPPING, NAMES, Transform, make_transform, normalization_for, resized_side
from dabnn.errors import InvalidInputError

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


def picture(height: int, width: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def reference(image: Image.Image, size: int, channels: int) -> torch.Tensor:
    """What torchvision's composition of single-image transforms gives."""
    return v2.Compose(
        [
            v2.Lambda(lambda opened: opened.convert("RGB")) if channels == 3 else v2.Grayscale(1),
            v2.Resize((size, size), antialias=True),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN[:channels], STD[:channels]),
        ]
    )(image)


def make(name: str, size: int, channels: int, training: bool = False, ten_crop: bool = False) -> Transform:
    return make_transform(
        name,
        input_size=size,
        in_channels=channels,
        mean=MEAN[:channels],
        std=STD[:channels],
        training=training,
        ten_crop=ten_crop,
    )


def augmented(transform: Transform, image: Image.Image, num: int, epoch: int = 0) -> torch.Tensor:
    """What becomes of `num` samples that all hold one image."""
    draws = Draws(0, epoch, np.arange(num))
    fitted = [np.array(transform.fit(image, numbers)) for numbers in transform.parts(draws)]
    return transform.finish(np.stack(fitted).reshape(num, *fitted[0].shape[:2], transform.in_channels), draws)


def drawing(height: int, width: int, mode: str = "L") -> Image.Image:
    """A few dark strokes on white paper."""
    image = Image.new("RGB", (width, height), "white")
    ends = np.random.default_rng(1).integers(0, max(height, width), (9, 4)).tolist()
    for line in ends:
        ImageDraw.Draw(image).line(line, fill="black", width=max(height // 60, 1))
    return image.convert(mode)


def in_torchvision(name: str, size: int) -> list[torch.nn.Module]:
    """What the transform of that name is for evaluation in torchvision's terms, from a converted image to pixels."""
    crop = [v2.Resize(resized_side(size), antialias=True), v2.CenterCrop(size)]
    if name == "crop_flip":
        return [v2.Resize((size, size), antialias=True)]
    return crop if name == "imagenet" else [*crop, v2.Lambda(F.invert)]


def in_torchvisions_operations(name: str, size: int, image: Image.Image, draws: Draws, position: int) -> torch.Tensor:
    """What torchvision's functional operations make of a training image with the parameters of our draws."""
    mirrored, angle, moved, part = (
        draws.uniform(purpose, num)[position].tolist()
        for purpose, num in ((Purpose.MIRROR, 1), (Purpose.ROTATION, 1), (Purpose.SHIFT, 2), (Purpose.PART, 40))
    )
    if name == "crop_flip":
        padding = size // 8
        top, left = (int(number * (2 * padding + 1)) for number in moved)
        image = F.crop(F.pad(F.resize(image, [size, size]), [padding]), top, left, size, size)
    else:
        image = image if name == "imagenet" else F.resize(image, [resized_side(size)])
        left, top, right, bottom = any_part(image.size, (0.08, 1), (3 / 4, 4 / 3), part)
        image = F.resized_crop(image, top, left, bottom - top, right - left, [size, size])
    if mirrored[0] < 0.5 and name != "sketch_no_flip":
        image = F.horizontal_flip(image)
    if name.startswith("sketch"):
        degrees = (2 * angle[0] - 1) * 10.0
        image = F.rotate(image, degrees, interpolation=v2.InterpolationMode.BICUBIC, fill=255)
        image = F.invert(image)
    return F.pil_to_tensor(image)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(32, 32), (20, 41), (64, 48)])
def test_plain_is_bit_for_bit_torchvisions_composition(mode: str, channels: int, shape: tuple[int, int]) -> None:
    image = picture(*shape, mode)
    opened = image if channels == 3 or mode == "L" else image.convert("RGB")
    expected = reference(opened, 32, channels)
    assert torch.equal(make("plain", 32, channels)(image), expected)


def test_a_batch_is_normalised_as_its_images_are() -> None:
    transform = make("plain", 8, 3)
    images = [picture(8, 8), picture(5, 9), picture(30, 8)]
    together = transform.batch(torch.stack([transform.sample(image) for image in images]))
    assert torch.equal(together, torch.stack([transform(image) for image in images]))
    assert together.dtype == torch.float32


def test_one_bit_strokes_are_made_gray_before_they_are_resized() -> None:
    strokes = picture(100, 100, "1")
    pixels = make("plain", 32, 1).sample(strokes)
    assert len(pixels.unique()) > 2


def test_crop_flip_augments_in_training_only() -> None:
    image = picture(16, 16)
    training, evaluation = make("crop_flip", 16, 3, training=True), make("crop_flip", 16, 3)
    assert len({pixels.numpy().tobytes() for pixels in augmented(training, image, 20)}) > 5
    assert torch.equal(evaluation(image), make("plain", 16, 3)(image))


def test_crop_flip_moves_by_at_most_an_eighth() -> None:
    image = Image.fromarray(np.full((16, 16, 3), 255, dtype=np.uint8))
    transform = make("crop_flip", 16, 3, training=True)
    kept = [int(pixels[0].ne(0).sum()) for pixels in augmented(transform, image, 50)]
    assert min(kept) >= 14 * 14
    assert max(kept) == 16 * 16


def test_auto_is_plain() -> None:
    assert make("auto", 8, 3, training=True) == make("plain", 8, 3)


def test_a_transform_travels_to_another_process() -> None:
    transform = make("crop_flip", 8, 3, training=True)
    copy = pickle.loads(pickle.dumps(transform))
    image = picture(8, 8)
    assert torch.equal(augmented(copy, image, 5), augmented(transform, image, 5))


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(InvalidInputError, match=r"^data\.transform: 'cropflip' is not known. Did you mean 'crop_flip'"):
        make("cropflip", 8, 3)


def test_two_channels_are_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"^model\.in_channels: 2"):
        make("plain", 8, 2)


def test_statistics_of_another_channel_count_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="1 and 1 values for 3 channels"):
        make_transform("plain", input_size=8, in_channels=3, mean=(0.5,), std=(0.5,), training=False)


SHAPES = [(32, (50, 40)), (32, (32, 32)), (57, (60, 83)), (225, (300, 299)), (224, (224, 224)), (224, (111, 111))]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("auto", "plain")])
@pytest.mark.parametrize(("size", "shape"), SHAPES)
def test_every_transform_is_torchvisions_for_evaluation(name: str, size: int, shape: tuple[int, int]) -> None:
    for channels, mode in ((1, "L"), (3, "RGB")):
        for image in (drawing(*shape, mode), picture(*shape, mode)):
            composed = v2.Compose([*in_torchvision(name, size), v2.PILToTensor()])
            assert torch.equal(make(name, size, channels).sample(image), composed(image))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("auto", "plain")])
@pytest.mark.parametrize(("size", "shape"), SHAPES)
def test_every_training_transform_is_torchvisions_operations_with_our_draws(
    name: str, size: int, shape: tuple[int, int]
) -> None:
    draws = Draws(0, 0, np.arange(6))
    for channels, mode in ((1, "L"), (3, "RGB")):
        for image in (drawing(*shape, mode), picture(*shape, mode)):
            for position, pixels in enumerate(augmented(make(name, size, channels, training=True), image, 6)):
                assert torch.equal(pixels, in_torchvisions_operations(name, size, image, draws, position))


@pytest.mark.parametrize(("size", "side"), [(224, 256), (225, 256), (112, 128), (64, 73), (32, 37), (299, 342), (1, 1)])
def test_images_are_resized_to_256_for_inputs_of_224_and_in_proportion_for_others(size: int, side: int) -> None:
    assert resized_side(size) == side


@pytest.mark.parametrize("name", ["sketch", "sketch_no_flip"])
@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_a_blank_sheet_stays_blank_whatever_its_rotation(name: str, mode: str) -> None:
    sheet = Image.new(mode, (100, 90), "white")
    for channels in (1, 3):
        transform = make(name, 64, channels, training=True)
        assert not augmented(transform, sheet, 20).any()


def test_strokes_are_light_on_black_in_training_and_in_evaluation() -> None:
    image = drawing(128, 128)
    for training in (True, False):
        pixels = augmented(make("sketch", 64, 1, training), image, 3)
        assert pixels.max() > 200
        assert float(pixels.float().mean()) < 128


def test_only_one_of_the_sketch_transforms_mirrors() -> None:
    left = Image.new("L", (64, 64), 255)
    left.paste(0, (0, 0, 20, 64))

    def leans_right(name: str) -> torch.Tensor:
        pixels = augmented(make(name, 64, 1, training=True), left, 30).float()[:, 0]
        return pixels[..., 32:].sum((1, 2)) > pixels[..., :32].sum((1, 2))

    assert leans_right("sketch").any()
    assert not leans_right("sketch_no_flip").any()


@pytest.mark.parametrize("name", CROPPING)
@pytest.mark.parametrize(("size", "shape"), [(32, (50, 40)), (32, (32, 32)), (224, (256, 300)), (225, (256, 256))])
def test_ten_crops_are_torchvisions(name: str, size: int, shape: tuple[int, int]) -> None:
    image = drawing(*shape)
    steps = [v2.Resize(resized_side(size), antialias=True), v2.TenCrop(size)]
    expected = torch.stack([v2.functional.pil_to_tensor(crop) for crop in v2.Compose(steps)(image)])
    transform = make(name, size, 1, ten_crop=True)
    assert torch.equal(transform.sample(image), 255 - expected if transform.is_inverted else expected)


def test_ten_crops_keep_every_gray_level() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    image = Image.fromarray(levels)
    found = np.array(ten_crops(image, 16)).reshape(10, 16, 16)
    assert (found[:5] == levels).all()
    assert (found[5:] == levels[:, ::-1]).all()
    crops = make("sketch", 14, 1, ten_crop=True)(image)
    assert crops.shape == (10, 1, 14, 14)
    centre = make("sketch", 14, 1)(image)
    assert torch.equal(crops[4], centre)


def test_ten_crops_need_an_image_larger_than_the_input() -> None:
    with pytest.raises(InvalidInputError, match=r"^data\.ten_crop: plain resizes images .* use one of sketch, "):
        make("plain", 8, 3, ten_crop=True)


def test_training_images_are_never_ten_crops() -> None:
    assert augmented(make("sketch", 32, 1, training=True, ten_crop=True), drawing(40, 40), 2).shape == (2, 1, 32, 32)


INFO = ImageInfo(3, 8, 8, mean=(0.5, 0.6, 0.7), std=(0.1, 0.2, 0.3), gray_mean=0.9, gray_std=0.25)


def test_a_transform_that_inverts_normalises_with_the_mean_of_inverted_pixels() -> None:
    assert normalization_for("plain", INFO, 1) == ((0.9,), (0.25,))
    assert normalization_for("sketch", INFO, 1) == ((pytest.approx(0.1),), (0.25,))
    mean, std = normalization_for("sketch_no_flip", INFO, 3)
    assert mean == pytest.approx((0.5, 0.4, 0.3))
    assert std == INFO.std


def test_a_fixed_mean_and_deviation_are_those_of_the_pixels_that_the_network_gets() -> None:
    assert normalization_for("sketch", INFO, 1, [0.06], [0.93]) == ((0.06,), (0.93,))


def test_inverted_pixels_of_the_dataset_get_zero_mean_and_unit_deviation() -> None:
    image = drawing(64, 64)
    pixels = np.array(image) / 255
    info = ImageInfo(1, 64, 64, (pixels.mean(),), (pixels.std(),), pixels.mean(), pixels.std())
    mean, std = normalization_for("sketch", info, 1)
    inverted = make_transform("sketch", input_size=56, in_channels=1, mean=mean, std=std, training=False)
    whole = inverted.batch((255 - torch.from_numpy(np.array(image)))[None, None])
    assert float(whole.mean()) == pytest.approx(0, abs=1e-5)
    assert float(whole.std(correction=0)) == pytest.approx(1, abs=1e-5)
