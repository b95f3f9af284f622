from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from dabnn.errors import InvalidInputError
from dabnn.layers import BinaryConv2d
from dabnn.models import Network, build
from dabnn.plans import numbered_convs
from dabnn.quantizers import binarize
from dabnn.transfer import check_same, check_teacher, transfer


def net(seed: int, **options: Any) -> Network:
    sizes = {"num_classes": 3, "in_channels": 1, "input_size": 16, "width": 0.0625}
    return build("bincifarfbin", **sizes | options, seed=seed)


FLOAT = {"inputs": "none", "layers": []}


def take_over(source: Network, target: Network) -> None:
    transfer({"net": source.state_dict(), "model": asdict(source.spec)}, target, "x")


@pytest.mark.parametrize("weights", ["dab", "dab_warm", "dab_learned", "xnor", "sign"])
def test_a_binary_network_takes_over_every_tensor_of_the_float_one(weights: str) -> None:
    source, target = net(1, **FLOAT), net(2, weights=weights, options={"input_quantizer": "rsign"})
    take_over(source, target)
    own = target.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in source.state_dict().items())


def test_learned_values_start_at_the_optimum_of_the_weights_taken_over() -> None:
    source, target = net(1, **FLOAT), net(2, weights="dab_learned")
    take_over(source, target)
    code = binarize(source.get_parameter("conv3.weight"), "dab", center="tap")
    torch.testing.assert_close(target.get_parameter("conv3.alpha").detach(), code.alpha)
    torch.testing.assert_close(target.get_parameter("conv3.beta").detach(), code.beta)


def test_learned_values_are_kept_between_networks_that_both_learn_them() -> None:
    source, target = net(1, weights="dab_learned"), net(2, weights="dab_learned")
    with torch.no_grad():
        source.get_parameter("conv3.alpha").fill_(7.0)
    take_over(source, target)
    assert (target.get_parameter("conv3.alpha") == 7).all()


@pytest.mark.parametrize("change", [{"inputs": "none"}, {"center": "filter"}, {"inputs": [3], "center": None}])
@pytest.mark.parametrize("weights", ["dab_learned", "dab_warm"])
def test_values_of_weights_that_were_centred_otherwise_start_again(weights: str, change: dict[str, Any]) -> None:
    source, target = net(1, weights=weights, **change), net(2, weights=weights)
    stale = [name for name in source.state_dict() if name.endswith((".alpha", ".threshold"))]
    with torch.no_grad():
        for name in stale:
            source.state_dict()[name].fill_(7.0)
    take_over(source, target)
    centers = {path: conv.center for path, conv in numbered_convs(source).values() if isinstance(conv, BinaryConv2d)}
    for name in stale:
        path = name.rpartition(".")[0]
        code = binarize(source.get_parameter(f"{path}.weight"), "dab", center="tap")
        start = code.alpha if weights == "dab_learned" else (code.alpha + code.beta) / 2
        expected = torch.full_like(start, 7.0) if centers[path] == "tap" else start
        torch.testing.assert_close(target.state_dict()[name], expected)


def test_a_float_network_leaves_the_quantizers_tensors_behind() -> None:
    target = net(2, **FLOAT)
    take_over(net(1, weights="dab_learned"), target)
    assert "conv3.alpha" not in target.state_dict()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"width": 0.125}, r"x: holds another architecture: conv1\.weight is \(16, 1, 3, 3\) there and \(8, 1, 3, 3\)"),
        ({"num_classes": 4}, r"conv8\.weight is \(4, .*there and \(3, "),
        ({"activation": "rprelu"}, r"it has \S+, which bincifarfbin does not know"),
    ],
)
def test_another_architecture_is_refused_by_its_first_tensor(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(InvalidInputError, match=expected):
        take_over(net(1, **change), net(2))


def test_a_tensor_that_is_missing_is_named_and_nothing_is_changed() -> None:
    source, target = net(1), net(2)
    weights = source.state_dict()
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    del weights["bn4.running_var"]
    with pytest.raises(InvalidInputError, match=r"it lacks bn4\.running_var, which bincifarfbin needs"):
        transfer({"net": weights, "model": asdict(source.spec)}, target, "x")
    assert all(torch.equal(before[name], tensor) for name, tensor in target.state_dict().items())


def test_continuing_with_another_network_is_refused_by_its_first_difference() -> None:
    spec = net(1).spec
    saved = asdict(spec)
    check_same(saved, spec, "step-1.pt")
    with pytest.raises(InvalidInputError, match=r"^step-1\.pt: was saved with weights=dab, the run now has xnor"):
        check_same(saved, replace(spec, weights="xnor"), "step-1.pt")


@pytest.mark.parametrize(("key", "value"), [("num_classes", 4), ("in_channels", 3), ("input_size", 32)])
def test_a_teacher_of_other_classes_or_images_is_refused(key: str, value: int) -> None:
    student = net(1).spec
    check_teacher(replace(student, name="other", width=2.0), student, "t.pt")
    with pytest.raises(InvalidInputError, match=rf"^train\.distill\.teacher: t\.pt has {key}={value}"):
        check_teacher(replace(student, **{key: value}), student, "t.pt")
