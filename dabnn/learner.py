"""What learns in one stage of a run: the network, its optimizer, its moving average and its teacher.

A step is a function of these, the samples and the position within the stage. Leaves out data, checkpoints and the
agreement of ranks, which are the loop's: `dabnn.train`.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dabnn.agreement import Agreement
from dabnn.averaging import Average
from dabnn.data import Batch
from dabnn.diagnose import (
    Place,
    first_not_finite,
    not_finite_gradient,
    not_finite_parameter,
    save_state,
    witness,
)
from dabnn.distributed import World, seed_step, share_buffers, wrap
from dabnn.errors import InvalidInputError
from dabnn.instruments import Instruments
from dabnn.layers import set_progress
from dabnn.losses import distillation, kurtosis_penalty, latent_weights, mixed_cross_entropy, smoothed_cross_entropy
from dabnn.models import Network, build
from dabnn.optim import make_optimizer, set_learning_rate, take_step
from dabnn.schedules import learning_rate
from dabnn.spec import StageSpec, TrainSpec
from dabnn.sync_batchnorm import synchronize
from dabnn.transfer import check_same, check_teacher, transfer

_UNRELIABLE = "computed again the step is finite, so an operation or the memory is not reliable"
_MOST_MOMENTS = 2  # numbers that an optimizer keeps for a weight, as adam does
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Learner:
    """The state of one stage.

    Attributes:
        stage: What the stage is.
        net: The network; its latent weights are float32 whatever the precision of the arithmetic.
        optimizer: The optimizer over its parameters.
        average: The moving average of its weights, or None.
        teacher: A trained network to learn from, in evaluation mode and float32, or None.
        instruments: What measures the layers.
        agreement: What compares the bits of the ranks.
        is_finite: Whether loss and gradients of the last step were.
    """

    def __init__(self, spec: TrainSpec, stage: StageSpec, world: World, teacher: Network | None) -> None:
        """Build the stage's network with the run's initial weights.

        Raises:
            InvalidInputError: Model, optimizer, precision or teacher do not fit.
        """
        self.stage, self._world, self._decay = stage, world, spec.ema_decay
        self._autocast = check_precision(spec.precision, world.device)
        self.net = build(**stage.model, seed=spec.seed).to(world.device)
        self.teacher = teacher
        if teacher is not None:
            check_teacher(teacher.spec, self.net.spec, stage.loss.distill.teacher if stage.loss.distill else "")
            teacher.to(world.device).eval().requires_grad_(False)
        if spec.sync_bn:
            synchronize(self.net, world)
        self.optimizer = make_optimizer(self.net, stage.optim)
        self.average = self._new_average()
        self.instruments = Instruments(self.net if spec.instruments else None)
        self.agreement = Agreement(self.net, world)
        self._latent = latent_weights(self.net)
        self._model: nn.Module = self.net
        self.is_finite = True

    def start_from(self, state: Mapping[str, Any], source: str) -> None:
        """Take over the weights of the stage before, or of another run; see `dabnn.transfer`.

        Raises:
            InvalidInputError: They are those of another architecture.
        """
        transfer(state, self.net, source)
        self.average = self._new_average()

    def connect(self) -> None:
        """Join the ranks, which hold the same weights by now; every rank must call it before the first step."""
        spec = self.net.spec
        self._model = wrap(self.net, self._world, (spec.in_channels, spec.input_size, spec.input_size))

    def step(
        self,
        images: Tensor,
        labels: Tensor,
        partners: tuple[Tensor, Tensor] | None = None,
        *,
        epoch: float,
        step_in_epoch: int,
        num_samples: int,
    ) -> tuple[Tensor, Tensor, float]:
        """Learn from this rank's samples of one step; every rank must call it.

        Where the loss or a gradient is not finite the weights are left alone, so that they can be looked at.

        Args:
            images: (n, C, H, W) float32 on the rank's device.
            labels: (n,) int64.
            partners: With mixing, the labels of the images that were mixed in and the share of `labels`, (n,) each.
            epoch: Fractional epoch of the stage.
            step_in_epoch: Steps of the epoch taken before.
            num_samples: Samples of the step over all ranks.

        Returns:
            Logits (n, classes), the cross-entropy of each sample without smoothing (n,), and the loss. With mixing the
            cross-entropy is that of the sample's own label.

        Raises:
            DabError: Weights or step are not finite.
        """
        set_learning_rate(self.optimizer, learning_rate(self.stage.schedule, epoch))
        set_progress(self.net, epoch / self.stage.epochs)
        self._model.train()
        with self.instruments.step(step_in_epoch):
            logits, loss = self.loss(self._model, images, labels, num_samples, partners)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        gradients = [parameter.grad for parameter in self.net.parameters() if parameter.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        value, gradient_norm = torch.stack([loss.detach(), norm]).tolist()  # one wait for the device
        if not math.isfinite(gradient_norm):  # the squares of finite gradients may overflow; the largest costs 25x more
            gradient_norm = float(nn.utils.get_total_norm(gradients, math.inf))
        self.is_finite = math.isfinite(value) and math.isfinite(gradient_norm)
        if self.is_finite:
            take_step(self.optimizer)
            if self.average is not None:
                self.average.update(self.net)
        logits = logits.detach().float()
        return logits, F.cross_entropy(logits, labels, reduction="none"), value

    def loss(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        num_samples: int,
        partners: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the logits of `model`, the network or a copy of it, and the loss that a step takes the gradient of."""
        with self._autocast:
            logits = model(images)
        # DDP averages over ranks; this makes it the mean over the samples of the step, also when shares differ.
        loss = self._losses(logits, images, labels, partners).sum() * (self._world.size / num_samples)
        if self.stage.loss.kurtosis is not None and self._latent:
            penalty = self.stage.loss.kurtosis
            loss = loss + penalty.weight * kurtosis_penalty(self._latent, penalty.target)
        return logits, loss

    def _losses(self, logits: Tensor, images: Tensor, labels: Tensor, partners: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return what is minimised for each sample: (1 - weight) cross-entropy + weight distillation.

        The teacher answers to the mixed images themselves, so its answers need no partner (arXiv 2106.05237).
        """
        smoothing = self.stage.loss.label_smoothing
        if partners is None:
            losses = smoothed_cross_entropy(logits, labels, smoothing)
        else:
            losses = mixed_cross_entropy(logits, labels, smoothing, *partners)
        distill = self.stage.loss.distill
        if distill is None or self.teacher is None:
            return losses
        with torch.no_grad():
            answers = self.teacher(images)
        return (1 - distill.weight) * losses + distill.weight * distillation(logits, answers, distill.temperature)

    def inspect(self, folder: Path, batch: Batch, place: Place, *, is_sick: bool) -> str:
        """Find where the last step stopped being finite; every rank must call it.

        Returns:
            What was found and where the step is saved, on the rank that has the most to tell; nothing on the others.
        """
        images, labels = batch.images.to(self._world.device), batch.labels.to(self._world.device)

        def forward(net: nn.Module) -> Tensor:
            seed_step(place.seed, place.step - 1, place.rank)
            return self.loss(net, images, labels, batch.global_size, batch.partners)[1]

        found = first_not_finite(self.net, forward) if is_sick else None
        if witness(self._world.gather(found)) != self._world.rank:
            return ""
        found = found or not_finite_gradient(self.net) or not_finite_parameter(self.net) or _UNRELIABLE
        path = folder / place.file_name
        try:
            save_state(path, self.net, self.optimizer, batch, place)
        except OSError as error:  # a full disk must not hide the finding
            return f"{found}; the step could not be saved ({error})"
        return f"{found}; the step is saved in {path}"

    @contextmanager
    def evaluating(self) -> Iterator[Network]:
        """Within the block the network is what would be exported now, in evaluation mode and equal on all ranks."""
        if self.average is None:
            with self._in_evaluation() as net:
                yield net
        else:
            with self.average.applied_to(self.net), self._in_evaluation() as net:
                yield net

    @contextmanager
    def _in_evaluation(self) -> Iterator[Network]:
        share_buffers(self.net, self._world)
        self.net.eval()
        try:
            yield self.net
        finally:
            self.net.train()

    def evaluated(self) -> dict[str, Tensor]:
        """Return the weights that are evaluated and exported: the average where there is one."""
        return self.net.state_dict() if self.average is None else self.average.weights

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold of the stage; `load` is the inverse. `net` is what is exported."""
        state: dict[str, Any] = {"net": self.evaluated(), "optimizer": self.optimizer.state_dict()}
        if self.average is not None:
            state |= {"latest": self.net.state_dict(), "num_updates": self.average.num_updates}
        return state

    def load(self, state: Mapping[str, Any], source: str) -> None:
        """Continue from what `state` returned.

        Raises:
            InvalidInputError: It is that of another architecture, or was saved with another use of the average or
                another optimizer.
        """
        check_same(state["model"], self.net.spec, source)
        if ("latest" in state) != (self.average is not None):
            kind = "an" if "latest" in state else "no"
            raise InvalidInputError(
                f"{source}: was saved with {kind} average of weights, the run now has train.ema_decay={self._decay}. "
                "Resume with the value that the run began with."
            )
        self.net.load_state_dict(state.get("latest", state["net"]))
        if self.average is not None:
            self.average.load(state["net"], state["num_updates"])
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError as error:  # torch's own for parameter groups of another number or size
            raise InvalidInputError(
                f"{source}: its optimizer does not fit the run's ({error}). Resume with the configuration that the run "
                "began with, or start a new run with these weights: train.init_from."
            ) from error

    def _new_average(self) -> Average | None:
        return None if self._decay is None else Average(self.net, self._decay)


def checkpoint_bytes(spec: TrainSpec) -> int:
    """Return about how many bytes a checkpoint of a run takes at most: one of the stage with the largest network."""
    copies = 1 + _MOST_MOMENTS + (spec.ema_decay is not None)
    with torch.device("meta"):  # sizes are enough
        nets = [build(**stage.model) for stage in spec.parts]
    return copies * max(map(_state_bytes, nets))


def _state_bytes(net: nn.Module) -> int:
    state: Mapping[str, Tensor] = net.state_dict()
    return sum(tensor.nbytes for tensor in state.values())


def check_precision(precision: str, device: torch.device) -> torch.autocast:
    """Return the context of a forward pass in a precision: under bf16 torch chooses per operation what runs in it.

    Raises:
        InvalidInputError: No such precision, or the device has no arithmetic for it.
    """
    if precision not in PRECISIONS:
        raise InvalidInputError(f"train.precision: {precision!r} is not known. Use one of {', '.join(PRECISIONS)}.")
    is_bf16 = precision == "bf16"
    if is_bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise InvalidInputError(f"train.precision: bf16, but {name} has no bf16 arithmetic. Use fp32.")
    if is_bf16 and device.type not in ("cpu", "cuda"):
        raise InvalidInputError(f"train.precision: bf16 is not tried on {device.type}. Use fp32.")
    return torch.autocast(device.type, dtype=PRECISIONS["bf16"], enabled=is_bf16)
