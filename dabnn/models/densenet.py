"""DenseNet-BC for small images (arXiv 1608.06993) as the reference code of arXiv 1804.02941 builds it: 27 convolutions.

conv 3x3 24, three blocks of four bottlenecks with growth 12, between them transitions that halve channels and size;
BN, ReLU, average over positions, linear layer. A bottleneck is BN, ReLU, conv 1x1 to 48, BN, ReLU, conv 3x3 to 12, and
its output is concatenated to its input; a transition is BN, ReLU, conv 1x1, 2x2 average. No biases. Dropout 0.2 after
every convolution but the first.

The one variant, `densenet`, is float; a range binarizes its weights. With sign inputs the sign follows the ReLU, which
leaves only +1: there is no order of blocks for them here.

Departures from the reference: any number of classes (it had 10 always); the average at the end covers the whole map,
where it folded the positions of larger images into the batch; the output is logits. Kept: its depth of 32, which is not
6n + 4, comes out as four bottlenecks a block, that is 28 layers.
"""

from torch import nn

from dabnn.models.blocks import Blocks, Branches, Chain
from dabnn.models.family import Family, Kind, Stages, Variant


def _stages(b: Blocks) -> Stages:
    growth = b.shape.channels(12)
    channels = 2 * growth
    stages: Stages = {"conv1": nn.Conv2d(b.shape.in_channels, channels, 3, padding=1, bias=False)}
    for block in (1, 2, 3):
        layers: Stages = {}
        for position in range(4):
            wide = 4 * growth
            new = _pre_activated(b, 1, nn.Conv2d(channels, wide, 1, bias=False))
            new |= _pre_activated(b, 2, nn.Conv2d(wide, growth, 3, padding=1, bias=False))
            layers[str(position)] = Branches({"old": nn.Identity(), "new": Chain(new)})
            channels += growth
        stages[f"block{block}"] = Chain(layers)
        if block < 3:
            transition = _pre_activated(b, "", nn.Conv2d(channels, channels // 2, 1, bias=False))
            stages[f"transition{block}"] = Chain(transition | {"pool": nn.AvgPool2d(2)})
            channels //= 2
    stages |= {"bn": nn.BatchNorm2d(channels)} | b.act("", channels)
    head = {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    return stages | head | {"fc": nn.Linear(channels, b.shape.num_classes)}


def _pre_activated(b: Blocks, suffix: object, conv: nn.Conv2d) -> Stages:
    before = {f"bn{suffix}": nn.BatchNorm2d(conv.in_channels)} | b.act(suffix, conv.in_channels)
    return before | {f"conv{suffix}": conv, f"dropout{suffix}": nn.Dropout(0.2)}


DENSENET = Family(
    name="densenet",
    variants={"densenet": Variant(Kind.FLOAT)},
    in_channels=3,
    input_size=32,
    num_classes=10,
    smallest=4,
    build=_stages,
    blocks=("reference",),
)
