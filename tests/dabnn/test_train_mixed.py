"""Training on mixed images: the loss of both labels, distillation beside it, and the same run on any machine."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from training import small_spec

from dabnn.data import Batch
from dabnn.distributed import World
from dabnn.learner import Learner
from dabnn.losses import distillation, mixed_cross_entropy
from dabnn.models import build
from dabnn.run_folder import RunFolder
from dabnn.spec import AugmentSpec, DistillSpec, LossSpec, TrainSpec
from dabnn.splits import open_split
from dabnn.train import train

CPU = torch.device("cpu")


def mixed_spec(data: Path, **changes: object) -> TrainSpec:
    spec = small_spec(data)
    augment = AugmentSpec(randaugment_ops=1, erasing=0.25, mixup=0.2, cutmix=1.0)
    return replace(spec, data=replace(spec.data, transform="crop_flip", augment=augment, **changes))


def first_batch(spec: TrainSpec) -> Batch:
    with open_split(spec, build(**spec.model, seed=0).spec, "train", World.current(CPU)) as stream:
        return next(iter(stream))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixing_and_distillation_share_the_loss(digits: Path, smoothing: float) -> None:
    spec = mixed_spec(digits)
    spec = replace(spec, loss=LossSpec(label_smoothing=smoothing, distill=DistillSpec("teacher", 3.0, 0.3)))
    teacher = build(**spec.model, seed=9)
    learner = Learner(spec, spec.parts[0], World.current(CPU), teacher)
    batch = first_batch(spec)
    assert batch.partners is not None
    net = learner.net.eval()
    logits, loss = learner.loss(net, batch.images, batch.labels, len(batch.labels), batch.partners)
    hard = mixed_cross_entropy(logits, batch.labels, smoothing, *batch.partners)
    soft = distillation(logits, teacher(batch.images), 3.0)
    torch.testing.assert_close(loss, (0.7 * hard + 0.3 * soft).mean())
    assert 0 < float(batch.partners[1].min()) < 1


def test_top1_of_training_counts_the_label_of_the_sample_itself(digits: Path) -> None:
    spec = mixed_spec(digits)
    learner = Learner(spec, spec.parts[0], World.current(CPU), None)
    learner.connect()
    batch = first_batch(spec)
    torch.manual_seed(0)  # dropout
    logits, losses, loss = learner.step(
        batch.images, batch.labels, batch.partners, epoch=0.0, step_in_epoch=0, num_samples=len(batch.labels)
    )
    assert torch.equal(losses, cross_entropy(logits, batch.labels, reduction="none"))
    assert loss != pytest.approx(float(losses.mean()), rel=1e-5)


def test_a_run_on_mixed_images_is_the_same_with_and_without_decoded_images_and_loaders(
    digits: Path, tmp_path: Path
) -> None:
    cached = {"decoded_cache_bytes": 10**9, "cache_folder": str(tmp_path / "cache" / "shards"), "num_loaders": 1}
    results = []
    for name, changes in (("plain", {}), ("cached", cached)):
        results.append(train(mixed_spec(digits, **changes), RunFolder(tmp_path / name), world=World.current(CPU)))
    assert [result.status for result in results] == ["finished", "finished"]
    assert results[0].weights_sha256 == results[1].weights_sha256
    assert results[0].metrics["val_top1"] > 15
    assert any((tmp_path / "cache" / "decoded").iterdir())
