"""Transforms: equal to torchvision's own, and refused where they cannot be."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from dabnn.data.transforms import Transform, make_transform
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


def make(name: str, size: int, channels: int, training: bool = False) -> Transform:
    return make_transform(
        name, input_size=size, in_channels=channels, mean=MEAN[:channels], std=STD[:channels], training=training
    )


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
    torch.manual_seed(0)
    variants = {training.sample(image).numpy().tobytes() for _ in range(20)}
    assert len(variants) > 5
    assert torch.equal(evaluation(image), make("plain", 16, 3)(image))


def test_crop_flip_moves_by_at_most_an_eighth() -> None:
    image = Image.fromarray(np.full((16, 16, 3), 255, dtype=np.uint8))
    transform = make("crop_flip", 16, 3, training=True)
    torch.manual_seed(0)
    kept = [int(transform.sample(image)[0].ne(0).sum()) for _ in range(50)]
    assert min(kept) >= 14 * 14
    assert max(kept) == 16 * 16


def test_auto_is_plain() -> None:
    assert make("auto", 8, 3, training=True) == make("plain", 8, 3)


def test_a_transform_travels_to_another_process() -> None:
    transform = make("crop_flip", 8, 3, training=True)
    copy = pickle.loads(pickle.dumps(transform))
    image = picture(8, 8)
    torch.manual_seed(1)
    here = transform.sample(image)
    torch.manual_seed(1)
    assert torch.equal(copy.sample(image), here)


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(InvalidInputError, match=r"^data\.transform: 'cropflip' is not known. Did you mean 'crop_flip'"):
        make("cropflip", 8, 3)


def test_two_channels_are_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"^model\.in_channels: 2"):
        make("plain", 8, 2)


def test_statistics_of_another_channel_count_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="1 and 1 values for 3 channels"):
        make_transform("plain", input_size=8, in_channels=3, mean=(0.5,), std=(0.5,), training=False)
