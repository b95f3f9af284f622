"""Packed models whose network is changed after the first call, and calls in other modes of torch."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from exported_nets import images, network
from torch import nn

from dabnn.models import Network
from dabnn.packed import PackedModel, pack


@pytest.fixture(scope="module")
def nets() -> tuple[Network, Network]:
    """Two networks of one architecture."""
    return network(name="bincifarfbin"), network(name="bincifarfbin", seed=8)


def others_state(packed: PackedModel, other: PackedModel) -> None:
    packed.net.load_state_dict(other.net.state_dict())


def others_tensors(packed: PackedModel, other: PackedModel) -> None:
    packed.net.load_state_dict(copy.deepcopy(other.net.state_dict()), assign=True)


def others_tensors_of_inference(packed: PackedModel, other: PackedModel) -> None:
    with torch.inference_mode():
        packed.net.load_state_dict({name: t.clone() for name, t in other.net.state_dict().items()}, assign=True)


def others_values(packed: PackedModel, other: PackedModel) -> None:
    with torch.no_grad():
        for name, tensor in other.net.state_dict().items():
            packed.net.state_dict()[name].copy_(tensor)


def others_modules(packed: PackedModel, other: PackedModel) -> None:
    for name, module in list(other.net.named_children()):
        setattr(packed.net, name, copy.deepcopy(module))


@pytest.mark.parametrize(
    "change", [others_state, others_tensors, others_tensors_of_inference, others_values, others_modules]
)
def test_what_is_put_into_the_network_after_a_call_counts(
    change: Callable[[PackedModel, PackedModel], None], nets: tuple[Network, Network]
) -> None:
    packed, other = map(pack, nets)
    x = images(2, packed.spec)
    before = packed(x)
    change(packed, other)
    assert torch.equal(packed(x), other(x))
    assert torch.equal(packed(x), other(x))  # once more, from what is kept by now
    assert not torch.equal(packed(x), before)


def test_new_values_of_a_parameter_count(nets: tuple[Network, Network]) -> None:
    packed, other = map(pack, nets)
    x = images(2, packed.spec)
    packed(x)
    for own, theirs in zip(packed.net.parameters(), other.net.parameters(), strict=True):
        own.data = theirs.data.clone()  # as Module.to does
    for name, buffer in other.net.named_buffers():
        packed.net.get_buffer(name).copy_(buffer)
    assert torch.equal(packed(x), other(x))


def test_the_running_form_of_an_unchanged_network_is_kept(nets: tuple[Network, Network]) -> None:
    packed = pack(nets[0])
    running = packed.running()
    packed(images(2, packed.spec))
    assert packed.running() is running


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda packed: pickle.loads(pickle.dumps(packed))])
def test_a_copy_of_a_model_that_ran_runs(
    copied: Callable[[PackedModel], PackedModel], nets: tuple[Network, Network]
) -> None:
    packed = pack(nets[0])
    x = images(2, packed.spec)
    expected = packed(x)
    twin = copied(packed)
    assert torch.equal(twin(x), expected)
    nn.init.zeros_(next(twin.net.parameters()))
    assert not torch.equal(twin(x), expected)
    assert torch.equal(packed(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_into_a_packed_model(dtype: torch.dtype, nets: tuple[Network, Network]) -> None:
    packed = pack(nets[0])
    x = images(2, packed.spec)
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(packed(x), packed(x.contiguous()))
        inside = packed(x)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, packed(x))


def test_a_model_moved_in_inference_mode_is_made_of_ordinary_tensors(nets: tuple[Network, Network]) -> None:
    packed = pack(nets[0])
    with torch.inference_mode():
        moved = packed.to("cpu", torch.bfloat16)
    assert not any(tensor.is_inference() for tensor in moved.net.state_dict().values())
