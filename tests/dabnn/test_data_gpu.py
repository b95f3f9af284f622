"""On a GPU, where batches are normalised on the device."""

import pytest
import torch

from dabnn.data.transforms import make_transform


@pytest.mark.gpu
@pytest.mark.parametrize("in_channels", [1, 3])
def test_images_normalised_on_a_gpu_have_the_bits_of_those_normalised_on_the_cpu(in_channels: int) -> None:
    mean, std = (0.4914, 0.4822, 0.4465)[:in_channels], (0.247, 0.243, 0.261)[:in_channels]
    transform = make_transform("plain", input_size=32, in_channels=in_channels, mean=mean, std=std, training=True)
    pixels = torch.arange(32 * 32, dtype=torch.int64).remainder(256).to(torch.uint8).view(1, 1, 32, 32)
    batch = pixels.expand(7, in_channels, 32, 32).contiguous()
    on_gpu = transform.batch(batch.to("cuda"))
    assert on_gpu.device.type == "cuda"
    assert torch.equal(on_gpu.cpu(), transform.batch(batch))
