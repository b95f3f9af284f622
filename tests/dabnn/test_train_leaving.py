"""How the loop is interrupted: by a wish to end, by what another attempt need not meet; checkpoints on their way."""

import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from training import small_spec

from dabnn import watch as watch_module
from dabnn.checkpoints import list_checkpoints
from dabnn.data import loaders
from dabnn.distributed import World
from dabnn.errors import DabError, PassingError
from dabnn.observer import LeavingError, Wish
from dabnn.run_folder import RunFolder
from dabnn.run_store import StoreAwayError, StoreError
from dabnn.spec import CheckpointPolicy
from dabnn.together import in_rounds, wait_together
from dabnn.train import train
from dabnn.train_result import is_passing
from dabnn.watch import HangError, WorkerWatch

STEPS = 15  # of an epoch


class AsksInValidation:
    """Asks for something once the first batch of a validation was evaluated."""

    def __init__(self, wish: Wish, folder: RunFolder | None = None) -> None:
        self.asked, self.folder, self.step, self.evaluated = wish, folder, 0, 0

    def wish(self) -> Wish:
        if self.evaluated != 1:
            return Wish.GO_ON
        if self.folder is not None:
            self.folder.request_stop()
        return self.asked

    def alive(self, step: int) -> None:
        self.evaluated = self.evaluated + 1 if step == self.step else 0
        self.step = step


@pytest.mark.parametrize("is_stop", [False, True])
def test_a_wish_to_end_during_validation_saves_the_end_of_the_epoch_at_once(
    is_stop: bool, digits: Path, tmp_path: Path
) -> None:
    spec = small_spec(digits, checkpoint=CheckpointPolicy(every_steps=None))
    whole = train(spec, RunFolder(tmp_path / "whole"), world=World.current())
    folder = RunFolder(tmp_path / "left")
    if is_stop:
        watch = AsksInValidation(Wish.GO_ON, folder)
        assert train(spec, folder, world=World.current(), watch=watch).status == "stopped"
        folder.clear_stop()
    else:
        with pytest.raises(LeavingError):
            train(spec, folder, world=World.current(), watch=AsksInValidation(Wish.LEAVE))
    assert folder.metrics() == []
    assert [checkpoint.step for checkpoint in list_checkpoints(folder.checkpoints)] == [STEPS]
    resumed = train(spec, folder, world=World.current())
    assert folder.attempts()[-1]["start_step"] == STEPS
    assert (resumed.status, resumed.weights_sha256) == ("finished", whole.weights_sha256)
    assert resumed.metrics["val_loss"] == whole.metrics["val_loss"]
    assert [line["metrics"]["sample_order"] for line in folder.metrics()] == [
        line["metrics"]["sample_order"] for line in RunFolder(tmp_path / "whole").metrics()
    ]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    event = threading.Event()
    event.set()
    monkeypatch.setattr(watch_module, "_told_to_end", event)
    monkeypatch.setattr(watch_module, "_TERM_GRACE_S", 0.2)
    return event


def test_who_is_told_to_end_has_until_some_time_after_the_last_sign_of_life(
    told: threading.Event, tmp_path: Path
) -> None:
    watch = WorkerWatch(RunFolder(tmp_path), 0, "here", hang_s=60)
    for step in range(8):  # batches of a validation
        watch.alive(step)
        watch.check()
        time.sleep(0.05)
    time.sleep(0.3)
    with pytest.raises(HangError, match="told to end"):
        watch.check()


def test_a_loop_that_knows_that_it_is_to_end_may_take_its_time_for_the_checkpoint(
    told: threading.Event, tmp_path: Path
) -> None:
    watch = WorkerWatch(RunFolder(tmp_path), 0, "here", hang_s=60)
    assert watch.wish() is Wish.LEAVE
    watch.check()
    time.sleep(0.3)
    watch.check()


class Hanging(RunFolder):
    """A run whose storage does not answer, or not with what was asked."""

    def leave(self, name: str, text: str) -> None:
        if self.root.name == "broken":
            raise OSError(5, "Input/output error")
        time.sleep(60)


@pytest.mark.parametrize("name", ["broken", "hanging"])
def test_a_hang_is_told_although_the_storage_is_what_hangs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch_module, "_STORAGE_S", 0.2)
    monkeypatch.setattr(watch_module, "_OTHERS_S", 0.0)
    watch = WorkerWatch(Hanging(tmp_path / name), 0, "here", hang_s=0.05)
    watch.alive(3)
    time.sleep(0.1)
    with pytest.raises(HangError, match="What it was doing is in the log of its process"):
        watch.check()
    assert "test_train_leaving.py" in capfd.readouterr().err


def test_ranks_that_wait_together_show_signs_of_life_and_end_after_their_time() -> None:
    signs, gate = [], threading.Event()
    wait_together(lambda: gate.wait(60), World.current(), lambda: signs.append(1), limit_s=0.6)
    gate.set()
    assert len(signs) >= 2
    with pytest.raises(OSError, match="gone"):
        wait_together(lambda: (_ for _ in ()).throw(OSError("gone")), World.current(), lambda: None)


def test_a_rank_with_fewer_batches_takes_part_in_every_round() -> None:
    class Larger(World):
        def largest(self, values: list[int]) -> list[int]:
            return [value + 2 for value in values]

    assert list(in_rounds([1, 2], 2, Larger.current())) == [1, 2, None, None]


class KillsLoaders:
    """Kills the loader processes once they have taken over."""

    def __init__(self) -> None:
        self.others, self.has_killed = set(multiprocessing.active_children()), False

    def wish(self) -> Wish:
        return Wish.GO_ON

    def alive(self, step: int) -> None:
        found = set(multiprocessing.active_children()) - self.others
        if found and step > 4 and not self.has_killed:
            self.has_killed = True
            for process in found:
                os.kill(process.pid or 0, signal.SIGKILL)


def test_a_loader_that_is_killed_is_no_result_and_the_next_attempt_goes_on(digits: Path, tmp_path: Path) -> None:
    loaders.start_server(()).result()
    spec = small_spec(digits, checkpoint=CheckpointPolicy(every_steps=2))
    spec = replace(spec, data=replace(spec.data, num_loaders=1))
    whole = train(spec, RunFolder(tmp_path / "whole"), world=World.current())
    folder = RunFolder(tmp_path / "killed")
    with pytest.raises(PassingError, match=r"rank 0: data\.num_loaders: a loader process was killed"):
        train(spec, folder, world=World.current(), watch=KillsLoaders())
    assert folder.result() == {}
    again = train(spec, folder, world=World.current())
    assert folder.attempts()[-1]["start_step"] > 0
    assert (again.status, again.weights_sha256) == ("finished", whole.weights_sha256)


def test_a_store_that_is_away_may_be_back_for_the_next_attempt_and_one_that_refuses_may_not() -> None:
    away = StoreError("storage: does not answer")
    away.__cause__ = StoreAwayError("timeout")
    assert [is_passing(error) for error in (away, StoreError("refuses"), DabError("no"))] == [True, False, False]
