"""Sketch-A-Net (Yu et al., arXiv 1501.07873) as the reference code of arXiv 1804.02941 builds it: 8 convolutions.

conv 15x15/3 64, pool, 5x5 128, pool, 3x3 256 three times, pool, 7x7 512, 1x1 512, 1x1 classes; pools are 3x3 stride 2;
Dropout2d after convolutions 6 and 7. Feature maps at 225 pixels: 71, 35, 31, 15, 7, 1.

Variants: convolutions with sign inputs stand as BN, Sign, conv, ReLU, the others as conv, BN, ReLU. All but the float
one drop the biases of convolutions 2 to 7.

Departures from the reference: the kernel of convolution 6 follows the image size (7x7 at 225 to 236 pixels), where the
reference failed on smaller images and folded the positions of larger ones into the batch; the output is logits.
"""

from itertools import count

from torch import nn

from dabnn.models.family import (
    Family,
    Kind,
    Shape,
    Stages,
    Variant,
    bn_conv_relu,
    conv_bn_relu,
    refuse_input_size,
)

_LAST = 8


def _stages(variant: Variant, shape: Shape) -> Stages:
    stages: Stages = {}
    for index, conv in enumerate(_convs(variant, shape), start=1):
        if index == _LAST:
            stages[f"conv{index}"] = conv
        else:
            stages |= bn_conv_relu(index, conv) if index in variant.signs else conv_bn_relu(index, conv)
        if index in (1, 2, 5):
            stages[f"pool{index}"] = nn.MaxPool2d(3, stride=2)
        if index in (6, 7):
            stages[f"dropout{index}"] = nn.Dropout2d(0.2 if variant.signs else 0.1)
    return stages | {"flatten": nn.Flatten()}


def _convs(variant: Variant, shape: Shape) -> list[nn.Conv2d]:
    middle_bias = variant.kind is Kind.FLOAT
    c1, c2, c3, c6 = (shape.channels(full) for full in (64, 128, 256, 512))
    return [
        nn.Conv2d(shape.in_channels, c1, 15, stride=3),
        nn.Conv2d(c1, c2, 5, bias=middle_bias),
        nn.Conv2d(c2, c3, 3, padding=1, bias=middle_bias),
        nn.Conv2d(c3, c3, 3, padding=1, bias=middle_bias),
        nn.Conv2d(c3, c3, 3, padding=1, bias=middle_bias),
        nn.Conv2d(c3, c6, _last_map(shape.input_size), bias=middle_bias),
        nn.Conv2d(c6, c6, 1, bias=middle_bias),
        nn.Conv2d(c6, shape.num_classes, 1),
    ]


def _last_map(input_size: int) -> int:
    """Return the height of the map that reaches convolution 6, whose kernel covers all of it."""
    size = _map_size(input_size)
    if size < 1:
        smallest = next(candidate for candidate in count(1) if _map_size(candidate) >= 1)
        raise refuse_input_size("sketchanet", input_size, f"nothing is left after its pools. Use {smallest} or more")
    return size


def _map_size(input_size: int) -> int:
    pooled1 = ((input_size - 15) // 3 + 1 - 3) // 2 + 1
    pooled2 = (pooled1 - 4 - 3) // 2 + 1
    return (pooled2 - 3) // 2 + 1


SKETCHANET = Family(
    name="sketchanet",
    variants={
        "sketchanet": Variant(Kind.FLOAT),
        "sketchanetwbin": Variant(Kind.WEIGHTS),
        "sketchanetfbin": Variant(Kind.BOTH, signs=frozenset(range(2, 8))),
        "sketchanethybrid": Variant(Kind.HYBRID, signs=frozenset(range(2, 6))),
        "sketchanethybridv2": Variant(Kind.HYBRID_V2, signs=frozenset(range(2, 7))),
    },
    in_channels=1,
    input_size=225,
    build=_stages,
)
