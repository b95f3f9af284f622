from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from dabnn.errors import InvalidInputError
from dabnn.layers import BinaryConv2d
from dabnn.models import build
from dabnn.packed import load_packed, pack
from dabnn.packed_weight_conv import PackedWeightConv2d
from dabnn.verify import verify
from kernels import pack_signs


def network(name="bincifar", **options):
    options = {"bin_start": 2, "bin_end": 7, **options}
    net = build(name, num_classes=7, width=0.5, in_channels=3, input_size=16, seed=3, **options)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for _ in range(3):
            net(torch.randn(8, 3, 16, 16))
    return net.eval()


def batches(net, num=2):
    for seed in range(num):
        images = torch.randn(10, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            yield SimpleNamespace(images=images, labels=net(images).argmax(1))


def layer(*args, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BinaryConv2d(*args, weight_quantizer="dab", **options).eval()


def packed_layer(conv):
    code = conv.code()
    return PackedWeightConv2d(conv, code.mask, code.alpha, code.beta)


def resident_bytes(net):
    tensors = {id(tensor): tensor for tensor in [*net.parameters(), *net.buffers()]}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((33, 20, 3), {"padding": 1}),
        ((33, 20, 3), {"padding": 1, "bias": False}),
        ((16, 8, (3, 2)), {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)}),
        ((32, 64, 3), {"padding": 1, "groups": 2}),
        ((24, 24, 3), {"padding": 1, "groups": 24}),
        ((100, 65, 1), {}),
    ],
)
def test_the_layer_gives_the_values_of_its_network_up_to_rounding(arguments, options):
    conv = layer(*arguments, **options)
    x = torch.randn(2, arguments[0], 9, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = packed_layer(conv)(x), conv(x)
        weight, bias = conv.code().dense().abs(), None if conv.bias is None else conv.bias.abs()
        magnitude = F.conv2d(x.abs(), weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    error = (weight[0].numel() + 5) * 2.0**-24
    assert bool(((found - expected).abs() <= 4 * error / (1 - 2 * error) * magnitude).all())


@pytest.mark.parametrize("channels", [1, 31, 32, 33, 64])
def test_the_bits_are_those_of_packed_signs(channels):
    conv = layer(channels, 5, (3, 2))
    mask = conv.code().mask
    assert torch.equal(packed_layer(conv).weight_bits, pack_signs(torch.where(mask, 1.0, -1.0)))


def test_a_packed_model_holds_binary_weights_as_bits():
    net = network()
    packed, dense = pack(net), pack(net, weights="dense")
    paths = [path for path, module in packed.net.named_modules() if isinstance(module, PackedWeightConv2d)]
    assert paths == [f"conv{index}" for index in range(2, 8)]
    assert not any(isinstance(module, PackedWeightConv2d) for module in dense.net.modules())
    saved = sum(net.get_submodule(path).weight.numel() for path in paths)
    assert resident_bytes(dense.net) - resident_bytes(packed.net) > 3.7 * saved


@pytest.mark.parametrize(
    "net",
    [network(), network("bincifarfbin", inputs=[3, 5]), network(weights="xnor"), network(weights="lsbq")],
    ids=["dab", "mixed", "xnor", "lsbq"],
)
def test_a_model_with_bits_is_verified(net, tmp_path):
    pack(net).save(tmp_path / "model.dab")
    verification = verify(net, load_packed(tmp_path / "model.dab"), list(batches(net)))
    assert verification.problems == ()
    assert verification.same_argmax == 1.0
    assert verification.max_layer_diff < 1e-3


def test_both_forms_come_from_one_file_and_make_the_same_one(tmp_path):
    pack(network()).save(tmp_path / "model.dab")
    for weights in ("bits", "dense"):
        load_packed(tmp_path / "model.dab", weights=weights).save(tmp_path / weights)
    assert (
        (tmp_path / "bits").read_bytes() == (tmp_path / "dense").read_bytes() == (tmp_path / "model.dab").read_bytes()
    )


def test_a_tiny_value_beside_a_large_one_stays_within_the_bound_of_the_verification():
    net = network("bincifar", weights="dab_learned")
    with torch.no_grad():
        for conv in net.modules():
            if isinstance(conv, BinaryConv2d) and conv.alpha is not None:
                conv.alpha.fill_(1e-7)
                conv.beta.fill_(-1.0)
    assert verify(net.eval(), pack(net), list(batches(net))).layers_equal


def test_a_model_in_bfloat16_keeps_bits_and_scalars():
    packed = pack(network()).to("cpu", torch.bfloat16)
    assert packed.weights == "bits"
    assert packed.net.conv3.alpha.dtype == torch.float32
    assert packed.net.conv3(torch.randn(1, packed.net.conv3.weight_bits.shape[3] * 32, 5, 5).bfloat16()).dtype == (
        torch.bfloat16
    )
    assert pack(network(), weights="dense").to("cpu").weights == "dense"


def test_another_form_of_weights_is_refused(tmp_path):
    with pytest.raises(InvalidInputError, match=r"weights: 'words'; use one of bits, dense"):
        pack(network(), weights="words")


def test_other_padding_than_zeros_is_refused():
    conv = layer(8, 8, 3, padding=1, padding_mode="reflect")
    with pytest.raises(InvalidInputError, match=r"weights: bits are for layers padded .* weights=dense"):
        packed_layer(conv)
