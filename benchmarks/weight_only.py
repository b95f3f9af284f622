"""What the weight-only benchmarks of CPU and GPU share: layers of the zoo with real inputs and binary weights.

The layers are the four 3x3 sizes of ResNet-18 at 224 pixels, and three of AlexNet: its 5x5 convolution and the two
that are its fully connected layers. Peers hold the same two-valued weight in ordinary numbers.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels import pack_signs, packed_weight_conv2d, quantize_dab

# Channels, filters, kernel, image size, padding.
LAYERS = [
    (64, 64, 3, 56, 1),
    (128, 128, 3, 28, 1),
    (256, 256, 3, 14, 1),
    (512, 512, 3, 7, 1),
    (96, 256, 5, 26, 2),
    (256, 4096, 6, 6, 0),
    (4096, 4096, 1, 1, 0),
]
# Rounding of one operation in float32, and in sums of tensor cores.
UNITS = {"cpu": 2.0**-24, "cuda": 2.0**-22}


@dataclass(frozen=True)
class Case:
    """One layer with random data.

    Attributes:
        name: Image size, channels, filters and kernel.
        x: (N, C, H, W), channels-last, random.
        dense: (F, C, k, k) float32, the two-valued weight, channels-last.
        weight_bits: Its mask packed.
        alpha: (F,) float32.
        beta: (F,) float32.
        padding: Zeros at each side.
    """

    name: str
    x: Tensor
    dense: Tensor
    weight_bits: Tensor
    alpha: Tensor
    beta: Tensor
    padding: int

    def bits(self, x: Tensor) -> Tensor:
        """Returns the layer's output by its bits."""
        return packed_weight_conv2d(x, self.weight_bits, self.alpha, self.beta, padding=self.padding)

    @property
    def num_macs(self) -> int:
        """Multiply-accumulates of all images."""
        side = self.x.shape[2] + 2 * self.padding - self.dense.shape[2] + 1
        return len(self.x) * self.dense.numel() * side * side


def make_case(layer: tuple[int, int, int, int, int], batch: int, device: str, **kind: Any) -> Case:
    """Returns a layer with seeded random weights and inputs; `kind` is the inputs' dtype."""
    channels, filters, kernel, size, padding = layer
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(batch, channels, size, size, generator=generator).to(device, **kind)
    weight = torch.randn(filters, channels, kernel, kernel, generator=generator).to(device)
    mask, alpha, beta = quantize_dab(weight)
    dense = torch.where(mask, alpha.view(-1, 1, 1, 1), beta.view(-1, 1, 1, 1))
    bits = pack_signs(torch.where(mask, 1.0, -1.0))
    x, dense = (tensor.to(memory_format=torch.channels_last) for tensor in (x, dense))
    return Case(f"{size}x{size}x{channels} {filters} {kernel}x{kernel}", x, dense, bits, alpha, beta, padding)


def refuse_if_wrong(case: Case) -> None:
    """Raises RuntimeError unless the layer is as near to the exact one as rounding allows (`kernels.weight_only`)."""
    x, weight = case.x[:1].double(), case.dense.double()
    exact = F.conv2d(x, weight, padding=case.padding)
    magnitude = F.conv2d(x.abs(), weight.abs(), padding=case.padding)
    error = (weight[0].numel() + 5) * UNITS[case.x.device.type]
    bound = 3 * error / (1 - error) * magnitude
    rounding = torch.finfo(case.x.dtype).eps / 2
    found = case.bits(case.x)[:1].double()
    if not bool(((found - exact).abs() <= bound + rounding * (exact.abs() + bound)).all()):
        raise RuntimeError(f"{case.name}, batch {len(case.x)}: the layer by its bits is wrong, so it is not timed")
