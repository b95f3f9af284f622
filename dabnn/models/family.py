"""What a family of models is: one real architecture, and variants that differ in block order and sign inputs.

A family is one file of this package that defines a `Family`; nothing else has to know it but the list in `zoo.py`. Its
modules are laid out by `dabnn.models.blocks`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from torch import nn

from dabnn.errors import InvalidInputError

if TYPE_CHECKING:
    from dabnn.models.blocks import Blocks

Stages = dict[str, nn.Module]

BLOCKS = ("reference", "bireal")
ACTIVATIONS = ("relu", "rprelu")


class Kind(Enum):
    """How the reference code names a variant: what its range binarizes and how its middle layers are built."""

    FLOAT = "float"
    WEIGHTS = "wbin"
    BOTH = "fbin"
    HYBRID = "hybrid"
    HYBRID_V2 = "hybridv2"
    HYBRID_V3 = "hybridv3"


@dataclass(frozen=True)
class Variant:
    """One named model of a family.

    Attributes:
        kind: decides biases, dropout and whether a range is binarized by default.
        signs: numbers of the convolutions that take sign inputs and stand in the order that goes with them.
        weights: numbers of the convolutions with binary weights by default; None for the reference's range, which is
            all but the first convolution and the classifier, and no layer where the kind is float.
        block: default order of the blocks, one of `BLOCKS`.
        activation: default activation, one of `ACTIVATIONS`; None for that of the block order.
        options: defaults of `dabnn.options.LayerOptions` that differ from its own.
    """

    kind: Kind
    signs: frozenset[int] = frozenset()
    weights: frozenset[int] | None = None
    block: str = "reference"
    activation: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Shape:
    """The sizes that a user chooses: images of (in_channels, input_size, input_size), classes, width multiplier."""

    in_channels: int
    input_size: int
    num_classes: int
    width: float

    def channels(self, full_width: int) -> int:
        """Return a hidden channel count times the width, to the nearest multiple of 8 where that is at least 8.

        Width 1 returns the published count as it is.
        """
        exact = full_width * self.width
        if exact == full_width:
            return full_width
        return round(exact / 8) * 8 if exact >= 8 else max(1, round(exact))


@dataclass(frozen=True)
class Family:
    """One architecture and its variants.

    Attributes:
        name: name of the family.
        variants: model name -> variant.
        in_channels: default number of image channels.
        input_size: default image height and width, pixels.
        num_classes: classes of the published figures.
        smallest: least image height and width, pixels, of which something is left at the end.
        build: lays out the named modules of the real network, run in order, from images to (N, num_classes); raises
            InvalidInputError, starting with `model.input_size`, for a size that does not fit.
        blocks: the block orders that it can take.
    """

    name: str
    variants: Mapping[str, Variant]
    in_channels: int
    input_size: int
    num_classes: int
    smallest: int
    build: "Callable[[Blocks], Stages]"
    blocks: tuple[str, ...] = BLOCKS


def refuse_input_size(family: str, input_size: int, rule: str) -> InvalidInputError:
    """Return the error for an image size that the family cannot take; `rule` says which sizes it can."""
    return InvalidInputError(f"model.input_size: {input_size} does not fit {family}: {rule}.")
