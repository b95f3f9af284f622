"""The measurement of a packed model: what it refuses, what it counts. How fast anything is, no test asserts."""

from dataclasses import replace

import pytest
import torch

from dabnn.bench import bench
from dabnn.bench_check import refuse_if_wrong
from dabnn.bench_layers import layer_paths, time_layers
from dabnn.bench_networks import float_peer, random_images, random_network
from dabnn.bench_place import Place
from dabnn.errors import DabError, InvalidInputError
from dabnn.fusion import PackReached, PoolBits
from dabnn.layers import BinaryConv2d
from dabnn.packed import PackedModel, pack
from dabnn.packed_conv import PackedConv2d
from dabnn.turns import choose_turns, in_turns

CPU = torch.device("cpu")
PLACE = Place(batch=1, threads=1, device="cpu", dtype="float32")


def packed_model(name: str = "bincifarfbin", **options: object) -> PackedModel:
    return pack(random_network(name, **{"num_classes": 10, "width": 0.125} | options))


def images_for(packed: PackedModel, batch: int = 1) -> torch.Tensor:
    return random_images(packed.spec, batch, "cpu", packed.dtype)


class OneTooMuch(PackedConv2d):
    """A packed convolution with a defect."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y ^ 1 if y.dtype == torch.int32 else y + 1


def test_forms_take_turns_after_two_rounds_that_do_not_count():
    calls = []
    times, count = in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, CPU, turns=3)
    assert "".join(calls) == "ab" * 5
    assert count == 3
    assert all(0 <= each.best_s <= each.median_s for each in times.values())


def test_repeats_are_one_measurement():
    calls = []
    in_turns({"a": lambda: calls.append("a")}, CPU, turns=1, repeats=4)
    assert len(calls) == 12


@pytest.mark.parametrize(("round_s", "expected"), [(10.0, 5), (0.5, 20), (1e-6, 100), (0.0, 100)])
def test_turns_fill_the_time_that_there_is_within_limits(round_s, expected):
    assert choose_turns(round_s, 10.0) == expected


def test_the_float_peer_has_the_two_valued_filters_and_takes_no_signs():
    packed = packed_model()
    peer = float_peer(packed, "cpu", torch.float32)
    assert not any(isinstance(module, BinaryConv2d) for module in peer.modules())
    for path, module in packed.net.named_modules():
        if isinstance(module, PackedConv2d):
            values = torch.stack([module.alpha, module.beta], dim=1).sort(dim=1).values
            weight = peer.get_parameter(f"{path}.weight").flatten(1)
            assert torch.equal(torch.stack([weight.amin(1), weight.amax(1)], dim=1), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["bincifarfbin", "react18"])
def test_a_packed_form_that_computes_what_its_bits_say_may_be_timed(name, dtype):
    packed = packed_model(name, input_size=32).to("cpu", dtype)
    found = refuse_if_wrong(packed, images_for(packed))
    assert found.num_layers == sum(isinstance(module, PackedConv2d) for module in packed.running().modules())


@pytest.mark.parametrize("emits", [True, False])
def test_a_convolution_that_is_wrong_is_not_timed(emits):
    packed = packed_model()
    running = packed.running()
    modules = running.named_modules()
    path, layer = next((p, m) for p, m in modules if isinstance(m, PackedConv2d) and (m.threshold is not None) == emits)
    layer.__class__ = OneTooMuch
    with pytest.raises(DabError, match=rf"bench: .*not timed: {path}: "):
        refuse_if_wrong(packed, images_for(packed))


@pytest.mark.parametrize(("kind", "name"), [(PackReached, "falls"), (PoolBits, "is_and_bits")])
def test_signs_that_are_wrong_are_not_timed(kind, name):
    packed = packed_model()
    layer = next(module for module in packed.running().modules() if isinstance(module, kind))
    setattr(layer, name, ~getattr(layer, name))
    with pytest.raises(DabError, match=r"first at conv[23], so it is not timed"):
        refuse_if_wrong(packed, images_for(packed))


def test_every_layer_of_the_network_is_timed_once_and_named_by_its_kind():
    packed = packed_model()
    peer = float_peer(packed, "cpu", torch.float32)
    rows = {row.path: row for row in time_layers(packed.running(), peer, images_for(packed), turns=1)}
    assert list(rows) == layer_paths(peer)
    assert {path for path, row in rows.items() if row.kind == "binary"} == {f"conv{number}" for number in range(2, 8)}
    assert rows["conv1"].kind == rows["conv8"].kind == "real"
    for row in rows.values():
        assert row.macs > 0
        assert 0 <= row.packed_float_ms <= row.packed_ms
        assert row.speedup == row.float_ms / row.packed_ms


def test_weights_alone_are_compared_too_and_a_kind_of_their_own():
    packed = packed_model("bincifar", bin_start=2, bin_end=3)
    assert refuse_if_wrong(packed, images_for(packed)).num_layers == 2
    rows = time_layers(packed.running(), float_peer(packed, "cpu", torch.float32), images_for(packed), turns=1)
    assert {row.kind for row in rows} == {"real", "binary weights"}


@pytest.mark.parametrize("field", ["batch", "threads"])
def test_less_than_one_is_refused(field):
    with pytest.raises(InvalidInputError, match=f"{field}: 0 must be at least 1"):
        bench(packed_model(), replace(PLACE, **{field: 0}))


def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(InvalidInputError, match="device: hip"):
        bench(packed_model(), replace(PLACE, device="hip"))
