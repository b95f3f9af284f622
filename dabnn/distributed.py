"""What the training loop needs from `torch.distributed`: who am I, do all ranks agree, sum over ranks, a settled DDP.

`World.current()` is the only reader of the process group. With one process nothing here communicates.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

COLLECTIVE_TIMEOUT_S = 300  # a rank that was killed is noticed by Ray within seconds; this ends a hang
# Constants of splitmix64 (Steele et al., OOPSLA 2014), which spread small integers over 64 bits.
_GAMMA, _MIX = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9
_MASK = 2**64 - 1


@dataclass(frozen=True)
class World:
    """The place of this process among the ranks.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        device: Where tensors of this rank live.
        control: Process group for small CPU tensors (gloo), None with one process.
    """

    rank: int
    size: int
    device: torch.device
    control: Any = None

    @classmethod
    def current(cls, device: torch.device | str = "cpu", timeout_s: float = COLLECTIVE_TIMEOUT_S) -> "World":
        """Return the place of this process in the default process group, or a world of one without a group.

        Args:
            device: Where tensors of this rank live.
            timeout_s: How long a rank waits for the others in what it exchanges beside the gradients.
        """
        device = torch.device(device)
        if not dist.is_available() or not dist.is_initialized():
            return cls(0, 1, device)
        control = (
            dist.group.WORLD
            if dist.get_backend() == "gloo"
            else dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        )
        return cls(dist.get_rank(), dist.get_world_size(), device, control)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes what a run leaves behind."""
        return self.rank == 0

    def largest(self, values: list[int]) -> list[int]:
        """Return the element-wise maximum of `values` over all ranks; every rank must call it."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.control)
        return [int(value) for value in tensor]

    def total(self, values: list[float]) -> list[float]:
        """Return the element-wise sum of `values` over all ranks in float64; every rank must call it."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.control)
        return [float(value) for value in tensor]

    def share(self, value: Any) -> Any:
        """Return rank 0's `value` (any picklable object) on every rank; every rank must call it."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's `value` in rank order; every rank must call it."""
        if self.size == 1:
            return [value]
        boxes: list[Any] = [None] * self.size
        dist.all_gather_object(boxes, value, group=self.control)
        return boxes


@contextmanager
def deterministic() -> Iterator[None]:
    """Within the block torch uses deterministic algorithms only and cuDNN does not choose by timing; restored on exit.

    CUDA also needs `CUBLAS_WORKSPACE_CONFIG=:4096:8` in the environment before its first use.
    """
    before = torch.are_deterministic_algorithms_enabled()
    benchmark_before = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = benchmark_before


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch's global generators as a pure function of (seed, step, rank).

    Dropout draws from them. Seeding each step makes the draw independent of history, so that a run resumed at any step
    continues bit for bit without any saved generator state.
    """
    value = seed
    for part in (step, rank):
        value = ((value ^ (value >> 31)) * _MIX + (part + 1) * _GAMMA) & _MASK
    torch.manual_seed(value)


def wrap(net: nn.Module, world: World, sample_shape: tuple[int, ...]) -> nn.Module:
    """Return `net` under DistributedDataParallel, its gradient buckets settled; with one process, `net` itself.

    DDP orders its buckets anew after the first backward pass. The order decides in which sequence the summands of
    three or more ranks are added, and float addition is not associative: a run resumed at step n would round its
    first step differently from an uninterrupted one. A discarded step on random input moves that re-ordering before
    the first real step. Buffers are restored.

    Args:
        net: The network, on `world.device`.
        world: The ranks.
        sample_shape: Shape (C, H, W) of one image.
    """
    if world.size == 1:
        return net
    device_ids = [world.device.index] if world.device.type == "cuda" else None
    wrapped = DistributedDataParallel(net, device_ids=device_ids)
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, *sample_shape, generator=generator).to(world.device)
    wrapped.train()
    for _ in range(2):  # the second forward pass does the re-ordering
        wrapped(images).sum().backward()
    net.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, buffer in net.named_buffers():
            buffer.copy_(buffers[name])
    return wrapped


def share_buffers(net: nn.Module, world: World) -> None:
    """Give every rank rank 0's buffers (the running statistics of BatchNorm), so that all evaluate the same network."""
    if world.size == 1:
        return
    for buffer in net.buffers():
        dist.broadcast(buffer, src=0)
