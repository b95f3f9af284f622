"""The running form of packed networks: the same bits, with fewer passes over the data."""

import pytest
import torch
from torch import nn

from dabnn.fusion import PackReached, fuse
from dabnn.models import Network, build
from dabnn.packed import pack
from dabnn.packed_conv import PackedConv2d


def trained_like(name: str, **options: object) -> Network:
    """A network whose BN has statistics and signs of every kind, as after training."""
    net = build(name, num_classes=7, seed=3, **options)
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            for tensor in (module.weight, module.bias, module.running_mean):
                assert isinstance(tensor, torch.Tensor)
                tensor.data = torch.randn(tensor.shape, generator=generator)
    return net.eval()


CASES = {
    "bincifarfbin": {"width": 0.5},
    "bincifarfbin ": {"width": 0.5, "block": "bireal"},
    "bincifarfbin  ": {"width": 0.5, "inputs": [3, 5, 6]},
    "resnetfbin18": {"width": 0.25, "input_size": 64},
    "resnetfbin18 ": {"width": 0.25, "input_size": 64, "block": "bireal"},
    "sketchanetfbin": {"width": 0.25},
    "googlenetfbin": {"width": 0.25},
    "squeezenetfbin": {"width": 0.25},
    "react18": {"width": 0.25, "input_size": 64},
}


@pytest.mark.parametrize(("name", "options"), CASES.items(), ids=[f"{name}{len(name)}" for name in CASES])
def test_the_fused_network_gives_the_same_bits(name: str, options: dict[str, object]) -> None:
    packed = pack(trained_like(name.strip(), **options))
    spec = packed.spec
    shape = (3, spec.in_channels, spec.input_size, spec.input_size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        assert torch.equal(packed(x), packed.net(x))


def test_signs_stay_bits_where_only_the_next_convolution_reads_them() -> None:
    packed = pack(trained_like("bincifarfbin", width=0.5))
    fused = fuse(packed.net)
    emitting = [path for path, m in fused.named_modules() if isinstance(m, PackedConv2d) and m.threshold is not None]
    packing = [path for path, m in fused.named_modules() if isinstance(m, PackReached)]
    # conv1 takes real inputs, and a max-pool reads what conv2, conv4 and conv6 give.
    assert emitting == ["conv3", "conv5"]
    assert packing == ["bn2", "bn3", "bn5", "bn7"]
    assert not any(isinstance(m, PackReached) for m in packed.net.modules())


def test_the_running_form_shares_the_tensors() -> None:
    packed = pack(trained_like("bincifarfbin", width=0.5))
    addresses = {tensor.data_ptr() for tensor in packed.net.state_dict().values()}
    assert {tensor.data_ptr() for tensor in packed.running().state_dict().values()} <= addresses | {
        module.threshold.data_ptr()
        for module in packed.running().modules()
        if isinstance(module, PackedConv2d) and module.threshold is not None
    }


def test_a_model_packed_in_inference_mode_is_made_of_ordinary_tensors() -> None:
    """Kernels keep rearranged weights for those alone."""
    net = trained_like("bincifarfbin", width=0.5)
    with torch.inference_mode():
        packed = pack(net)
        packed(torch.zeros(1, 3, 32, 32))
    assert not any(tensor.is_inference() for tensor in packed.running().state_dict().values())
