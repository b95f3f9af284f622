"""What a watch asks of the training loop between two steps, and what too little memory is told as."""

import pickle
from pathlib import Path

import pytest
import torch
from training import small_spec

from dabnn.checkpoints import list_checkpoints
from dabnn.distributed import World
from dabnn.memory import MemoryLimitError, advice, batch_size_to_try, memory_error
from dabnn.observer import LeavingError, Wish
from dabnn.run_folder import RunFolder
from dabnn.spec import CheckpointPolicy
from dabnn.train import train

STEPS = 15  # of an epoch


class AsksAt:
    """Asks for something once a step was taken, as a notice of preemption does."""

    def __init__(self, step: int, wish: Wish) -> None:
        self.step, self.asked, self.seen, self.signs = step, wish, 0, 0

    def wish(self) -> Wish:
        if self.seen < self.step:
            return Wish.GO_ON
        wish, self.asked = self.asked, Wish.LEAVE if self.asked is Wish.LEAVE else Wish.GO_ON
        return wish

    def alive(self, step: int) -> None:
        self.seen, self.signs = step, self.signs + 1


@pytest.mark.parametrize("step", [4, STEPS])
def test_a_process_that_must_leave_saves_its_step_and_the_next_attempt_ends_as_if_nothing_was(
    step: int, digits: Path, tmp_path: Path
) -> None:
    spec = small_spec(digits, checkpoint=CheckpointPolicy(every_steps=None))
    whole = train(spec, RunFolder(tmp_path / "whole"), world=World.current())
    folder = RunFolder(tmp_path / "left")
    with pytest.raises(LeavingError, match="the process of a rank must end"):
        train(spec, folder, world=World.current(), watch=AsksAt(step, Wish.LEAVE))
    assert folder.result() == {}
    assert [checkpoint.step for checkpoint in list_checkpoints(folder.checkpoints)] == [step]
    resumed = train(spec, folder, world=World.current())
    assert [attempt["start_step"] for attempt in folder.attempts()] == [0, step]
    assert (resumed.message, resumed.status, resumed.weights_sha256) == ("", "finished", whole.weights_sha256)
    assert resumed.metrics["train_loss"] == whole.metrics["train_loss"]


def test_a_checkpoint_that_is_asked_for_is_taken_once_and_training_goes_on(digits: Path, tmp_path: Path) -> None:
    spec = small_spec(digits, checkpoint=CheckpointPolicy(every_steps=None, keep_last=9))
    watch = AsksAt(7, Wish.SAVE)
    result = train(spec, RunFolder(tmp_path), world=World.current(), watch=watch)
    steps = [checkpoint.step for checkpoint in list_checkpoints(tmp_path / "checkpoints")]
    assert (result.status, steps) == ("finished", [7, STEPS, 2 * STEPS])
    assert watch.signs > 2 * STEPS  # evaluation is a sign of life, too


def test_too_little_memory_names_the_batch_size_to_try() -> None:
    error = memory_error(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), 96, 2, rank=1)
    assert isinstance(error, MemoryLimitError)
    assert str(error) == (
        "data.batch_size: rank 1 ran out of GPU memory with 48 samples a step (CUDA out of memory. Tried to allocate 2 "
        "GiB.). Try data.batch_size=48 (now 96 over 2 workers), or more workers on more machines."
    )
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.is_gpu) == (str(error), True)
    with pytest.raises(RuntimeError, match="allocate") as raised:
        torch.empty(1 << 60)
    assert memory_error(raised.value, 96, 2, rank=0) is not None
    assert memory_error(RuntimeError("shapes differ"), 96, 2, rank=0) is None


def test_the_batch_size_to_try_divides_over_the_workers() -> None:
    assert [batch_size_to_try(size, workers) for size, workers in ((96, 2), (90, 4), (8, 4), (12, 3))] == [
        48,
        44,
        None,
        6,
    ]
    assert advice(4, 2).startswith("Use more workers")
