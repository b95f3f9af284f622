from types import SimpleNamespace

import pytest
import torch

from dabnn.errors import InvalidInputError
from dabnn.models import build
from dabnn.packed import load_packed, pack
from dabnn.verify import verify


def network(name="bincifarfbin", **options):
    net = build(name, num_classes=7, width=0.125, in_channels=3, input_size=16, seed=3, **options)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for _ in range(3):
            net(torch.randn(8, 3, 16, 16))
    return net.eval()


def batches(net, num=2):
    """Images that the network classifies as labelled, so that its top-1 is 100 %."""
    for seed in range(num):
        images = torch.randn(10, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            yield SimpleNamespace(images=images, labels=net(images).argmax(1))


@pytest.mark.parametrize(
    "net",
    [network(), network("bincifar", bin_start=2, bin_end=7), network(inputs=[3, 5]), network(weights="xnor")],
    ids=["both binary", "weights binary", "mixed", "xnor"],
)
def test_a_faithful_packed_model_has_no_problems(net):
    verification = verify(net, pack(net, weights="dense"), list(batches(net)))
    assert verification.problems == ()
    assert verification.layers_equal
    assert verification.num_samples == 20
    assert verification.same_argmax == 1.0
    assert verification.top1_float_path == verification.top1_packed == 100.0
    assert (verification.flipped_signs, verification.max_abs_logit_diff, verification.max_layer_diff) == (0, 0.0, 0.0)


@pytest.mark.parametrize("name", ["bincifarfbin", "bincifar"])
def test_rounding_to_float16_stays_within_the_derived_bound(name, tmp_path):
    net = network(name, bin_start=2, bin_end=7)
    pack(net).save(tmp_path / "half.dab", half=True)
    verification = verify(net, load_packed(tmp_path / "half.dab"), list(batches(net)))
    assert verification.layers_equal
    assert verification.max_layer_diff > 0


@pytest.mark.parametrize("name", ["bincifarfbin", "bincifar"])
def test_a_wrong_scalar_is_named_with_its_layer(name):
    net = network(name, bin_start=2, bin_end=7)
    packed = pack(net)
    layer = packed.net.conv4
    with torch.no_grad():
        layer.alpha.mul_(1.01)
    verification = verify(net, packed, list(batches(net)))
    assert not verification.layers_equal
    assert verification.problems[0].startswith("conv4: the packed layer differs by")
    assert not any(problem.startswith("conv5") for problem in verification.problems)


def test_weights_that_moved_after_packing_are_found():
    net = network()
    packed = pack(net)
    with torch.no_grad():
        net.conv3.weight.neg_()
    verification = verify(net, packed, list(batches(net)))
    assert not verification.layers_equal
    assert verification.flipped_signs > 0
    assert verification.problems[0].startswith("conv3:")


def test_another_head_changes_classes_and_accuracy_but_no_layer():
    net = network()
    packed = pack(net)
    with torch.no_grad():
        packed.net.conv8.weight.neg_()
        packed.net.conv8.bias.neg_()
    verification = verify(net, packed, list(batches(net)))
    assert verification.layers_equal
    assert verification.flipped_signs == 0
    assert [problem.split(":")[0] for problem in verification.problems] == ["same_argmax", "top1_packed"]


def test_logits_that_are_not_finite_are_a_problem():
    net = network()
    packed = pack(net)
    with torch.no_grad():
        packed.net.conv8.bias[0] = float("nan")
    problems = verify(net, packed, list(batches(net))).problems
    assert any(problem.startswith("max_abs_logit_diff: a logit is NaN") for problem in problems)


def test_the_network_is_given_back_in_its_mode_and_without_hooks():
    net = network()
    packed = pack(net)
    data = list(batches(net))
    verify(net.train(), packed, data)
    assert net.training
    modules = [*net.modules(), *packed.net.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def test_without_images_nothing_is_verified():
    net = network()
    with pytest.raises(InvalidInputError, match=r"data\.val: not one image"):
        verify(net, pack(net), [])


def test_networks_of_two_architectures_are_not_compared():
    with pytest.raises(InvalidInputError, match="packed: a ModelSpec"):
        verify(network(), pack(network(bin_start=3)), [])
