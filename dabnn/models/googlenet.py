"""GoogLeNet (arXiv 1409.4842) with BN, as the reference code of arXiv 1804.02941 builds it: 57 convolutions.

conv 7x7/2 64, pool, 1x1 64, 3x3 192, pool, nine inception blocks with pools after b3 and e4, average over positions,
linear layer; no auxiliary heads. The branches of a block, in the order of their numbers: 1x1; 1x1, 3x3; 1x1, 5x5;
max-pool, 1x1.

Variants: convolutions with sign inputs stand as BN, Sign, conv, ReLU, each branch with a BN of its own, the others as
conv, BN, ReLU, but convolutions 2 and 3 without BN. Float: biases everywhere; wbin and fbin: only in convolution 1.
fbin: sign inputs on 2 to 57, Dropout 0.4 before the linear layer.

Departures from the reference: the average covers the whole map, so that other image sizes work; the output is logits.
Kept: its 204 channels in the 3x3 branch of a4, where the paper has 208.
"""

from torch import nn

from dabnn.models.blocks import Blocks, Branches, Chain
from dabnn.models.family import Family, Kind, Stages, Variant

# 1x1; 3x3 reduce, 3x3; 5x5 reduce, 5x5; pool projection
_INCEPTIONS = {
    "a3": (64, 96, 128, 16, 32, 32),
    "b3": (128, 128, 192, 32, 96, 64),
    "a4": (192, 96, 204, 16, 48, 64),
    "b4": (160, 112, 224, 24, 64, 64),
    "c4": (128, 128, 256, 24, 64, 64),
    "d4": (112, 144, 288, 32, 64, 64),
    "e4": (256, 160, 320, 32, 128, 128),
    "a5": (256, 160, 320, 48, 128, 128),
    "b5": (384, 192, 384, 48, 128, 128),
}
_POOL_PADDING = {"b3": 0, "e4": 1}


def _stages(b: Blocks) -> Stages:
    bias = b.variant.kind is Kind.FLOAT
    c1, channels = b.shape.channels(64), b.shape.channels(192)
    stages: Stages = {
        **b.unit(1, nn.Conv2d(b.shape.in_channels, c1, 7, stride=2, padding=3)),
        "pool1": nn.MaxPool2d(3, stride=2, padding=1),
        **b.unit(2, nn.Conv2d(c1, c1, 1, bias=bias), norm=False),
        **b.unit(3, nn.Conv2d(c1, channels, 3, padding=1, bias=bias), norm=False),
        "pool3": nn.MaxPool2d(3, stride=2, padding=1),
    }
    for name, full in _INCEPTIONS.items():
        widths = [b.shape.channels(count) for count in full]
        stages[name] = _inception(b, channels, widths, bias=bias)
        channels = widths[0] + widths[2] + widths[4] + widths[5]
        if name in _POOL_PADDING:
            stages[f"pool_{name}"] = nn.MaxPool2d(3, stride=2, padding=_POOL_PADDING[name])
    stages |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    if b.variant.kind is Kind.BOTH:
        stages["dropout"] = nn.Dropout(0.4)
    return stages | {"fc": nn.Linear(channels, b.shape.num_classes)}


def _inception(b: Blocks, channels: int, widths: list[int], *, bias: bool) -> Branches:
    one, reduce3, three, reduce5, five, projection = widths
    branch1 = b.unit("", nn.Conv2d(channels, one, 1, bias=bias))
    branch3 = b.unit(1, nn.Conv2d(channels, reduce3, 1, bias=bias))
    branch3 |= b.unit(2, nn.Conv2d(reduce3, three, 3, padding=1, bias=bias))
    branch5 = b.unit(1, nn.Conv2d(channels, reduce5, 1, bias=bias))
    branch5 |= b.unit(2, nn.Conv2d(reduce5, five, 5, padding=2, bias=bias))
    pool: Stages = {"pool": nn.MaxPool2d(3, stride=1, padding=1)}
    pool |= b.unit("", nn.Conv2d(channels, projection, 1, bias=bias))
    return Branches({"1x1": Chain(branch1), "3x3": Chain(branch3), "5x5": Chain(branch5), "pool": Chain(pool)})


GOOGLENET = Family(
    name="googlenet",
    variants={
        "googlenet": Variant(Kind.FLOAT),
        "googlenetwbin": Variant(Kind.WEIGHTS),
        "googlenetfbin": Variant(Kind.BOTH, signs=frozenset(range(2, 58))),
    },
    in_channels=1,
    input_size=224,
    num_classes=250,
    smallest=17,
    build=_stages,
    blocks=("reference",),
)
