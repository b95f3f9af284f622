"""Binary layers train on a CUDA device as on the processor; needs torch, triton and pytest."""

import pytest
import torch

from dabnn.layers import BinaryConv2d, LayerOptions

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

OPTIONS = [
    {},
    {"gradient": "means", "ste_center": "threshold"},
    {"ste": "identity", "gradient": "means"},
    {"ste": "polynomial"},
    {"gradient": "reference"},
]


def layer_of(quantizer, options):
    torch.manual_seed(0)
    layer = BinaryConv2d(
        32, 16, 3, padding=1, weight_quantizer=quantizer, binary_input=True, options=LayerOptions(**options)
    )
    return layer.double()


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options.values()) or "default")
@pytest.mark.parametrize("quantizer", ["dab", "dab_warm"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_device_trains_a_layer_like_the_processor(memory_format, quantizer, options):
    x = torch.randn(2, 32, 9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    results = []
    for device in ("cpu", "cuda"):
        layer = layer_of(quantizer, options).to(device, memory_format=memory_format)
        y = layer(x.to(device, memory_format=memory_format))
        y.square().sum().backward()
        results.append((y.cpu(), layer.weight.grad.cpu()))
    for on_cpu, on_device in zip(*results, strict=True):
        torch.testing.assert_close(on_device, on_cpu, rtol=1e-9, atol=1e-9)


def test_a_compiled_layer_trains_like_the_layer():
    layer = layer_of("dab", {}).float().cuda()
    x = torch.randn(2, 32, 9, 9, device="cuda")
    gradients = []
    for forward in (layer, torch.compile(layer, fullgraph=True)):
        layer.zero_grad()
        forward(x).square().sum().backward()
        gradients.append(layer.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
