"""Where a packed network runs and in what numbers: its device, and the type of its real-valued layers.

Bits, the scalars of binary layers, thresholds and batch normalisation stay as they are in every type: they cost little,
and rounded they would turn signs. Left out: the file, which no move changes.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from dabnn.errors import InvalidInputError
from dabnn.models import ModelSpec, Network
from dabnn.models.folding import SignThreshold
from dabnn.models.network import check_image_shape
from dabnn.packed_conv import PackedConv2d
from dabnn.packed_weight_conv import PackedWeightConv2d

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Their own tensors keep their type, whatever that of the values that they read and write.
_KEEPING = (PackedConv2d, PackedWeightConv2d, SignThreshold, nn.BatchNorm2d)


def check_device(device: torch.device | str) -> torch.device:
    """Return the device, after a look whether it is there.

    Raises:
        InvalidInputError: It is not.
    """
    try:
        place = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidInputError(f"device: {device} cannot be used here ({reason}). Use cpu.") from error
    if place.type == "meta":
        raise InvalidInputError("device: meta holds no values to compute with. Use cpu or cuda.")
    return place


def check_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the type, which must be one that float layers can run in.

    Raises:
        InvalidInputError: It is not.
    """
    if dtype not in DTYPES:
        raise InvalidInputError(
            f"dtype: {dtype} is no type for the float layers of a packed model. Use one of "
            f"{', '.join(map(str, DTYPES))}; the binary layers are bits in each."
        )
    return dtype


def check_images(spec: ModelSpec, images: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse what is no batch of normalized images for a network in `dtype` on `device`.

    Raises:
        InvalidInputError: They have another type, device, number of channels or size.
    """
    if not isinstance(images, Tensor):
        raise InvalidInputError(f"images: a {type(images).__name__}. Give a torch tensor (N, C, H, W).")
    check_image_shape(spec, images)
    if images.dtype not in (torch.float32, dtype):
        raise InvalidInputError(
            f"images: {images.dtype}, and this model takes normalized images in torch.float32"
            f"{'' if dtype == torch.float32 else f' or {dtype}'}. Normalize bytes first, convert other floats with "
            ".float()."
        )
    if images.device != device:
        raise InvalidInputError(
            f"images: on {images.device}, and the model is on {device}. Move the images there, or the model with "
            ".to(device)."
        )


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which torch chooses no other types for operations on this device."""
    is_on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if is_on else nullcontext()


def place(net: Network, device: torch.device, dtype: torch.dtype) -> Network:
    """Move a packed network to a device and its float layers to a type, in place, channels-last; return it."""
    net.to(device)
    for module in net.modules():
        if isinstance(module, PackedConv2d):
            module.dtype = dtype
        is_leaf = next(module.children(), None) is None
        if is_leaf and not isinstance(module, _KEEPING):
            module.to(dtype)
        if isinstance(module, nn.Conv2d):
            module.weight.data = module.weight.data.to(memory_format=torch.channels_last)
    return net
