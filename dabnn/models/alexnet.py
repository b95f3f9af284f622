"""AlexNet as the reference code of arXiv 1804.02941 builds it: 8 convolutions, no groups, BN instead of LRN.

conv 11x11/4 96, pool, 5x5 256, pool, 3x3 384 twice, 3x3 256, pool, 6x6 4096, 1x1 4096, 1x1 classes; pools are 3x3
stride 2; Dropout2d before convolutions 6 and 7. Feature maps at 224 pixels: 55, 27, 13, 6, 1.

Variants: convolutions with sign inputs stand as BN, Sign, conv, ReLU, the others as conv, BN, ReLU. All but the float
one drop the biases of convolutions 2 to 7. Dropout: 0.5, fbin and hybridv2 0, hybrid 0.1.

Departures from the reference: the kernel of convolution 6 follows the image size (6x6 at 223 to 254 pixels), where the
reference failed on smaller images and folded the positions of larger ones into the batch; the output is logits.
"""

from torch import nn

from dabnn.models.blocks import Blocks
from dabnn.models.family import Family, Kind, Stages, Variant

_DROPOUT = {Kind.FLOAT: 0.5, Kind.WEIGHTS: 0.5, Kind.BOTH: 0.0, Kind.HYBRID: 0.1, Kind.HYBRID_V2: 0.0}


def _stages(b: Blocks) -> Stages:
    bias = b.variant.kind is Kind.FLOAT
    c1, c2, c3, c6 = (b.shape.channels(full) for full in (96, 256, 384, 4096))
    size = ((b.shape.input_size + 4 - 11) // 4 + 1 - 3) // 2 + 1
    size = ((size - 3) // 2 + 1 - 3) // 2 + 1
    convs = [
        nn.Conv2d(b.shape.in_channels, c1, 11, stride=4, padding=2),
        nn.Conv2d(c1, c2, 5, padding=2, bias=bias),
        nn.Conv2d(c2, c3, 3, padding=1, bias=bias),
        nn.Conv2d(c3, c3, 3, padding=1, bias=bias),
        nn.Conv2d(c3, c2, 3, padding=1, bias=bias),
        nn.Conv2d(c2, c6, size, bias=bias),
        nn.Conv2d(c6, c6, 1, bias=bias),
    ]
    stages: Stages = {}
    for index, conv in enumerate(convs, start=1):
        stages |= b.unit(index, conv, pool=nn.MaxPool2d(3, stride=2) if index in (1, 2, 5) else None)
        if index in (5, 6):
            stages |= b.dropout(index, nn.Dropout2d(_DROPOUT[b.variant.kind]))
    return stages | {"conv8": nn.Conv2d(c6, b.shape.num_classes, 1), "flatten": nn.Flatten()}


ALEXNET = Family(
    name="alexnet",
    variants={
        "alexnet": Variant(Kind.FLOAT),
        "alexnetwbin": Variant(Kind.WEIGHTS),
        "alexnetfbin": Variant(Kind.BOTH, signs=frozenset(range(2, 8))),
        "alexnethybrid": Variant(Kind.HYBRID, signs=frozenset(range(2, 6))),
        "alexnethybridv2": Variant(Kind.HYBRID_V2, signs=frozenset(range(2, 7))),
    },
    in_channels=3,
    input_size=224,
    num_classes=1000,
    smallest=63,
    build=_stages,
)
