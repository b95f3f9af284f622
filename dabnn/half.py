"""Rounding a packed model's real values to float16: all of them, or those that no sign depends on.

Rounded scalars move a value against its threshold, and a sign that lies close turns: on small networks with close
answers that can change more classes than an export allows. What comes after the last layer with sign inputs turns
none; it is also where most real-valued bytes are. Left out: whether a rounded model may be used (`dabnn.verify`).
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from dabnn.errors import InvalidInputError
from dabnn.layers import BinaryConv2d
from dabnn.packed_conv import PackedConv2d

Rounded = Literal["none", "head", "all"]

# Rounded, it would change signs that the check of the layers compares one by one.
_NEVER = "input_shift"
# Of a `SignThreshold`: a channel whose sign turns beyond the range of float16 has one sign for every input there.
_ANY_SIZE = ".threshold"


def to_half(tensors: Mapping[str, Tensor], net: nn.Module, *, keep_signs: bool) -> dict[str, Tensor]:
    """Return the tensors of a packed file with real values in float16.

    Args:
        tensors: Of the file, by name.
        net: The packed network that they are of.
        keep_signs: Whether values that a sign depends on stay as they are.

    Raises:
        InvalidInputError: A value that is no threshold is beyond the range of float16.
    """
    head = _head(net) if keep_signs else None
    return {
        name: tensor if head is not None and name.rpartition(".")[0] not in head else _rounded(name, tensor)
        for name, tensor in tensors.items()
    }


def what_is_half(tensors: Mapping[str, Tensor]) -> Rounded:
    """Return which real values of a packed file are float16: none, only the head's, or all that may be."""
    types = {tensor.dtype for name, tensor in tensors.items() if tensor.is_floating_point() and not _stays(name)}
    if torch.float16 not in types:
        return "none"
    return "all" if types == {torch.float16} else "head"


def _head(net: nn.Module) -> set[str]:
    """Return the paths of the last layer with sign inputs and of all that comes after it; all, where there is none."""
    paths = [path for path, _ in net.named_modules()]
    signs = [index for index, (_, module) in enumerate(net.named_modules()) if _reads_signs(module)]
    return set(paths[signs[-1] :] if signs else paths)


def _reads_signs(module: nn.Module) -> bool:
    return isinstance(module, PackedConv2d) or (isinstance(module, BinaryConv2d) and module.binary_input)


def _stays(name: str) -> bool:
    return name.endswith(_NEVER)


def _rounded(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point() or _stays(name):
        return tensor
    half = tensor.half()  # rounds what is beyond its range to infinity
    if name.endswith(_ANY_SIZE):
        return half
    if not torch.equal(half.isfinite(), tensor.isfinite()):
        largest = tensor.abs().max().item()
        raise InvalidInputError(f"half: {name} reaches {largest:g}, and float16 ends at 65504. Export without --half.")
    return half
