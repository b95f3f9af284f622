"""SqueezeNet 1.0 (arXiv 1602.07360) with BN, as the reference code of arXiv 1804.02941 builds it: 26 convolutions.

conv 7x7/2 96, pool, eight fires, pools after the third and seventh, Dropout 0.2, 1x1 classes, average over positions;
pools are 3x3 stride 2, rounding up. A fire is a 1x1 convolution (squeeze), then a 1x1 and a 3x3 one (expand) side by
side; fire i counted from 0 has the numbers 2 + 3i (squeeze), 3 + 3i and 4 + 3i.

Variants: convolutions with sign inputs stand as BN, Sign, conv, ReLU, each expand branch with a BN of its own, the
others as conv, BN, ReLU. Float: biases everywhere; the others: none in the fires, except the first fire of the hybrids,
which is real. fbin: sign inputs on 2 to 25; hybrid: 5 to 25; hybridv2: 5 to 22; hybridv3: the expands of 5 to 22.

Departures from the reference: no ReLU on the logits before the average, which made them non-negative; the average
covers the whole map, so that small images work; the output is logits.
"""

from torch import nn

from dabnn.models.blocks import Blocks, Branches, Chain
from dabnn.models.family import Family, Kind, Stages, Variant

_FIRES = ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))
_HYBRIDS = (Kind.HYBRID, Kind.HYBRID_V2, Kind.HYBRID_V3)


def _stages(b: Blocks) -> Stages:
    channels = b.shape.channels(96)
    stages = b.unit(1, nn.Conv2d(b.shape.in_channels, channels, 7, stride=2))
    stages["pool1"] = nn.MaxPool2d(3, stride=2, ceil_mode=True)
    for index, (squeeze, expand) in enumerate(_FIRES, start=1):
        bias = b.variant.kind is Kind.FLOAT or (index == 1 and b.variant.kind in _HYBRIDS)
        narrow, wide = b.shape.channels(squeeze), b.shape.channels(expand)
        stages[f"fire{index}"] = Chain(_fire(b, channels, narrow, wide, bias=bias))
        channels = 2 * wide
        if index in (3, 7):
            stages[f"pool_fire{index}"] = nn.MaxPool2d(3, stride=2, ceil_mode=True)
    head = {"dropout": nn.Dropout(0.2), "conv": nn.Conv2d(channels, b.shape.num_classes, 1)}
    return stages | head | {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}


def _fire(b: Blocks, channels: int, narrow: int, wide: int, *, bias: bool) -> Stages:
    squeeze = b.unit("", nn.Conv2d(channels, narrow, 1, bias=bias))
    one = Chain(b.unit("", nn.Conv2d(narrow, wide, 1, bias=bias)))
    three = Chain(b.unit("", nn.Conv2d(narrow, wide, 3, padding=1, bias=bias)))
    return {"squeeze": Chain(squeeze), "expand": Branches({"1x1": one, "3x3": three})}


SQUEEZENET = Family(
    name="squeezenet",
    variants={
        "squeezenet": Variant(Kind.FLOAT),
        "squeezenetwbin": Variant(Kind.WEIGHTS),
        "squeezenetfbin": Variant(Kind.BOTH, signs=frozenset(range(2, 26))),
        "squeezenethybrid": Variant(Kind.HYBRID, signs=frozenset(range(5, 26))),
        "squeezenethybridv2": Variant(Kind.HYBRID_V2, signs=frozenset(range(5, 23))),
        "squeezenethybridv3": Variant(
            Kind.HYBRID_V3, signs=frozenset(number for number in range(5, 23) if number % 3 != 2)
        ),
    },
    in_channels=1,
    input_size=224,
    num_classes=250,
    smallest=21,
    build=_stages,
    blocks=("reference",),
)
