"""The training loop: DDP, evaluation, checkpoints, resume. The same loop under plain `torchrun` and under Ray.

    torchrun --nproc_per_node 2 -m dabnn.train SPEC.json RUN_FOLDER     (`dabnn.torchrun`)

What makes a run reproducible and resumable bit for bit on the same number of ranks: the order of the samples is a
pure function of (seed, epoch), the dropout masks of (seed, step, rank), the learning rate of the step; DDP's buckets
are settled before the first step; a checkpoint holds rank 0's weights, buffers and optimizer state, and every rank
starts from those. A run of several stages is one run: epochs and steps are counted through, and a stage starts with the
weights that the checkpoint at the end of the one before holds, whether or not the program was ended in between.

Once a step all ranks agree (one all-reduce of five integers) whether to go on: a stop, a damaged sample on one rank, a
loss that is not finite or bits that differ end all of them together instead of leaving some waiting. Leaves out
clusters and trackers: see `jobs.train`.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

from dabnn.agreement import is_agreed
from dabnn.checkpoints import Checkpoint, CheckpointWriter, Moment, load_state, restore_point, weights_sha256
from dabnn.data import Batch, Stream, load_manifest
from dabnn.data.bad_samples import BadSamples
from dabnn.diagnose import Place, not_finite_parameter
from dabnn.distributed import World, deterministic, seed_step
from dabnn.errors import DabError, InvalidInputError, PassingError
from dabnn.evaluate import Totals, count
from dabnn.learner import Learner, checkpoint_bytes
from dabnn.memory import telling_of_memory
from dabnn.observer import LeavingError, Observer, Silent, Unwatched, Watch, Wish
from dabnn.progress import Position, ProgressWriter
from dabnn.run_folder import RunFolder
from dabnn.run_mirror import RunMirror, mirroring
from dabnn.spec import StageSpec, TrainSpec
from dabnn.splits import check_data, check_order, open_split, order_settings
from dabnn.tally import Tally, bad_over
from dabnn.together import in_rounds, wait_together
from dabnn.train_result import LEAVING, PASSING, TrainResult, is_passing
from dabnn.transfer import load_teacher
from dabnn.verdict import Verdict, verdict

_log = logging.getLogger(__name__)

_LEAVE_S = 60.0  # how long all ranks wait for the store when the process of one must end
_DIVERGED_ADVICE = "Lower optim.max_lr or raise schedule.warmup_epochs."
_BITS_ADVICE = "`dab resume` goes on from the last checkpoint; if it happens again, test the memory of that machine."


def train(
    spec: TrainSpec, folder: RunFolder, *, world: World, observer: Observer | None = None, watch: Watch | None = None
) -> TrainResult:
    """Train from the newest intact checkpoint in `folder`, or from the start; every rank calls this alike.

    Args:
        spec: The run.
        folder: Where checkpoints, metrics and progress go; shared by all ranks, or behind a URL.
        world: The ranks.
        observer: Told about each finished epoch.
        watch: Told of each step, and asked whether a checkpoint is wanted now.

    Returns:
        How it ended, equal on all ranks. A specification that does not fit data, model or checkpoint, a damaged sample,
        a full disk or a loss that is not finite is a result with status "failed", not an exception, because a restart
        would meet it again.

    Raises:
        DabError: Not even the result could be written, or not all could be brought to where the run's folder lies.
        LeavingError: `watch` asked for it; a checkpoint was taken, and no result was left.
        PassingError: On all ranks, where another attempt may well not meet what ended this one; no result was left.
        MemoryLimitError: A step needs more memory than there is.
    """
    with mirroring(folder, is_main=world.is_main, retry_s=spec.checkpoint.retry_s) as (place, mirror):
        with deterministic(), telling_of_memory(spec.data.batch_size, world.size, world.rank):
            loop = _Loop(spec, place, world, (observer or Silent(), watch or Unwatched()), mirror)
            try:
                result = loop.prepare() or loop.run()
            finally:
                loop.close()
        if result.status == LEAVING:
            raise LeavingError(result.message)
        if result.status == PASSING:
            raise PassingError(result.message)
        if mirror is not None:  # the result says that everything before it is there
            mirror.settle()
        if world.is_main:
            try:
                place.write_result(asdict(result))
            except OSError as error:
                raise DabError(f"storage: cannot write in {place.root}: {error}. {result.message}") from error
    return result


class _Loop:
    """The state of one call of `train`."""

    def __init__(
        self,
        spec: TrainSpec,
        folder: RunFolder,
        world: World,
        outside: tuple[Observer, Watch],
        mirror: RunMirror | None,
    ) -> None:
        self.spec, self.folder, self.world, self.mirror = spec, folder, world, mirror
        self.observer, self.watch = outside
        self.learner: Learner
        self.streams: list[Stream] = []
        self.writer = CheckpointWriter(folder.checkpoints, spec.checkpoint)
        self.position, self.tally, self.metrics = Position(), Tally(), dict[str, float]()
        self._started, self._seen = 0.0, 0
        self.progress = ProgressWriter(spec, folder)
        self._error: DabError | None = None
        self._last_loss, self._saved_step, self._is_save_wished = 0.0, -1, False
        self._tried: tuple[Batch, Place] | None = None  # the last step

    def prepare(self) -> TrainResult | None:
        """Build everything and restore the newest checkpoint; return a failed result when a rank cannot."""
        reason = self._together(self._begin_mirror)
        found = restore_point(self.folder.checkpoints) if self.world.is_main and not reason else None
        found = self.world.share(found)
        reason = reason or self._together(lambda: self._restore(found))
        if reason:
            epoch, step = (found.epoch, found.step) if found else (0, 0)
            return TrainResult(self._failure(), reason, epoch, step, {}, "")
        self.learner.connect()
        if self.world.is_main:
            self._write(lambda: self.folder.begin_attempt(self.position.step, self.world.size))
        return None

    def _begin_mirror(self) -> None:
        if self.mirror is not None:
            self.mirror.on_wait = self._live
            self.mirror.begin(checkpoint_bytes(self.spec))

    def _settle(self) -> None:
        """Have every checkpoint where the other ranks find it."""
        self.writer.wait()
        if self.mirror is not None:
            self.mirror.settle()

    def _together(self, call: Callable[[], object]) -> str:
        """Call on every rank; return why the first rank that cannot go on cannot, or nothing."""
        try:
            call()
        except DabError as error:  # not raised here: the other ranks would wait for this one
            self._error = error
        reasons = [f"rank {rank}: {reason}" for rank, reason in enumerate(self.world.gather(self._reason())) if reason]
        return reasons[0] if reasons else ""

    def _open(self, split: str) -> Stream:
        stream = open_split(self.spec, self.learner.net.spec, split, self.world)
        self.streams.append(stream)
        return stream

    def _reason(self) -> str:
        return "" if self._error is None else str(self._error)

    @property
    def stage(self) -> StageSpec:
        """The stage that is trained."""
        return self.spec.parts[self.position.stage]

    @property
    def _epochs_before(self) -> int:
        return self.spec.first_epoch(self.position.stage)

    @property
    def _is_stage_over(self) -> bool:
        return self.position.epoch == self._epochs_before + self.stage.epochs

    def run(self) -> TrainResult:
        """Train until the last epoch, a stop or a failure."""
        while self.position.epoch < self.spec.epochs:
            error = self._next_stage() if self._is_stage_over else ""
            if error:
                return self._result(self._failure(), error)
            self._started, self._seen = time.monotonic(), 0
            decision, reason = self._train_epoch()
            if decision.is_failure:
                return self._result(self._failure(), self._explain(decision, reason))
            is_stopping = decision.is_stop
            if is_stopping and self._saved_step != self.position.step:
                self._save({} if self.position.step_in_epoch else self.metrics)
            if self.position.step_in_epoch == self.train_stream.num_steps and decision is not Verdict.LEAVE:
                ended, why = self._finish_epoch(is_stopping)
                if ended.is_failure:
                    return self._result(self._failure(), why)
                decision, reason = (ended, why) if ended.is_stop else (decision, reason)
            if decision.is_stop and self.position.epoch < self.spec.epochs:
                return self._result("stopped", reason) if decision is Verdict.STOP else self._leave(reason)
        return self._result("finished", "")

    def _leave(self, reason: str) -> TrainResult:
        """Have all ranks end together, once rank 0 has sent the checkpoint: the end of one is the end of all."""
        result = self._result(LEAVING, reason)
        with contextlib.suppress(DabError):  # the next attempt goes on from what is there
            wait_together(self._settle, self.world, self._live, _LEAVE_S)
        return result

    def _live(self) -> None:
        self.watch.alive(self.position.step)

    def _next_stage(self) -> str:
        """Begin the stage after the one that is over, with its weights; return why that cannot be, or nothing."""
        weights = {name: tensor.clone() for name, tensor in self.learner.evaluated().items()}
        state = {"net": weights, "model": asdict(self.learner.net.spec)}
        self.position.stage += 1

        def begin() -> None:
            self.learner = self._make_learner()
            self.learner.start_from(state, f"stage {self.stage.name}")

        # A teacher may be the checkpoint that is being written.
        settled = self._together(lambda: wait_together(self._settle, self.world, self._live))
        reason = settled or self._together(begin)
        if not reason:
            self.learner.connect()
            if self.world.is_main:
                _log.info("stage %d of %d: %s", self.position.stage + 1, len(self.spec.parts), self.stage.name)
        return reason

    def _make_learner(self) -> Learner:
        distill = self.stage.loss.distill
        names = [stage.name for stage in self.spec.parts[: self.position.stage]]
        teacher = load_teacher(distill.teacher, self.folder, names) if distill else None
        return Learner(self.spec, self.stage, self.world, teacher)

    def close(self) -> None:
        """End the loader processes, and have the checkpoint that is being written."""
        for stream in self.streams:
            stream.close()
        with contextlib.suppress(DabError):  # `_result` has told it, or what ended the loop counts
            self.writer.wait()

    def _train_epoch(self) -> tuple[Verdict, str]:
        stream, done = self.train_stream, self.position.step_in_epoch
        # Nothing is left to learn where a process had to leave between the last step of an epoch and its evaluation.
        batches = stream.epoch(self.position.epoch, start_step=done) if done < stream.num_steps else iter(())
        batch = self._fetch(batches)
        decision, reason = self._agree()
        while decision is Verdict.CONTINUE and batch is not None:
            self._step(batch)
            if self.world.is_main and not self.writer.is_rehearsed:  # the first step of an attempt is slow anyway
                self.writer.rehearse(self.learner.state())
            self._report_progress()
            batch = self._fetch(batches)
            decision, reason = self._agree()
            if decision is Verdict.CONTINUE:  # otherwise the weights may not be finite
                self._save_if_due()
        return decision, reason

    def _fetch(self, batches: Iterator[Batch]) -> Batch | None:
        try:
            return next(batches, None)
        except DabError as error:  # not raised here: the other ranks would wait for this one in the next all-reduce
            self._error = error
            return None

    def _agree(self) -> tuple[Verdict, str]:
        if self.mirror is not None:
            self._error = self._error or self.mirror.problem
        stop = self.world.is_main and self.folder.is_stop_requested()
        flags = [int(stop), int(self._error is not None), int(not self.learner.is_finite), int(self.watch.wish())]
        *flags, wish, digest, complement = self.world.largest([*flags, *self.learner.agreement.values()])
        self._is_save_wished |= wish == Wish.SAVE
        return verdict(*flags, leave=int(wish == Wish.LEAVE), has_equal_bits=is_agreed([digest, complement]))

    def _step(self, batch: Batch) -> None:
        try:
            self._learn(batch)
        except DabError as error:  # weights that are not finite: every rank has them
            self._error = error

    def _learn(self, batch: Batch) -> None:
        position = self.position
        self._tried = batch, Place(self.world.rank, position.epoch + 1, position.step + 1, self.spec.seed)
        seed_step(self.spec.seed, position.step, self.world.rank)
        epoch = position.epoch - self._epochs_before + position.step_in_epoch / self.train_stream.num_steps
        labels = batch.labels.to(self.world.device)
        images, size = batch.images.to(self.world.device), batch.global_size
        logits, losses, self._last_loss = self.learner.step(
            images, labels, batch.partners, epoch=epoch, step_in_epoch=position.step_in_epoch, num_samples=size
        )
        self.tally.add(batch, logits, labels, losses, epoch=position.epoch, step=position.step_in_epoch)
        self._check_bad(self.tally.bad, self.train_stream)  # rank 0 also counts those of before the run was resumed
        self._seen += size
        position.step_in_epoch += 1
        position.step += 1
        self.watch.alive(position.step)

    def _finish_epoch(self, is_stopping: bool) -> tuple[Verdict, str]:
        """Validate, record and save; return whether the run goes on, and why not.

        A wish to end that comes meanwhile ends it at once, with a checkpoint of the epoch's end; `is_stopping` says
        that a stop was heard before.
        """
        duration_s = time.monotonic() - self._started
        metrics, (decision, reason) = self._validate(heeds_stop=not is_stopping)
        if decision.is_stop:
            if self._saved_step != self.position.step:
                self._save({})
            return decision, reason
        tally, self.tally = self.tally.over(self.world), Tally()
        if self.world.is_main:  # one rank tells what all of them have
            self._check_bad(tally.bad, self.train_stream)
        metrics = tally.metrics(tolerates_bad=self.spec.data.max_bad_fraction > 0) | metrics
        layers = self._measure()
        decision, reason = self._agree()
        if decision.is_failure:
            return decision, self._explain(decision, reason)
        self.position.epoch += 1
        self.position.step_in_epoch = 0
        metrics["learning_rate"] = self.learner.optimizer.param_groups[0]["lr"]
        metrics["images_per_s"] = self._seen / duration_s
        metrics["epoch_s"] = duration_s
        if self.spec.stages:
            metrics["stage"] = float(self.position.stage + 1)
        self.metrics = metrics = metrics | layers
        if self.world.is_main:  # before the checkpoint: a run resumed from that would not write this line again
            self._write(lambda: self.folder.append_metrics(self.position.epoch, metrics))
            self._report_progress(metrics["images_per_s"])
        is_due = self.position.epoch % self.spec.checkpoint.every_epochs == 0
        if self._is_stage_over or is_stopping or is_due or self._is_save_wished:
            self._save(metrics)
        self.observer.epoch_finished(self.position.epoch, metrics)
        return Verdict.CONTINUE, ""

    def _measure(self) -> dict[str, float]:
        """Return the epoch's instruments, and have the bits after its last update compared."""
        try:
            layers = self.learner.instruments.finish_epoch(self.world)
            self.learner.agreement.settle()
        except DabError as error:  # weights that are not finite: every rank has them
            self._error = error
            return {}
        return layers

    def _validate(self, *, heeds_stop: bool) -> tuple[dict[str, float], tuple[Verdict, str]]:
        """Return the metrics of the validation, and whether it came to its end."""
        totals, decision = Totals(), (Verdict.CONTINUE, "")
        with self.learner.evaluating() as net:
            # Another epoch each time, although the order is the same: so the loaders' read-ahead is used.
            batches = iter(partial(self._fetch, self.val_stream.epoch(self.position.epoch)), None)
            for batch in in_rounds(batches, self.val_stream.num_steps, self.world):
                decision = self._ask(heeds_stop=heeds_stop)
                if decision[0] is not Verdict.CONTINUE:
                    break
                self.watch.alive(self.position.step)
                try:
                    totals = totals.plus(count(net, [batch] if batch else [], self.world.device))
                except DabError as error:  # not raised here: the other ranks would wait for this one
                    self._error = error
        if decision[0].is_stop:
            return {}, decision
        metrics = totals.over(self.world).metrics("val_")
        if self.spec.data.max_bad_fraction > 0:
            bad = bad_over(self.val_stream.bad, self.world)
            if self.world.is_main:
                self._check_bad(bad, self.val_stream)
            metrics["val_bad_samples"] = float(bad.num)
        return metrics, decision

    def _ask(self, *, heeds_stop: bool) -> tuple[Verdict, str]:
        """Agree between two batches of a validation, in which no weights change."""
        stop = heeds_stop and self.world.is_main and self.folder.is_stop_requested()
        flags = [int(stop), int(self._error is not None), int(self.watch.wish())]
        stops, errors, wish = self.world.largest(flags)
        self._is_save_wished |= wish == Wish.SAVE
        return verdict(stops, errors, 0, leave=int(wish == Wish.LEAVE))

    def _check_bad(self, bad: BadSamples, stream: Stream) -> None:
        try:
            bad.check(stream.num_samples, self.spec.data.max_bad_fraction)
        except DabError as error:  # not raised here: the other ranks would wait for this one in the next all-reduce
            self._error = error

    def _save_if_due(self) -> None:
        every = self.spec.checkpoint.every_steps
        is_last = self.position.step_in_epoch == self.train_stream.num_steps
        is_due = every is not None and self.position.step % every == 0 and not is_last
        if is_due or self._is_save_wished:
            self._save({})

    def _save(self, metrics: dict[str, float]) -> None:
        """Write a checkpoint of the current position; every rank must call it, rank 0 writes."""
        tally, instruments = self.tally.over(self.world), self.learner.instruments.state(self.world)
        self._saved_step, self._is_save_wished = self.position.step, False
        if not self.world.is_main or self._error is not None:
            return
        if problem := not_finite_parameter(self.learner.net):
            text = f"weights: not finite after step {self.position.step} ({problem}). {_DIVERGED_ADVICE}"
            self._error = DabError(text)
            return
        state = self.learner.state() | tally.state()
        state |= {
            "model": asdict(self.learner.net.spec),
            "position": asdict(self.position),
            "order_settings": order_settings(self.spec),
            "instruments": instruments,
            "metrics": metrics or self.metrics,
            "data_digest": self.data_digest,
        }
        number, is_over = self.position.stage + 1, self._is_stage_over
        moment = Moment(self.position.step, self.position.epoch, number, len(self.spec.parts), is_over)
        try:
            self.writer.save(state, moment, metrics)
        except DabError as error:
            self._error = error

    def _restore(self, found: Checkpoint | None) -> None:
        """Build what `found` was saved from and go on from there, or begin; every stream is opened."""
        state = load_state(self.folder.place_of(f"checkpoints/{found.name}")) if found else {}
        self.position = Position(**state["position"]) if found else Position()
        if self.position.stage >= len(self.spec.parts):
            raise InvalidInputError(f"train.stages: the run was in stage {self.position.stage + 1}, which is gone.")
        self.learner = self._make_learner()
        self.train_stream = self._open("train")
        self.val_stream = self._open("val")
        self.data_digest = load_manifest(self.spec.data.train).digest
        if found:
            self._continue(found, state)
        elif self.spec.init_from:
            self.learner.start_from(load_state(self.spec.init_from), f"train.init_from: {self.spec.init_from}")

    def _continue(self, found: Checkpoint, state: dict[str, Any]) -> None:
        check_data(self.spec, self.data_digest, state["data_digest"])
        if self.position.step_in_epoch:
            check_order(self.spec, state.get("order_settings", {}))
        self.learner.load(state, found.path)
        self._saved_step = found.step
        self.metrics = state["metrics"]
        self.learner.instruments.restore(state.get("instruments", {}), is_main=self.world.is_main)
        if self.world.is_main:  # the sums are over all ranks already
            self.tally = Tally.from_state(state)
        _log.info("resumed from %s (epoch %d, step %d)", found.path, self.position.epoch, self.position.step)

    def _report_progress(self, images_per_s: float | None = None) -> None:
        """Tell where the run stands; without a rate, that of the epoch so far, and not in every step."""
        if not self.world.is_main or (images_per_s is None and not self.progress.is_due):
            return
        rate = self._seen / (time.monotonic() - self._started) if images_per_s is None else images_per_s
        stream = self.train_stream
        self.progress.write(self.position, stream.num_steps, stream.num_samples, self._last_loss, rate)

    def _write(self, call: Callable[[], object]) -> None:
        """Write to the run's folder; a failure ends all ranks together at the next step."""
        try:
            call()
        except OSError as error:
            self._error = DabError(f"storage: cannot write in {self.folder.root}: {error}")

    def _explain(self, decision: Verdict, reason: str) -> str:
        """Say why all ranks end; every rank must call it. A rank whose step was not finite saves it."""
        place = f"epoch {self.position.epoch + 1}, step {self.position.step}"
        if decision is Verdict.BITS_DIFFER:
            return f"{reason} ({place}). {self.learner.agreement.describe(self.world)}. {_BITS_ADVICE}"
        own = f"rank {self.world.rank}: {self._reason().rstrip('.')}" if self._error else ""
        is_sick = not self.learner.is_finite or bool(self._error and not_finite_parameter(self.learner.net))
        found = self.learner.inspect(self.folder.inspect, *self._tried, is_sick=is_sick) if self._tried else ""
        if decision is Verdict.NOT_FINITE and (found or not math.isfinite(self._last_loss)):
            own = f"rank {self.world.rank}: loss {self._last_loss}"
        own = f"{own}; {found}" if found else own
        details = "; ".join(detail for detail in self.world.gather(own) if detail)
        advice = f" {_DIVERGED_ADVICE}" if decision is Verdict.NOT_FINITE else ""
        return f"{reason} ({place}). {details}.{advice}"

    def _failure(self) -> str:
        """Return how a run ends that cannot go on; every rank must call it."""
        found = self.world.gather(None if self._error is None else is_passing(self._error))
        return PASSING if True in found and False not in found else "failed"

    def _result(self, status: str, message: str) -> TrainResult:
        try:
            self.writer.wait()
        except DabError as error:
            self._error = error
        decision, reason = self._agree()
        if status not in ("failed", PASSING) and decision is Verdict.RANK_ERROR:
            status, message = self._failure(), self._explain(decision, reason)
        digest = self.world.share(weights_sha256(self.learner.evaluated()) if self.world.is_main else "")
        position = self.position
        return TrainResult(status, message, position.epoch, position.step, dict(self.metrics), digest)


if __name__ == "__main__":
    from dabnn.torchrun import main

    main()
