"""What the benchmarks of binarized training on CPU and GPU share: the networks, a step, turns, and the ratio.

The peer is the same architecture with no binary layer: same blocks, same BatchNorm, same optimizer, so the ratio is
what signs, quantization and straight-through gradients cost. The networks take turns, so that a busy machine slows them
alike; a row's time is the median of its turns and its ratio the median over turns of its step over the peer's of the
same turn. A network that does not learn its one batch is refused before it is timed.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dabnn.layers import BinaryConv2d
from dabnn.models import build

NUM_CLASSES = 250
PEER = "float"


@dataclass(frozen=True)
class Trainee:
    """A network with what a step needs.

    Attributes:
        net: The network, in training mode.
        forward: The network, or its compiled form.
        optimizer: Adam on all parameters.
        images: (N, C, H, W) random.
        labels: (N,) random.
        autocast: Whether the forward pass runs in bfloat16.
    """

    net: nn.Module
    forward: Callable[[Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    images: Tensor
    labels: Tensor
    autocast: bool = False

    def step(self) -> Tensor:
        """Takes one optimizer step on the one batch and returns its loss."""
        with torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.autocast):
            loss = F.cross_entropy(self.forward(self.images).float(), self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def make_nets(name: str, quantizers: list[str]) -> dict[str, nn.Module]:
    """Returns the float peer and one network for each quantizer, all from the same seed."""
    nothing: dict[str, list[int]] = {"binary_weights": [], "binary_inputs": []}
    nets: dict[str, nn.Module] = {PEER: build(name, num_classes=NUM_CLASSES, plan=nothing, seed=1)}
    for weights in quantizers:
        nets[weights] = build(name, num_classes=NUM_CLASSES, weights=weights, seed=1)
    return nets


def make_trainee(net: nn.Module, images: Tensor, *, compiled: bool = False, autocast: bool = False) -> Trainee:
    """Returns a network ready to train on random labels, with a learning rate that one batch survives."""
    labels = torch.arange(len(images), device=images.device) % NUM_CLASSES
    forward = torch.compile(net) if compiled else net
    return Trainee(net, forward, torch.optim.Adam(net.parameters(), 1e-3), images, labels, autocast)


def refuse_if_wrong(name: str, trainee: Trainee, num_steps: int = 4) -> None:
    """Raises RuntimeError unless binary layers are where they should be and the loss falls; it warms up as well."""
    binary = [m for m in trainee.net.modules() if isinstance(m, BinaryConv2d) and m.weight_quantizer and m.binary_input]
    if bool(binary) == (name == PEER):
        raise RuntimeError(f"{name}: {len(binary)} binary layers, so the comparison would be of something else")
    losses = [float(trainee.step()) for _ in range(num_steps)]
    if not losses[-1] < losses[0]:
        raise RuntimeError(f"{name}: losses {losses} of one batch do not fall, so it is not timed")


def compare(
    trainees: Mapping[str, Trainee], turns: int, synchronize: Callable[[], object] = lambda: None
) -> list[dict[str, Any]]:
    """Returns a row for each network: medians of the step and of its ratio to the peer, in time and processor time.

    `ratio_low` and `ratio_high` are the quartiles of `ratio`; `cpu_ratio` counts the processor time of this process,
    which other programs on the machine disturb less.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in trainees}
    for _ in range(turns):
        for name, trainee in trainees.items():
            synchronize()
            start, cpu_start = time.perf_counter(), time.process_time()
            trainee.step()
            synchronize()
            times[name].append((time.perf_counter() - start, time.process_time() - cpu_start))
    rows = []
    for name, own in times.items():
        pairs = list(zip(own, times[PEER], strict=True))
        ratios = sorted(mine[0] / peer[0] for mine, peer in pairs)
        rows.append(
            {
                "weights": name,
                "step_ms": 1e3 * median(seconds for seconds, _ in own),
                "ratio": median(ratios),
                "ratio_low": ratios[len(ratios) // 4],
                "ratio_high": ratios[-1 - len(ratios) // 4],
                "cpu_ratio": median(mine[1] / peer[1] for mine, peer in pairs),
            }
        )
    return rows
