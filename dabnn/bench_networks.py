"""What is measured: networks with random weights, the float peer of a packed model, and images for both.

The peer leaves the signs out, which cost it time and the packed form next to none, so that it is at least as fast as
the float twin that computes the same function. Its values are no model's.
"""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from dabnn import packed_file
from dabnn.models import ModelSpec, Network, build
from dabnn.packed import PackedModel
from dabnn.quantizers import expand

# Images in training mode: a BN over a single value a channel has no variance.
_NUM_NOISE = 2


def float_network(spec: ModelSpec, device: torch.device | str, dtype: torch.dtype) -> Network:
    """Return the architecture of a specification without a binary layer, in evaluation, channels-last."""
    real = {"bin_start": None, "bin_end": None, "layers": (), "inputs": "none", "plan": None, "center": None}
    net = build(**asdict(spec) | real, seed=0).eval().requires_grad_(False)
    net.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload] # declared for Module only
    return net


def float_peer(packed: PackedModel, device: torch.device | str, dtype: torch.dtype) -> Network:
    """Return `float_network` with the packed model's two-valued filters as ordinary weights."""
    net = float_network(packed.spec, device, dtype)
    for name, bits in packed.tensors.items():
        path, _, kind = name.rpartition(".")
        if kind != "weight_bits":
            continue
        weight = net.get_parameter(f"{path}.weight")
        mask = packed_file.decode_mask(bits, weight.shape)
        alpha, beta = (packed.tensors[f"{path}.{scalar}"].float() for scalar in ("alpha", "beta"))
        weight.copy_(expand(mask, alpha, beta))
    return net


def random_network(name: str, **options: Any) -> Network:
    """Return `build(name, **options)` with seeded weights and the BN statistics of noise, in evaluation.

    With the statistics of a new BN, mean 0 and variance 1, all signs after a ReLU would be the same.
    """
    net = build(name, **options, seed=0)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # the average over all batches, so over the one
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # dropout
        net(random_images(net.spec, _NUM_NOISE, "cpu", torch.float32))
    return net.eval()


def random_images(spec: ModelSpec, batch: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    """Return normalized noise (batch, in_channels, input_size, input_size), channels-last, the same at each call."""
    shape = (batch, spec.in_channels, spec.input_size, spec.input_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return noise.to(device, dtype, memory_format=torch.channels_last)
