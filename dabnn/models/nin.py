"""Network in Network for small images (arXiv 1312.4400) in the XNOR-Net form of the reference code: 9 convolutions.

conv 5x5 192, then with sign inputs 1x1 160, 1x1 96, max-pool, 5x5 192, 1x1 192 twice, average pool, 3x3 192, 1x1 192,
then BN, 1x1 classes, average over positions. Pools are 3x3 stride 2 with padding 1. All convolutions have biases; BN
eps is 1e-4; the BN after convolution 1 and the one before convolution 9 have no scale and shift.

The one variant, `nin`, takes sign inputs on 2 to 8 (BN, Sign, conv, ReLU); `inputs="none"` is its weight-binary twin.
In bireal order it has no dropout, which would stand right before a sign.

Departures from the reference: any number of classes (it had 10 always); no ReLU on the logits; dropout 0.5 acts before
the BN of convolutions 4 and 7 rather than between their sign and convolution, where it made inputs of three values;
the average at the end covers the whole map, so that other image sizes work; the output is logits.
"""

from torch import nn

from dabnn.models.blocks import Blocks
from dabnn.models.family import Family, Kind, Stages, Variant

_EPS = 1e-4


def _stages(b: Blocks) -> Stages:
    c, c2, c3 = (b.shape.channels(full) for full in (192, 160, 96))
    stages: Stages = {
        **b.unit(1, nn.Conv2d(b.shape.in_channels, c, 5, padding=2), eps=_EPS),
        **b.unit(2, nn.Conv2d(c, c2, 1), eps=_EPS),
        **b.unit(3, nn.Conv2d(c2, c3, 1), eps=_EPS, pool=nn.MaxPool2d(3, stride=2, padding=1)),
        **b.dropout(3, nn.Dropout(0.5)),
        **b.unit(4, nn.Conv2d(c3, c, 5, padding=2), eps=_EPS),
        **b.unit(5, nn.Conv2d(c, c, 1), eps=_EPS),
        **b.unit(6, nn.Conv2d(c, c, 1), eps=_EPS),
        "pool6": nn.AvgPool2d(3, stride=2, padding=1),
        **b.dropout(6, nn.Dropout(0.5)),
        **b.unit(7, nn.Conv2d(c, c, 3, padding=1), eps=_EPS),
        **b.unit(8, nn.Conv2d(c, c, 1), eps=_EPS),
        "bn9": nn.BatchNorm2d(c, _EPS, affine=False),
        "conv9": nn.Conv2d(c, b.shape.num_classes, 1),
        "pool9": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
    }
    return stages | {"bn1": nn.BatchNorm2d(c, _EPS, affine=False)}


NIN = Family(
    name="nin",
    variants={"nin": Variant(Kind.BOTH, signs=frozenset(range(2, 9)))},
    in_channels=3,
    input_size=32,
    num_classes=10,
    smallest=1,
    build=_stages,
)
