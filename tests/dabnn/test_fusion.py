"""The running form of packed networks: the same bits, with fewer passes over the data."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dabnn.activations import RPReLU
from dabnn.fusion import PackReached, fuse
from dabnn.models import ModelSpec, Network, build
from dabnn.models.blocks import Chain
from dabnn.packed import pack
from dabnn.packed_conv import PackedConv2d
from kernels import pack_signs


def trained_like(name: str, **options: object) -> Network:
    """A network whose BN and RPReLU have values of every kind, as after training."""
    net = build(name, num_classes=7, seed=3, **options)
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                if tensor is not None:
                    tensor.data = torch.randn(tensor.shape, generator=generator)
        elif isinstance(module, RPReLU):
            for tensor in (module.shift_in, module.shift_out):
                tensor.data = torch.randn(tensor.shape, generator=generator)
            module.slope.data = torch.rand(module.slope.shape, generator=generator)
    return net.eval()


def images(spec: ModelSpec, num: int = 3) -> torch.Tensor:
    shape = (num, spec.in_channels, spec.input_size, spec.input_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)


CASES: dict[str, tuple[str, dict[str, object]]] = {
    "bincifarfbin": ("bincifarfbin", {"width": 0.5}),
    "bireal": ("bincifarfbin", {"width": 0.5, "block": "bireal"}),
    "some inputs": ("bincifarfbin", {"width": 0.5, "inputs": [3, 5, 6]}),
    "rprelu": ("bincifarfbin", {"width": 0.5, "activation": "rprelu"}),
    "two-valued inputs": ("bincifarfbin", {"width": 0.25, "options": {"input_quantizer": "two_valued"}}),
    "resnetfbin18": ("resnetfbin18", {"width": 0.25, "input_size": 80}),
    "resnet in bireal order": ("resnetfbin18", {"width": 0.25, "input_size": 64, "block": "bireal"}),
    "sketchanetfbin": ("sketchanetfbin", {"width": 0.25, "input_size": 100}),
    "sketchanethybrid": ("sketchanethybrid", {"width": 0.25, "input_size": 100}),
    "alexnetfbin": ("alexnetfbin", {"width": 0.125, "input_size": 70}),
    "googlenetfbin": ("googlenetfbin", {"width": 0.25, "input_size": 64}),
    "squeezenetfbin": ("squeezenetfbin", {"width": 0.25, "input_size": 64}),
    "squeezenethybridv3": ("squeezenethybridv3", {"width": 0.25, "input_size": 64}),
    "pooling beyond the edge": ("squeezenetfbin", {"width": 0.25, "input_size": 21}),
    "nin": ("nin", {"width": 0.25}),
    "vgg_small": ("vgg_small", {"width": 0.25}),
    "react18": ("react18", {"width": 0.25, "input_size": 64}),
}


@pytest.mark.parametrize(("name", "options"), CASES.values(), ids=CASES.keys())
def test_the_fused_network_gives_the_same_bits(name: str, options: dict[str, object]) -> None:
    packed = pack(trained_like(name, **options))
    x = images(packed.spec)
    with torch.inference_mode():
        assert torch.equal(packed(x), packed.net(x))


def kinds(chain: Chain) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in chain.named_children()}


def test_signs_stay_bits_from_the_first_convolution_to_the_last() -> None:
    fused = fuse(pack(trained_like("sketchanetfbin", width=0.25, input_size=100)).net)
    assert kinds(fused) == {
        "conv1": "Conv2d",
        "bn2": "PackReached",
        "pool1": "PoolBits",
        "conv2": "PackedConv2d",
        "pool2": "PoolBits",
        "conv3": "PackedConv2d",
        "conv4": "PackedConv2d",
        "conv5": "PackedConv2d",
        "pool5": "PoolBits",
        "conv6": "PackedConv2d",
        "conv7": "PackedConv2d",
        "relu7": "ReLU",
        "conv8": "Conv2d",
        "flatten": "Flatten",
    }
    emitting = [path for path, m in fused.named_modules() if isinstance(m, PackedConv2d) and m.threshold is not None]
    assert emitting == ["conv2", "conv3", "conv4", "conv5", "conv6"]


def test_what_a_shortcut_or_a_real_layer_reads_stays_a_number() -> None:
    packed = pack(trained_like("resnetfbin18", width=0.25, input_size=80))
    fused = fuse(packed.net)
    block = fused.get_submodule("stage1.0")
    assert isinstance(block, Chain)
    assert kinds(block) == {
        "bn1": "PackReached",
        "conv1": "PackedConv2d",
        "conv2": "PackedConv2d",
        "add2": "Shortcut",
        "relu2": "ReLU",
    }
    assert [name for name in kinds(fused) if name.endswith("1")] == ["conv1", "pool1", "bn1", "relu1", "stage1"]
    assert not any(isinstance(m, PackReached) for m in packed.net.modules())


def test_pooling_before_a_chain_that_begins_with_a_sign_is_of_bits() -> None:
    fused = fuse(pack(trained_like("squeezenetfbin", width=0.25, input_size=64)).net)
    assert not any(isinstance(module, nn.MaxPool2d) for module in fused.modules())
    assert list(kinds(fused))[:4] == ["conv1", "fire1_bn", "pool1", "fire1"]
    first = fused.get_submodule("fire1.squeeze")
    assert isinstance(first, Chain)
    assert list(kinds(first)) == ["conv", "relu"]


@pytest.mark.parametrize("bias", [True, False])
def test_pooling_goes_before_a_norm_whatever_the_signs_of_its_channels(bias: bool) -> None:
    net = trained_like("resnetfbin18", width=0.25, input_size=80)
    packed = pack(net)
    conv, norm = (packed.net.get_submodule(name) for name in ("conv1", "bn1"))
    assert isinstance(norm, nn.BatchNorm2d)
    assert (norm.weight < 0).any()
    if bias:
        conv.register_parameter("bias", nn.Parameter(torch.linspace(-1, 1, 16), requires_grad=False))
    before = conv.weight.clone()
    fused = fuse(packed.net)
    x = images(net.spec)
    with torch.inference_mode():
        assert torch.equal(fused(x), packed.net(x))
    assert torch.equal(conv.weight, before)


def test_an_rprelu_that_is_not_monotone_is_run() -> None:
    net = trained_like("vgg_small", width=0.25, activation="rprelu")
    with torch.no_grad():
        net.get_parameter("rprelu3.slope")[1] = -0.1
    packed = pack(net)
    fused = fuse(packed.net)
    assert [name for name in kinds(fused) if name.startswith("rprelu")] == ["rprelu3", "rprelu6"]
    with torch.inference_mode():
        assert torch.equal(fused(images(net.spec)), packed.net(images(net.spec)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_signs_of_rounded_values_are_those_of_the_values(dtype: torch.dtype) -> None:
    packed = pack(trained_like("vgg_small", width=0.25)).to("cpu", dtype)
    x, fused = images(packed.spec).to(dtype), fuse(packed.net)
    with torch.inference_mode():
        rounded = packed.net.get_submodule("conv1")(x)
        after = [packed.net.get_submodule(name) for name in ("bn1", "relu1", "bn2")]
        expected = pack_signs(nn.Sequential(*after)(rounded))
        assert torch.equal(fused.get_submodule("bn2")(rounded), expected)


@given(st.integers(0, 2**31), st.sampled_from([torch.bfloat16, torch.float16]))
@settings(max_examples=30, deadline=None)
def test_a_threshold_rounds_up_to_a_16_bit_type(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    threshold = torch.randn(64, generator=generator) * 10 ** torch.randint(-8, 5, (64,), generator=generator)
    threshold[:3] = torch.tensor([torch.inf, -torch.inf, 0.0])
    x = torch.cat([threshold, torch.randn(64, generator=generator)]).to(dtype)
    x = torch.cat([x, -x, torch.nextafter(x.float(), torch.tensor(torch.inf)).to(dtype)])
    images = x.view(-1, 1, 1, 1).expand(-1, 64, 1, 1)
    expected = pack_signs(torch.where(images >= threshold.view(-1, 1, 1), 1.0, -1.0))
    assert torch.equal(PackReached(threshold, torch.zeros(64, dtype=torch.bool), dtype)(images), expected)


def test_the_running_form_shares_the_weights() -> None:
    packed = pack(trained_like("bincifarfbin", width=0.5))
    own = {tensor.data_ptr() for tensor in packed.net.state_dict().values()}
    running = packed.running().state_dict()
    shared = {name: tensor for name, tensor in running.items() if name.endswith(("weight", "weight_bits", "alpha"))}
    assert len(shared) == 14
    assert {tensor.data_ptr() for tensor in shared.values()} <= own


def test_a_model_packed_in_inference_mode_is_made_of_ordinary_tensors() -> None:
    """Kernels keep rearranged weights for those alone."""
    net = trained_like("bincifarfbin", width=0.5)
    with torch.inference_mode():
        packed = pack(net)
        packed(torch.zeros(1, 3, 32, 32))
    assert not any(tensor.is_inference() for tensor in packed.running().state_dict().values())
