"""MobileNet v1 (arXiv 1704.04861) as the reference code of arXiv 1804.02941 builds it: 27 convolutions, a linear layer.

conv 3x3/2 32, then 13 pairs of a depthwise 3x3 (even numbers) and a 1x1 convolution (odd numbers), each as conv, BN,
ReLU, without biases; average over positions.

The one variant, `mobilenet`, is float. A range may binarize it, and depthwise weights with it, each filter of 9 taps by
itself; but `center="tap"` is refused there, since a depthwise filter has one input channel, of which nothing is left
after subtracting the mean over channels (the reference did that, and its depthwise weights became 0). Sign inputs of
depthwise convolutions train, but have no packed form.

Departures from the reference: the output is logits; the average covers the whole map, so that small images work.
"""

from torch import nn

from dabnn.models.blocks import Blocks, Chain
from dabnn.models.family import Family, Kind, Stages, Variant

_PAIRS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))


def _stages(b: Blocks) -> Stages:
    channels = b.shape.channels(32)
    stages = b.unit(1, nn.Conv2d(b.shape.in_channels, channels, 3, stride=2, padding=1, bias=False))
    for index, (full, stride) in enumerate(_PAIRS, start=1):
        width = b.shape.channels(full)
        depthwise = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
        stages[f"pair{index}"] = Chain(b.unit(1, depthwise) | b.unit(2, nn.Conv2d(channels, width, 1, bias=False)))
        channels = width
    head = {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    return stages | head | {"fc": nn.Linear(channels, b.shape.num_classes)}


MOBILENET = Family(
    name="mobilenet",
    variants={"mobilenet": Variant(Kind.FLOAT)},
    in_channels=1,
    input_size=224,
    num_classes=250,
    smallest=32,
    build=_stages,
)
