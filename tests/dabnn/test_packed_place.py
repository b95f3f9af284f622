"""Packed models moved to a device and a type, and what they say of images that do not fit them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from dabnn.errors import InvalidInputError
from dabnn.models import build
from dabnn.models.folding import SignThreshold
from dabnn.packed import PackedModel, pack
from dabnn.packed_conv import PackedConv2d

HALVES = [torch.bfloat16, torch.float16]


def packed_model(name: str = "bincifarfbin", **options: object) -> PackedModel:
    return pack(build(name, num_classes=7, width=0.25, input_size=16, seed=3, **options).eval())


def images(num: int = 3) -> torch.Tensor:
    return torch.randn(num, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", HALVES)
def test_float_layers_take_the_type_and_binary_ones_keep_theirs(dtype: torch.dtype) -> None:
    model = packed_model(block="bireal", activation="rprelu").to("cpu", dtype)
    for module in model.net.modules():
        if isinstance(module, PackedConv2d):
            assert module.dtype == dtype
            assert module.alpha.dtype == torch.float32
        elif isinstance(module, SignThreshold | nn.BatchNorm2d):
            assert not any(tensor.dtype == dtype for tensor in module.state_dict().values())
        elif next(module.children(), None) is None:
            assert all(tensor.dtype == dtype for tensor in module.state_dict().values())


@pytest.mark.parametrize("dtype", HALVES)
def test_logits_of_a_rounded_model_come_in_its_type_and_near_the_exact_ones(dtype: torch.dtype) -> None:
    model, x = packed_model("resnet20"), images()
    rounded = model.to("cpu", dtype)
    assert rounded.dtype == dtype
    assert rounded(x).dtype == dtype
    assert torch.equal(rounded(x), rounded(x.to(dtype)))
    torch.testing.assert_close(rounded(x).float(), model(x), rtol=0, atol=0.05 * float(model(x).abs().max()))


def test_a_moved_model_writes_the_same_file_and_can_be_moved_back(tmp_path: Path) -> None:
    model, x = packed_model(), images()
    rounded = model.to("cpu", torch.bfloat16)
    model.save(tmp_path / "before.dab")
    rounded.save(tmp_path / "after.dab")
    assert (tmp_path / "before.dab").read_bytes() == (tmp_path / "after.dab").read_bytes()
    assert rounded.to("cpu").dtype == torch.bfloat16
    assert torch.equal(rounded.to("cpu", torch.float32)(x), model(x))


@pytest.mark.parametrize("device", ["nowhere", "meta"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(InvalidInputError, match=rf"^device: {device} "):
        packed_model().to(device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_another_type_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(InvalidInputError, match=rf"^dtype: {dtype} .*bfloat16"):
        packed_model().to("cpu", dtype)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (images().byte(), r"images: torch\.uint8, .*Normalize bytes"),
        (images().double(), r"images: torch\.float64, .*\.float\(\)"),
        (images().bfloat16(), r"images: torch\.bfloat16, "),
        (images().to("meta"), r"images: on meta, and the model is on cpu\. Move"),
        (images()[:, :1], r"images: shape \(3, 1, 16, 16\) does not fit this bincifarfbin"),
        (images()[..., :8], r"images: shape \(3, 3, 16, 8\) does not fit"),
        (images()[0], r"images: shape \(3, 16, 16\) does not fit"),
        (np.zeros((1, 3, 16, 16), np.float32), r"images: a ndarray\. Give a torch tensor"),
    ],
)
def test_images_that_do_not_fit_are_named(wrong: torch.Tensor, message: str) -> None:
    with pytest.raises(InvalidInputError, match=rf"^{message}"):
        packed_model()(wrong)


def test_images_of_any_strides_and_no_images_are_taken() -> None:
    model, x = packed_model(), images(4)
    assert torch.equal(model(x.transpose(2, 3).contiguous().transpose(2, 3)), model(x))
    assert model(x[:0]).shape == (0, 7)
