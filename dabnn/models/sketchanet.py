"""Sketch-A-Net (Yu et al., arXiv 1501.07873) as the reference code of arXiv 1804.02941 builds it: 8 convolutions.

conv 15x15/3 64, pool, 5x5 128, pool, 3x3 256 three times, pool, 7x7 512, 1x1 512, 1x1 classes; pools are 3x3 stride 2;
Dropout2d after convolutions 6 and 7. Feature maps at 225 pixels: 71, 35, 31, 15, 7, 1.

Variants: convolutions with sign inputs stand as BN, Sign, conv, ReLU, the others as conv, BN, ReLU. All but the float
one drop the biases of convolutions 2 to 7. In bireal order `sketchanetfbin` has no dropout after convolution 6, where
it would stand right before a sign.

Departures from the reference: the kernel of convolution 6 follows the image size (7x7 at 225 to 236 pixels), where the
reference failed on smaller images and folded the positions of larger ones into the batch; the output is logits.
"""

from torch import nn

from dabnn.models.blocks import Blocks
from dabnn.models.family import Family, Kind, Stages, Variant


def _stages(b: Blocks) -> Stages:
    bias = b.variant.kind is Kind.FLOAT
    c1, c2, c3, c6 = (b.shape.channels(full) for full in (64, 128, 256, 512))
    size = ((b.shape.input_size - 15) // 3 + 1 - 3) // 2 + 1
    size = ((size - 4 - 3) // 2 + 1 - 3) // 2 + 1
    convs = [
        nn.Conv2d(b.shape.in_channels, c1, 15, stride=3),
        nn.Conv2d(c1, c2, 5, bias=bias),
        nn.Conv2d(c2, c3, 3, padding=1, bias=bias),
        nn.Conv2d(c3, c3, 3, padding=1, bias=bias),
        nn.Conv2d(c3, c3, 3, padding=1, bias=bias),
        nn.Conv2d(c3, c6, size, bias=bias),
        nn.Conv2d(c6, c6, 1, bias=bias),
    ]
    stages: Stages = {}
    for index, conv in enumerate(convs, start=1):
        stages |= b.unit(index, conv, pool=nn.MaxPool2d(3, stride=2) if index in (1, 2, 5) else None)
        if index in (6, 7):
            stages |= b.dropout(index, nn.Dropout2d(0.2 if b.variant.signs else 0.1))
    return stages | {"conv8": nn.Conv2d(c6, b.shape.num_classes, 1), "flatten": nn.Flatten()}


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
    num_classes=250,
    smallest=81,
    build=_stages,
)
