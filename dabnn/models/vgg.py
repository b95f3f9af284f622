"""VGG networks for small images (arXiv 1409.1556): stacks of 3x3 convolutions between 2x2 pools, then a linear layer.

- `vgg16_bncifar` as the reference code of arXiv 1804.02941 builds it: 64 twice, 128 twice, 256, 512 and 512 three times
  each, every one as conv, BN, ReLU, with a pool after each stack and Dropout2d 0.3 inside the stacks of 128 and more;
  average over positions, Dropout 0.4, linear layer. All convolutions have biases.
- `vgg_small`, the common yardstick of binary networks (arXiv 1807.10029): 128 twice, 256 twice, 512 twice, a pool after
  each pair, linear layer on the whole map. Convolutions have no biases. Convolutions 2 to 6 have binary weights and
  inputs (BN, Sign, conv, ReLU); the first convolution and the linear layer are real.

Departures from the reference: any number of classes (it had 10 always); larger images are averaged over positions
before the linear layer, where it failed. Its output was logits, too, but its only loss took log-probabilities.
"""

from torch import nn

from dabnn.models.blocks import Blocks
from dabnn.models.family import Family, Kind, Stages, Variant

_SMALL_BINARY = frozenset(range(2, 7))


def _vgg16(b: Blocks) -> Stages:
    stages: Stages = {}
    channels, number = b.shape.in_channels, 0
    for full, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for position in range(1, depth + 1):
            number += 1
            width = b.shape.channels(full)
            stages |= b.unit(number, nn.Conv2d(channels, width, 3, padding=1))
            channels = width
            if full > 64 and position < depth:
                stages[f"dropout{number}"] = nn.Dropout2d(0.3)
        stages[f"pool{number}"] = nn.MaxPool2d(2)
    head = {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "dropout": nn.Dropout(0.4)}
    return stages | head | {"fc": nn.Linear(channels, b.shape.num_classes)}


def _vgg_small(b: Blocks) -> Stages:
    stages: Stages = {}
    channels = b.shape.in_channels
    for number, full in enumerate((128, 128, 256, 256, 512, 512), start=1):
        width = b.shape.channels(full)
        pool = None if number % 2 else nn.MaxPool2d(2)
        stages |= b.unit(number, nn.Conv2d(channels, width, 3, padding=1, bias=False), pool=pool)
        channels = width
    num_features = channels * (b.shape.input_size // 8) ** 2
    return stages | {"flatten": nn.Flatten(), "fc": nn.Linear(num_features, b.shape.num_classes)}


VGG16_BNCIFAR = Family(
    name="vgg16_bncifar",
    variants={"vgg16_bncifar": Variant(Kind.FLOAT)},
    in_channels=3,
    input_size=32,
    num_classes=10,
    smallest=32,
    build=_vgg16,
)
VGG_SMALL = Family(
    name="vgg_small",
    variants={"vgg_small": Variant(Kind.BOTH, signs=_SMALL_BINARY, weights=_SMALL_BINARY)},
    in_channels=3,
    input_size=32,
    num_classes=10,
    smallest=8,
    build=_vgg_small,
)
