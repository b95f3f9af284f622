"""Small networks for the tests of exports: every kind of layer and block, with statistics of a few images."""

import torch
from torch import Tensor, nn

from dabnn.models import ModelSpec, Network, build
from dabnn.packed import Normalization, PackedModel, load_packed, pack

CLASSES = tuple(f"class {index}" for index in range(7))
_SMALL = {"num_classes": len(CLASSES), "width": 0.125, "in_channels": 3, "input_size": 16, "seed": 3}


def network(**options: object) -> Network:
    """A small network with all kinds of channels: rising and falling, shifted and not."""
    net = build(**(_SMALL | options))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for name, parameter in net.named_parameters():
            if name.endswith(("input_shift", "shift_in", "shift_out")):
                parameter.normal_(0, 0.1)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d) and module.affine:
                module.weight.uniform_(-1, 1.5)
                module.bias.normal_(0, 0.3)
        net(images(8, net.spec))
    return net.eval()


def images(num: int, spec: ModelSpec, seed: int = 0) -> Tensor:
    """Normalized images."""
    shape = (num, spec.in_channels, spec.input_size, spec.input_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed_from_file(folder, half: bool = False, **options: object) -> tuple[PackedModel, int]:
    """The packed model of a small network, read from its file, and the file's size."""
    normalization = Normalization((0.1, 0.2, 0.3)[: options.get("in_channels", 3)], (0.5,) * 3, "plain")
    file = folder / "model.safetensors"
    num_bytes = pack(network(**options), classes=CLASSES, normalization=normalization).save(file, half=half)
    return load_packed(file), num_bytes
