"""Residual networks of two convolutions a block (arXiv 1512.03385): ResNet-18 in six reference forms, and yardsticks.

The stem is conv 7x7/2, BN, activation, 3x3/2 max-pool above 64 pixels (ImageNet), and conv 3x3, BN, activation up to 64
(CIFAR). Convolutions have no biases. Numbers in a stage: conv1 and conv2 of each block; where the shape changes, the
1x1 convolution of the shortcut (downsample) follows conv2 in reference order and conv1 in bireal order.

Reference names (arXiv 1804.02941), 64 to 512 channels, two blocks a stage, downsample 8, 13, 18, and for all but
`resnet18` a 1x1 convolution without bias (21) as classifier:

- `resnet18`: float, pre-activation (arXiv 1603.05027): BN, ReLU, conv, BN, ReLU, conv, + shortcut, which starts after
  the first ReLU where it has a convolution; linear classifier.
- `resnetwbin18`: conv, BN, ReLU, conv, BN, + shortcut (conv, BN where needed), ReLU. Without a range: its float twin.
- `resnetfbin18`: BN, Sign, conv, ReLU, BN, Sign, conv, + shortcut (BN, Sign, conv), ReLU; sign inputs on 2 to 20.
- `resnethybrid18`, `resnethybridv218`, `resnethybridv318`: sign inputs on 2 to 18; 2 to 13; 2, 4 to 8 and 11 to 13.

Yardsticks, with a linear classifier; weights and inputs of all 3x3 convolutions but the first are binary:

- `resnet20`: for CIFAR, 16 to 64 channels, three blocks a stage, in reference order; shortcuts have no parameters
  (averages and repeated channels, where arXiv 1512.03385 takes every second position and pads zeros).
- `bireal18`: Bi-Real Net (arXiv 1808.00278): a shortcut round each convolution, no ReLU, the polynomial estimator of
  its signs. The downsample is a 2x2 average, then a
  1x1 convolution that is real in weights and inputs, as in that paper and in what followed it, and BN.
- `react18`: ReActNet on the same network (arXiv 2003.03488): learned shifts before the signs, RPReLU after the sums.

With block="bireal" the reference names take the downsample of `bireal18`, with sign inputs where the variant has them.

Departures from the reference: `resnet18` builds, and takes any number of classes; block 2 of the hybrids reads block 1
(it read the stem); the average covers the whole map, so that small images work; the output is logits.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from torch import nn

from dabnn.models.blocks import Blocks, Chain, Shortcut, free_shortcut
from dabnn.models.family import Family, Kind, Stages, Variant

_FIRST_SIZE_WITH_POOL = 65
_BIREAL_BINARY = frozenset(range(2, 21)) - {7, 12, 17}
_RESNET20_BINARY = frozenset(range(2, 20))

_Block = Callable[[Blocks, nn.Conv2d, nn.Conv2d], Stages]


def _stages(b: Blocks, *, block: _Block, width: int = 64, num_stages: int = 4, depth: int = 2) -> Stages:
    """Return a network up to its flat features: channels double and sizes halve from stage to stage."""
    channels = b.shape.channels(width)
    stages = _stem(b, channels)
    for index in range(num_stages):
        blocks: Stages = {}
        for position in range(depth):
            out_channels, stride = b.shape.channels(width << index), 2 if index and not position else 1
            conv1 = nn.Conv2d(channels, out_channels, 3, stride, padding=1, bias=False)
            conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
            blocks[str(position)] = Chain(block(b, conv1, conv2))
            channels = out_channels
        stages[f"stage{index + 1}"] = Chain(blocks)
    head = nn.Linear(channels, b.shape.num_classes)
    return stages | {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": head}


def _reference(b: Blocks) -> Stages:
    stages = _stages(b, block=_basic)
    channels = b.shape.channels(512)
    del stages["flatten"], stages["fc"]
    head = nn.Conv2d(channels, b.shape.num_classes, 1, bias=False)
    return stages | {"conv": head, "flatten": nn.Flatten()}


def _stem(b: Blocks, channels: int) -> Stages:
    if b.shape.input_size < _FIRST_SIZE_WITH_POOL:
        return b.unit(1, nn.Conv2d(b.shape.in_channels, channels, 3, padding=1, bias=False))
    conv = nn.Conv2d(b.shape.in_channels, channels, 7, stride=2, padding=3, bias=False)
    return b.unit(1, conv) | {"pool1": nn.MaxPool2d(3, stride=2, padding=1)}


def _basic(b: Blocks, conv1: nn.Conv2d, conv2: nn.Conv2d, *, free: bool = False) -> Stages:
    """Return a block with one shortcut round both convolutions, or in bireal order one round each.

    Args:
        b: the network so far.
        conv1: first convolution, which may change the shape.
        conv2: second one, which does not.
        free: whether a shortcut never has a convolution.
    """
    free = free or (conv1.in_channels == conv1.out_channels and conv1.stride == (1, 1))
    if b.is_bireal:
        stages = b.unit(1, conv1, close=False)
        stages |= {"add1": Shortcut("conv1", free_shortcut(conv1))} if free else _downsample(b, "conv1", conv1)
        stages |= b.act(1, conv1.out_channels) | b.unit(2, conv2, close=False) | {"add2": Shortcut("conv2", {})}
    else:
        stages = b.unit(1, conv1) | b.unit(2, conv2, close=False)
        start = next(iter(stages))
        stages |= {"add2": Shortcut(start, free_shortcut(conv1))} if free else _downsample(b, start, conv1)
    return stages | b.act(2, conv2.out_channels)


def _downsample(b: Blocks, start: str, conv1: nn.Conv2d) -> Stages:
    stride = 1 if b.is_bireal else conv1.stride[0]
    pool: Stages = {"pool": nn.AvgPool2d(conv1.stride[0], ceil_mode=True)} if b.is_bireal else {}
    conv = nn.Conv2d(conv1.in_channels, conv1.out_channels, 1, stride, bias=False)
    return {"downsample": Shortcut(start, pool | b.unit("", conv, close=False))}


def _pre_activated(b: Blocks, conv1: nn.Conv2d, conv2: nn.Conv2d) -> Stages:
    stages: Stages = {"bn1": nn.BatchNorm2d(conv1.in_channels)} | b.act(1, conv1.in_channels) | {"conv1": conv1}
    stages |= {"bn2": nn.BatchNorm2d(conv2.in_channels)} | b.act(2, conv2.in_channels) | {"conv2": conv2}
    if conv1.in_channels == conv1.out_channels and conv1.stride == (1, 1):
        return stages | {"add2": Shortcut("bn1", {})}
    conv = nn.Conv2d(conv1.in_channels, conv1.out_channels, 1, conv1.stride[0], bias=False)
    return stages | {"downsample": Shortcut("conv1", {"conv": conv})}


RESNET18 = Family(
    name="resnet",
    variants={"resnet18": Variant(Kind.FLOAT)},
    in_channels=3,
    input_size=32,
    num_classes=10,
    smallest=1,
    build=partial(_stages, block=_pre_activated),
    blocks=("reference",),
)
RESNET = Family(
    name="resnet",
    variants={
        "resnetwbin18": Variant(Kind.WEIGHTS),
        "resnetfbin18": Variant(Kind.BOTH, signs=frozenset(range(2, 21))),
        "resnethybrid18": Variant(Kind.HYBRID, signs=frozenset(range(2, 19))),
        "resnethybridv218": Variant(Kind.HYBRID_V2, signs=frozenset(range(2, 14))),
        "resnethybridv318": Variant(Kind.HYBRID_V3, signs=frozenset({2, *range(4, 9), *range(11, 14)})),
    },
    in_channels=1,
    input_size=224,
    num_classes=250,
    smallest=1,
    build=_reference,
)
RESNET20 = Family(
    name="resnet",
    variants={"resnet20": Variant(Kind.BOTH, signs=_RESNET20_BINARY, weights=_RESNET20_BINARY)},
    in_channels=3,
    input_size=32,
    num_classes=10,
    smallest=1,
    build=partial(_stages, block=partial(_basic, free=True), width=16, num_stages=3, depth=3),
)
_BIREAL = Variant(Kind.BOTH, signs=_BIREAL_BINARY, weights=_BIREAL_BINARY, block="bireal")
BIREAL18 = Family(
    name="resnet",
    variants={
        "bireal18": replace(_BIREAL, options={"input_ste": "polynomial"}),
        "react18": replace(
            _BIREAL, activation="rprelu", options={"input_quantizer": "rsign", "input_ste": "polynomial"}
        ),
    },
    in_channels=3,
    input_size=32,
    num_classes=10,
    smallest=1,
    build=partial(_stages, block=_basic),
    blocks=("bireal",),
)
