"""BinCIFAR: the VGG-like network of 8 convolutions of the reference code of arXiv 1804.02941, for small images.

conv 3x3 128 twice, pool, 256 twice, pool, Dropout2d 0.4, 512 twice, pool, Dropout2d 0.4, 4x4 1024, 1x1 classes; pools
are 2x2. Convolution 1 stands as conv, BN, ReLU. All convolutions keep their biases.

Variants: `bincifar` stands as BN, conv, ReLU on 2 to 7 and BN, conv on 8; with bin_start 2 and bin_end 7 it is the
weight-binary twin of the published logs. `bincifarfbin` stands as BN, Sign, conv, ReLU on 2 to 7, then conv 8; in
bireal order it has no dropout, which would stand right before a sign.

Departures from the reference: no ReLU on the logits of `bincifar`, which gave samples with ten equal scores and no
gradient; the kernel of convolution 7 follows the image size (4x4 at 32 pixels), where the reference folded the
positions of larger images into the batch; the output is logits.
"""

from torch import nn

from dabnn.models.blocks import Blocks
from dabnn.models.family import Family, Kind, Stages, Variant, refuse_input_size


def _stages(b: Blocks) -> Stages:
    if b.shape.input_size % 8:
        rule = "its three pools halve the image, so the size must be a multiple of 8, at least 16"
        raise refuse_input_size("bincifar", b.shape.input_size, rule)
    c1, c3, c5, c7 = (b.shape.channels(full) for full in (128, 256, 512, 1024))
    convs = [
        nn.Conv2d(b.shape.in_channels, c1, 3, padding=1),
        nn.Conv2d(c1, c1, 3, padding=1),
        nn.Conv2d(c1, c3, 3, padding=1),
        nn.Conv2d(c3, c3, 3, padding=1),
        nn.Conv2d(c3, c5, 3, padding=1),
        nn.Conv2d(c5, c5, 3, padding=1),
        nn.Conv2d(c5, c7, b.shape.input_size // 8),
    ]
    stages: Stages = {}
    for index, conv in enumerate(convs, start=1):
        stages |= b.unit(index, conv, norm_first=index > 1, pool=nn.MaxPool2d(2) if index in (2, 4, 6) else None)
        if index in (4, 6):
            stages |= b.dropout(index, nn.Dropout2d(0.4))
    if b.variant.kind is Kind.FLOAT:
        stages["bn8"] = nn.BatchNorm2d(c7)
    return stages | {"conv8": nn.Conv2d(c7, b.shape.num_classes, 1), "flatten": nn.Flatten()}


BINCIFAR = Family(
    name="bincifar",
    variants={
        "bincifar": Variant(Kind.FLOAT),
        "bincifarfbin": Variant(Kind.BOTH, signs=frozenset(range(2, 8))),
    },
    in_channels=3,
    input_size=32,
    num_classes=10,
    smallest=16,
    build=_stages,
)
