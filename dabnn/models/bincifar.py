"""BinCIFAR: the VGG-like network of 8 convolutions of the reference code of arXiv 1804.02941, for small images.

conv 3x3 128 twice, pool, 256 twice, pool, Dropout2d 0.4, 512 twice, pool, Dropout2d 0.4, 4x4 1024, 1x1 classes; pools
are 2x2. Convolution 1 stands as conv, BN, ReLU. All convolutions keep their biases.

Variants: `bincifar` stands as BN, conv, ReLU on 2 to 7 and BN, conv on 8; with bin_start 2 and bin_end 7 it is the
weight-binary twin of the published logs. `bincifarfbin` stands as BN, Sign, conv, ReLU on 2 to 7, then conv 8.

Departures from the reference: no ReLU on the logits of `bincifar`, which gave samples with ten equal scores and no
gradient; the kernel of convolution 7 follows the image size (4x4 at 32 pixels), where the reference folded the
positions of larger images into the batch; the output is logits.
"""

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
    for index, conv in enumerate(_convs(shape), start=1):
        if index == 1:
            stages |= conv_bn_relu(index, conv)
        elif index < _LAST:
            stages |= bn_conv_relu(index, conv)
        else:
            stages |= _head(variant, conv)
        if index in (2, 4, 6):
            stages[f"pool{index}"] = nn.MaxPool2d(2)
        if index in (4, 6):
            stages[f"dropout{index}"] = nn.Dropout2d(0.4)
    return stages


def _head(variant: Variant, conv: nn.Conv2d) -> Stages:
    norm: Stages = {"bn8": nn.BatchNorm2d(conv.in_channels)} if variant.kind is Kind.FLOAT else {}
    return norm | {"conv8": conv, "flatten": nn.Flatten()}


def _convs(shape: Shape) -> list[nn.Conv2d]:
    if shape.input_size < 16 or shape.input_size % 8:
        rule = "its three pools halve the image, so the size must be a multiple of 8, at least 16"
        raise refuse_input_size("bincifar", shape.input_size, rule)
    c1, c3, c5, c7 = (shape.channels(full) for full in (128, 256, 512, 1024))
    return [
        nn.Conv2d(shape.in_channels, c1, 3, padding=1),
        nn.Conv2d(c1, c1, 3, padding=1),
        nn.Conv2d(c1, c3, 3, padding=1),
        nn.Conv2d(c3, c3, 3, padding=1),
        nn.Conv2d(c3, c5, 3, padding=1),
        nn.Conv2d(c5, c5, 3, padding=1),
        nn.Conv2d(c5, c7, shape.input_size // 8),
        nn.Conv2d(c7, shape.num_classes, 1),
    ]


BINCIFAR = Family(
    name="bincifar",
    variants={
        "bincifar": Variant(Kind.FLOAT),
        "bincifarfbin": Variant(Kind.BOTH, signs=frozenset(range(2, 8))),
    },
    in_channels=3,
    input_size=32,
    build=_stages,
)
