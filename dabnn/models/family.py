"""What a family of models is: one real architecture, and variants that differ in block order and sign inputs.

A family is one file of this package that defines a `Family`; nothing else has to know it but the list in `zoo.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

from torch import nn

from dabnn.errors import InvalidInputError

Stages = dict[str, nn.Module]


class Kind(Enum):
    """How the reference code names a variant: what its range binarizes and how its middle layers are built."""

    FLOAT = "float"
    WEIGHTS = "wbin"
    BOTH = "fbin"
    HYBRID = "hybrid"
    HYBRID_V2 = "hybridv2"


@dataclass(frozen=True)
class Variant:
    """One named model of a family.

    Attributes:
        kind: decides biases, dropout and whether a range is binarized by default.
        signs: numbers of the convolutions that take sign inputs; these also stand in the order BN, Sign, conv, ReLU.
    """

    kind: Kind
    signs: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Shape:
    """The sizes that a user chooses: images of (in_channels, input_size, input_size), classes, width multiplier."""

    in_channels: int
    input_size: int
    num_classes: int
    width: float

    def channels(self, full_width: int) -> int:
        """Return a hidden channel count times the width, to the nearest multiple of 8 where that is at least 8."""
        exact = full_width * self.width
        return round(exact / 8) * 8 if exact >= 8 else max(1, round(exact))


@dataclass(frozen=True)
class Family:
    """One architecture and its variants.

    Attributes:
        name: name of the family.
        variants: model name -> variant.
        in_channels: default number of image channels.
        input_size: default image height and width, pixels.
        build: (variant, shape) -> the named modules of the real network, run in order, from images to (N, num_classes);
            raises InvalidInputError, starting with `model.input_size`, for a size that does not fit.
    """

    name: str
    variants: Mapping[str, Variant]
    in_channels: int
    input_size: int
    build: Callable[[Variant, Shape], Stages]


def conv_bn_relu(index: int, conv: nn.Conv2d) -> Stages:
    """Return the block of a layer with a real input: conv, BN over its outputs, ReLU."""
    return {f"conv{index}": conv, f"bn{index}": nn.BatchNorm2d(conv.out_channels), f"relu{index}": nn.ReLU()}


def bn_conv_relu(index: int, conv: nn.Conv2d) -> Stages:
    """Return the block of a layer with a sign input: BN over its inputs, conv (which holds the sign), ReLU."""
    return {f"bn{index}": nn.BatchNorm2d(conv.in_channels), f"conv{index}": conv, f"relu{index}": nn.ReLU()}


def refuse_input_size(family: str, input_size: int, rule: str) -> InvalidInputError:
    """Return the error for an image size that the family cannot take; `rule` says which sizes it can."""
    return InvalidInputError(f"model.input_size: {input_size} does not fit {family}: {rule}.")
