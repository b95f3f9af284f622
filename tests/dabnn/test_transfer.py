from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from dabnn.errors import InvalidInputError
from dabnn.models import Network, build
from dabnn.quantizers import binarize
from dabnn.transfer import check_same, check_teacher, transfer


def net(seed: int, **options: Any) -> Network:
    sizes = {"num_classes": 3, "in_channels": 1, "input_size": 16, "width": 0.0625}
    return build("bincifarfbin", **sizes | options, seed=seed)


FLOAT = {"inputs": "none", "layers": []}


@pytest.mark.parametrize("weights", ["dab", "dab_warm", "dab_learned", "xnor", "sign"])
def test_a_binary_network_takes_over_every_tensor_of_the_float_one(weights: str) -> None:
    source, target = net(1, **FLOAT), net(2, weights=weights, options={"input_quantizer": "rsign"})
    transfer(source.state_dict(), target, "x")
    own = target.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in source.state_dict().items())


def test_learned_values_start_at_the_optimum_of_the_weights_taken_over() -> None:
    source, target = net(1, **FLOAT), net(2, weights="dab_learned")
    transfer(source.state_dict(), target, "x")
    code = binarize(source.get_parameter("conv3.weight"), "dab", center="tap")
    torch.testing.assert_close(target.get_parameter("conv3.alpha").detach(), code.alpha)
    torch.testing.assert_close(target.get_parameter("conv3.beta").detach(), code.beta)


def test_learned_values_are_kept_between_networks_that_both_learn_them() -> None:
    source, target = net(1, weights="dab_learned"), net(2, weights="dab_learned")
    with torch.no_grad():
        source.get_parameter("conv3.alpha").fill_(7.0)
    transfer(source.state_dict(), target, "x")
    assert (target.get_parameter("conv3.alpha") == 7).all()


def test_a_float_network_leaves_the_quantizers_tensors_behind() -> None:
    target = net(2, **FLOAT)
    transfer(net(1, weights="dab_learned").state_dict(), target, "x")
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
        transfer(net(1, **change).state_dict(), net(2), "x")


def test_a_tensor_that_is_missing_is_named_and_nothing_is_changed() -> None:
    weights, target = net(1).state_dict(), net(2)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    del weights["bn4.running_var"]
    with pytest.raises(InvalidInputError, match=r"it lacks bn4\.running_var, which bincifarfbin needs"):
        transfer(weights, target, "x")
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
