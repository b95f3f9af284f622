"""BatchNorm whose statistics are those of the whole batch over all ranks.

On CUDA torch's own `SyncBatchNorm` does it; that one refuses other devices, so this file holds the same for the CPU.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dabnn.distributed import World


def synchronize(net: nn.Module, world: World) -> None:
    """Make every BatchNorm of `net` take its statistics over all ranks; parameters and names stay the same.

    With one rank nothing changes.
    """
    if world.size == 1:
        return
    for path, module in list(net.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            whole: nn.Module = (
                nn.SyncBatchNorm.convert_sync_batchnorm(module)
                if world.device.type == "cuda"
                else SyncBatchNorm2d.of(module)
            )
            net.set_submodule(path, whole)


class SyncBatchNorm2d(nn.BatchNorm2d):
    r"""BatchNorm over the samples of all ranks of the default process group.

    Training, for inputs x of shape (n, C, H, W) on each rank, with N = sum over ranks of n H W: mean = sum x / N and
    var = sum (x - mean)^2 / N a channel, sums over all ranks; y = (x - mean) / sqrt(var + eps) * weight + bias, the
    last two only where it is affine; the running variance takes var N / (N - 1). The gradient is the exact one through
    both sums, which makes it a collective operation too. Evaluation is the parent's. Ioffe and Szegedy, arXiv
    1502.03167, algorithm 1.
    """

    @classmethod
    def of(cls, layer: nn.BatchNorm2d) -> "SyncBatchNorm2d":
        """Return a layer that holds the parameters and buffers of `layer` (the same objects)."""
        made = cls(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        made.weight, made.bias = layer.weight, layer.bias
        for name, buffer in layer.named_buffers():
            setattr(made, name, buffer)
        return made.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the parent's name, callable by keyword
        """Return the normalised input (n, C, H, W) of this rank; in training every rank must call it."""
        if not self.training:
            return super().forward(input)
        x = input.float()
        count = x.new_tensor([x.numel() / x.shape[1]])
        sums = _sum_over_ranks(torch.cat([x.sum(dim=(0, 2, 3)), count]))
        total = sums[-1].detach()
        mean = sums[:-1] / total
        centered = x - mean.view(-1, 1, 1)
        variance = _sum_over_ranks(centered.square().sum(dim=(0, 2, 3))) / total
        self._remember(mean.detach(), variance.detach() * total / (total - 1))
        y: Tensor = centered * (variance + self.eps).rsqrt().view(-1, 1, 1)
        if self.affine:
            y = y * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)
        return y.to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


def _sum_over_ranks(value: Tensor) -> Tensor:
    total: Tensor = _SumOverRanks.apply(value)  # type: ignore[no-untyped-call] # torch's own
    return total


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:  # noqa: ARG004 - torch's signature
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ARG004 - torch's signature
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total
