"""Packed convolution on a GPU: asks `kernels.gpu_path` for the way, derives what that needs, launches it.

Nothing here waits for the device once a layer has run: what is derived from the weights is made at a layer's first call
and kept (`kernels.derived`). Recording a CUDA graph therefore asks for one call of the layer before it.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from kernels.conv_fragments import Tile, arrange_weights, choose_tile, count_ones
from kernels.conv_layer import Filters, Geometry, geometry_of
from kernels.derived import derived
from kernels.gpu_path import MAX_ELEMENTS, gpu_path

_Made = TypeVar("_Made")


def convolve(
    bits: Tensor,
    filters: Filters,
    in_channels: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Returns the convolution of packed signs.

    Args:
        bits: (N, H, W, words) int32 on a GPU.
        filters: The filters.
        in_channels: Channels of the input.
        stride: (vertical, horizontal).
        padding: (vertical, horizontal).
        dtype: Type of values: float32, bfloat16 or float16.

    Returns:
        (N, F, H', W') channels-last of that type, or packed (N, H', W', ceil(F / 32)) int32 where the filters have
        thresholds.
    """
    geometry = geometry_of(bits.shape, filters.weight_bits.shape, in_channels, stride, padding)
    is_packed = filters.threshold is not None
    shape = (bits.shape[0], geometry.out_height, geometry.out_width)
    if is_packed:
        out = bits.new_empty((*shape, geometry.out_words))
    else:
        out = bits.new_empty((*shape, geometry.filters), dtype=dtype)
    if out.numel():
        write(bits.contiguous(), filters, geometry, out)
    return out if is_packed else out.permute(0, 3, 1, 2)


def write(bits: Tensor, filters: Filters, geometry: Geometry, out: Tensor) -> None:
    """Writes results into out; only the device of `bits` is used.

    Args:
        bits: (N, H, W, words) int32, contiguous, on a GPU.
        filters: The filters.
        geometry: The layer's sizes.
        out: (N, H', W', F) of a floating type, or (N, H', W', ceil(F / 32)) int32 of packed results; contiguous, not
            empty, overwritten.
    """
    pixels = geometry.out_height * geometry.out_width
    num_macs = bits.shape[0] * pixels * geometry.filters * geometry.taps * geometry.channels
    elements = max(pixels * geometry.filters, geometry.height * geometry.width * geometry.words)
    ways = {"popcount": _write_by_counting, "tensor_core": _write_by_tensor_core, "dense": _write_dense}
    name = gpu_path(bits.device, num_macs, elements).name
    images = bits.shape[0] if name == "popcount" else MAX_ELEMENTS // elements
    with torch.cuda.device(bits.device):
        for first in range(0, bits.shape[0], images):
            ways[name](bits[first : first + images], filters, geometry, out[first : first + images])


def _write_by_counting(bits: Tensor, filters: Filters, geometry: Geometry, out: Tensor) -> None:
    from kernels import conv_triton

    conv_triton.launch_layer(bits, filters, geometry, out)


def _write_by_tensor_core(bits: Tensor, filters: Filters, geometry: Geometry, out: Tensor) -> None:
    from kernels import conv_gluon

    num_pixels = bits.shape[0] * geometry.out_height * geometry.out_width
    tile = choose_tile(geometry, num_pixels, _num_processors(bits.device))
    weights, *counts = made_once(
        "conv_gluon", filters.weight_bits, (geometry, tile), lambda: arrange(filters.weight_bits, geometry, tile)
    )
    conv_gluon.launch(bits, weights, (counts[0], counts[1]), filters, geometry, tile, out)


def arrange(weight_bits: Tensor, geometry: Geometry, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
    """Returns `arrange_weights` and both of `count_ones` on the device of the weights."""
    words = weight_bits.cpu().numpy()
    arrays = (arrange_weights(words, geometry, tile), *count_ones(words, geometry))
    weights, ones, kinds = (torch.from_numpy(array).to(weight_bits.device) for array in arrays)
    return weights, ones, kinds


def _write_dense(bits: Tensor, filters: Filters, geometry: Geometry, out: Tensor) -> None:
    from kernels import conv_dense_triton

    masks = made_once(
        "conv_dense", filters.weight_bits, geometry, lambda: conv_dense_triton.masks(filters.weight_bits, geometry)
    )
    conv_dense_triton.launch(bits, masks, filters, geometry, out)


def made_once(name: str, weight_bits: Tensor, key: Hashable, make: Callable[[], _Made]) -> _Made:
    """Returns `derived` of a layer's weights on a GPU, finished for every stream.

    Raises:
        RuntimeError: It is not there yet and a CUDA graph is being recorded.
    """

    def make_and_wait() -> _Made:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "weight_bits: their order for the GPU is made at the layer's first call, which copies and waits, and "
                "a CUDA graph cannot record that. Call the layer once before recording, outside inference_mode or "
                "with weights made outside it."
            )
        made = make()
        if weight_bits.is_cuda:
            torch.cuda.current_stream(weight_bits.device).synchronize()
        return made

    return derived(name, [weight_bits], key, make_and_wait)


def _num_processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
