"""Which of the three ways a packed convolution takes on a GPU.

- `tensor_core`: the 1-bit product of the tensor cores (`kernels.conv_gluon`). NVIDIA chips of compute capability 8.0 to
  9.0 have it in hardware, 16,384 multiply-accumulates a clock on each multiprocessor of Hopper; older ones lack the AND
  form, newer ones emulate it by eight products of bytes and a function call.
- `popcount`: ordinary integer instructions (`kernels.conv_triton`), the same source on every GPU that Triton knows. 16
  population counts of 32 bits a clock are 512 multiply-accumulates, of which two fifths are expected to remain; on the
  chips where cuDNN's bfloat16 convolution does 2,048 this is exact, but no speed-up.
- `dense`: the bits unpacked to +1 and -1, cuDNN's float16 or TF32 convolution on the tensor cores, and our epilogue
  (`kernels.conv_dense_triton`). Products of signs and zeros or ones are whole numbers below 2**24, which those
  convolutions add up exactly in float32. It reads and writes 16 to 32 times the memory, so it is no gain over a float
  layer either, but from compute capability 10.0 on it is expected to beat counting on large layers.

Capabilities and rates are from the vendors' tables; which way is faster is derived from them, not measured.
"""

import functools
import logging
from dataclasses import dataclass
from typing import Literal

import torch

_LOGGER = logging.getLogger(__name__)

FIRST_AND, LAST_AND = (8, 0), (9, 0)
FIRST_DENSE = (10, 0)
FIRST_GLUON = (3, 6)
# Below this, the three launches of the dense way alone take longer than counting does.
DENSE_MACS = 2**29
# Kernels count elements in int32.
MAX_ELEMENTS = 2**31 - 1


@dataclass(frozen=True)
class GpuPath:
    """A way and why it was chosen.

    Attributes:
        name: See the module.
        reason: One sentence for people.
    """

    name: Literal["tensor_core", "popcount", "dense"]
    reason: str


def choose_gpu_path(
    capability: tuple[int, int] | None, triton_version: tuple[int, int], num_macs: int, image_elements: int
) -> GpuPath:
    """Returns the way of a layer.

    Args:
        capability: CUDA compute capability; None for a GPU that is not NVIDIA's.
        triton_version: Major and minor version of Triton.
        num_macs: Multiply-accumulates of the layer, all images together.
        image_elements: Elements of the larger of its input (in words) and its output (in values), for one image.
    """
    if capability is None:
        return GpuPath("popcount", "the GPU is not NVIDIA's, whose 1-bit product the tensor-core kernel is written for")
    chip = f"compute capability {capability[0]}.{capability[1]}"
    if FIRST_AND <= capability <= LAST_AND:
        if triton_version < FIRST_GLUON:
            version = ".".join(map(str, triton_version))
            return GpuPath("popcount", f"{chip} has the 1-bit product, but Triton {version} cannot reach it: update it")
        if image_elements > MAX_ELEMENTS:
            return GpuPath("popcount", f"one image has {image_elements} elements, above {MAX_ELEMENTS}")
        return GpuPath("tensor_core", f"{chip} has the 1-bit product of bits that AND selects")
    if capability < FIRST_AND:
        return GpuPath("popcount", f"{chip} has no 1-bit product, which begins with 8.0")
    if capability >= FIRST_DENSE and num_macs >= DENSE_MACS and image_elements <= MAX_ELEMENTS:
        return GpuPath("dense", f"{chip} emulates the 1-bit product, and {num_macs} products are faster dense")
    return GpuPath("popcount", f"{chip} emulates the 1-bit product, and {num_macs} products are few")


def gpu_path(device: torch.device | str | int, num_macs: int = DENSE_MACS, image_elements: int = 0) -> GpuPath:
    """Returns the way that a layer takes on a CUDA or ROCm device; the first time that it is taken, logs it.

    Args:
        device: The device.
        num_macs: See `choose_gpu_path`; unsaid, those of a large layer.
        image_elements: See there.
    """
    place = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    index = torch.cuda.current_device() if place.index is None else place.index
    return _path_of(index, num_macs, image_elements)


@functools.lru_cache(maxsize=1024)
def _path_of(index: int, num_macs: int, image_elements: int) -> GpuPath:
    import triton

    capability = None if torch.version.hip else torch.cuda.get_device_capability(index)
    major, minor = triton.__version__.split(".")[:2]
    path = choose_gpu_path(capability, (int(major), int(minor)), num_macs, image_elements)
    _log_once(torch.cuda.get_device_name(index), path.name, path.reason)
    return path


@functools.cache
def _log_once(device: str, name: str, reason: str) -> None:
    _LOGGER.info("packed convolutions on %s: %s (%s)", device, name, reason)
