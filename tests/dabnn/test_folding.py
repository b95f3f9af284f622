"""Folded batch normalisation against torch's own, bit for bit."""

import pytest
import torch
from torch import nn

from dabnn import packed_file
from dabnn.models import build
from dabnn.models.folding import SignThreshold, find_threshold, fold, sign_norms, unfold
from dabnn.packed import load_packed, pack


def norm_of(channels=64, *, affine=True, eps=1e-5):
    generator = torch.Generator().manual_seed(2)
    norm = nn.BatchNorm2d(channels, eps, affine=affine).eval()
    norm.running_mean.normal_(0, 3, generator=generator)
    norm.running_var.uniform_(0.01, 4, generator=generator)
    if affine:
        nn.init.normal_(norm.weight, generator=generator)
        nn.init.normal_(norm.bias, generator=generator)
    return norm


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("size", [1, 5, 16])
def test_a_folded_norm_gives_the_same_bits(affine, size):
    norm = norm_of(affine=affine, eps=1e-4)
    x = torch.randn(3, 64, size, size, generator=torch.Generator().manual_seed(0)) * 5
    with torch.no_grad():
        assert torch.equal(unfold(*fold(norm)).eval()(x), norm(x))


def test_an_unfolded_norm_has_an_eps_that_every_torch_takes_and_that_changes_no_bit():
    scale, shift = torch.randn(64), torch.randn(64)
    norm, x = unfold(scale, shift).eval(), torch.randn(5, 64, 4, 4)
    assert norm.eps > 0  # torch 2.11 refuses 0, in evaluation too
    expected = torch.batch_norm(x, scale, shift, torch.zeros(64), torch.ones(64), False, 0.1, 0.0, False)
    with torch.no_grad():
        assert torch.equal(norm(x), expected)


def test_a_threshold_is_the_least_number_that_reaches_the_sign():
    norm = norm_of()
    threshold, falls = find_threshold(norm)
    assert torch.equal(falls, norm.weight < 0)
    stage = SignThreshold(threshold, falls)
    up, down = (torch.nextafter(threshold, torch.tensor(limit)) for limit in (torch.inf, -torch.inf))
    for x in (threshold, up, down, threshold + 1, threshold - 1):
        maps = x.view(1, -1, 1, 1).expand(2, -1, 4, 4).contiguous()
        with torch.no_grad():
            expected = torch.where(norm(maps) >= 0, 1.0, -1.0)
        assert torch.equal(stage(maps), expected)


@pytest.mark.parametrize(("bias", "threshold"), [(0.5, -torch.inf), (-0.5, torch.inf), (0.0, -torch.inf)])
def test_a_norm_without_scale_has_one_sign(bias, threshold):
    norm = norm_of(3)
    with torch.no_grad():
        norm.weight.zero_()
        norm.bias.fill_(bias)
    found, falls = find_threshold(norm)
    assert found.tolist() == [threshold] * 3
    assert not falls.any()


def test_only_norms_right_before_a_sign_become_thresholds():
    assert sign_norms(build("bincifarfbin", num_classes=5, width=0.125)) == {f"bn{index}" for index in range(2, 8)}
    assert sign_norms(build("bincifarfbin", num_classes=5, width=0.125, inputs=[3])) == {"bn3"}
    assert sign_norms(build("vgg_small", num_classes=5, width=0.125, options={"input_quantizer": "rsign"})) == set()
    assert sign_norms(build("bireal18", num_classes=5, width=0.125)) == set()
    stage = "stage2.0"
    found = sign_norms(build("resnetfbin18", num_classes=5, width=0.125, input_size=32))
    assert {path for path in found if path.startswith(stage)} == {
        f"{stage}.{n}" for n in ("bn1", "bn2", "downsample.bn")
    }


def test_a_file_of_version_one_loads_and_agrees(tmp_path, monkeypatch):
    net = build("resnetfbin18", num_classes=5, width=0.125, input_size=16, seed=1)
    x = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    net(x)
    packed = pack(net.eval())
    kept = {
        name: tensor for name, tensor in packed.tensors.items() if name in net.state_dict() or "weight_bits" in name
    }
    kept |= {name: tensor for name, tensor in packed.tensors.items() if name.endswith((".alpha", ".beta"))}
    norms = {
        name: tensor
        for name, tensor in net.state_dict().items()
        if name.rpartition(".")[0].rpartition(".")[2].startswith("bn") and tensor.is_floating_point()
    }
    old = (
        "name",
        "num_classes",
        "in_channels",
        "input_size",
        "width",
        "bin_start",
        "bin_end",
        "weights",
        "center",
        "inputs",
    )
    spec = {key: getattr(net.spec, key) for key in old} | {"plan": None}
    monkeypatch.setattr(packed_file, "VERSION", 1)
    packed_file.write(
        tmp_path / "old.dab", packed_file.Content(spec, {"classes": None, "normalization": None}, kept | norms)
    )
    monkeypatch.undo()
    loaded = load_packed(tmp_path / "old.dab")
    with torch.no_grad():
        assert torch.equal(loaded(x), net(x))
    assert loaded.tensors.keys() == packed.tensors.keys()
