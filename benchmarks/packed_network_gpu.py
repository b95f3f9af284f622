"""The whole packed resnetfbin18 beside resnet18 in bfloat16 on the GPU, at batch 256 and 1.

    PYTHONPATH=. python benchmarks/packed_network_gpu.py

All forms run channels-last on the same random images, as replays of CUDA graphs (`replays.py`): `packed` is the packed
model with its float layers in bfloat16, `packed_compiled` the same through torch.compile, which fuses what stands
between our kernels; `bf16` and `bf16_compiled` are the float network, with cuDNN's autotuner and, compiled, its BN
folded into the weights. Weights are random: the time does not depend on them. `stem` is the packed network's first
convolution with its pooling, BN and ReLU, real-valued in every form; `stem_share` is its part of `packed`.
"""

from collections.abc import Callable
from typing import Any

import torch
from packed_conv import record
from replays import median_us
from torch import Tensor, nn

from dabnn.models import Network, build
from dabnn.packed import PackedModel, pack
from dabnn.packed_conv import PackedConv2d
from kernels import pack_signs
from kernels.conv import packed_conv2d_reference, packed_conv2d_signs_reference

NAMES = ("resnetfbin18", "resnet18")
SHAPE = {"num_classes": 1000, "in_channels": 3, "input_size": 224, "seed": 0}
BATCHES, TURNS, CALLS = (256, 1), 30, 10
Call = Callable[[Tensor], Any]


def make_models(device: str) -> tuple[PackedModel, Network]:
    """Returns the packed network and its float peer in bfloat16, channels-last."""
    packed = pack(build(NAMES[0], **SHAPE).eval()).to(device, torch.bfloat16)
    real = build(NAMES[1], **SHAPE).eval().requires_grad_(False)
    nn.Module.to(real, device, torch.bfloat16, memory_format=torch.channels_last)
    return packed, real


def refuse_if_wrong(net: Network, images: Tensor) -> None:
    """Raises RuntimeError unless every binary layer gives, bit for bit, what the reference makes of its own inputs."""
    wrong = []

    def compare(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        (x,) = inputs
        bits = x if x.dtype == torch.int32 else pack_signs(x)
        scalars = (layer.weight_bits, layer.alpha, layer.beta, layer.bias)
        sizes = (layer.in_channels, layer.stride, layer.padding)
        if layer.threshold is None:
            expected = packed_conv2d_reference(bits, *scalars, *sizes).to(output.dtype)
        else:
            signs = (layer.threshold, layer.falls)
            expected = packed_conv2d_signs_reference(bits, *scalars, *signs, *sizes)
        wrong.append(not torch.equal(output, expected))

    hooks = [m.register_forward_hook(compare) for m in net.modules() if isinstance(m, PackedConv2d)]
    net(images)
    for hook in hooks:
        hook.remove()
    if any(wrong) or not wrong:
        raise RuntimeError(f"{NAMES[0]}: {sum(wrong)} of {len(wrong)} binary layers are wrong, so it is not timed")


def stem(net: Network) -> nn.Sequential:
    """Returns the first convolution and what follows it up to the first binary layer."""
    return nn.Sequential(*(getattr(net, name) for name in ("conv1", "pool1", "bn1", "relu1") if hasattr(net, name)))


def measure(packed: PackedModel, real: Network, images: Tensor) -> dict[str, Any]:
    """Returns one row of the table."""
    net = packed.running()
    refuse_if_wrong(net, images[:8])
    calls: dict[str, Call] = {"packed": net, "bf16": real, "stem": stem(net)}
    if images.is_cuda:
        calls |= {"packed_compiled": torch.compile(net), "bf16_compiled": torch.compile(real)}
    times = median_us({name: (call, images) for name, call in calls.items()}, TURNS, CALLS)
    best_peer = min(value for name, value in times.items() if name.startswith("bf16"))
    best_packed = min(value for name, value in times.items() if name.startswith("packed"))
    return {
        "network": NAMES[0],
        "batch": len(images),
        **{f"{name}_ms": value / 1e3 for name, value in times.items()},
        "ratio": best_peer / best_packed,
        "stem_share": times["stem"] / times["packed"],
        "images_per_s": 1e6 * len(images) / best_packed,
    }


def main() -> None:
    """Measures both batches and writes the record."""
    if not torch.cuda.is_available():
        raise SystemExit("packed_network_gpu: torch sees no CUDA device, and without one there is nothing to measure.")
    import torch._inductor.config as inductor

    inductor.freezing = True
    torch.backends.cudnn.benchmark = True
    packed, real = make_models("cuda")
    rows = []
    for batch in BATCHES:
        generator = torch.Generator().manual_seed(batch)
        images = torch.randn(batch, 3, SHAPE["input_size"], SHAPE["input_size"], generator=generator)
        images = images.to("cuda", torch.bfloat16, memory_format=torch.channels_last)
        with torch.no_grad():
            rows.append(measure(packed, real, images))
        torch.compiler.reset()
        torch.cuda.empty_cache()
    record("packed_network_gpu", rows, turns=TURNS, figure="median of graph replays", peer="the faster of bf16 forms")


if __name__ == "__main__":
    main()
