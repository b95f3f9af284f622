"""What is trained on a folder of images when nobody says otherwise: each key with its value and the reason for it.

Pure functions of what was found. The limits are round numbers around what was measured on small sets (Omniglot, parts
of CIFAR-10; docs/dab_with_binary_inputs.md); the search is there to do better.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from orchestrator.image_folder import Found
from orchestrator.output import one_line

# Training images from which inputs are larger, inputs of layers are binary too, and photographs are cut freely.
_MEDIUM, _LARGE, _HUGE = 5_000, 20_000, 50_000
# Up to this shorter side an image is taken as it is; larger inputs begin with a stride of 4.
_SMALL_SIDE = 40
_SMALLEST_INPUT, _LEAST_STRIDED = 16, 96
_STEPS = 3000
_LEAST_STEPS_PER_EPOCH = 50
_EPOCHS = (30, 60)
_BATCHES = (16, 32, 64, 128, 256)
_RATE = 4e-3
_PLAIN_TEXT = re.compile(r"[A-Za-z_][\w./-]*")
_WORDS = {"null", "true", "false", "yes", "no", "on", "off"}


@dataclass(frozen=True)
class Choice:
    """A value of the configuration.

    Attributes:
        key: Dotted.
        value: As YAML has it.
        reason: Why, in one line; may be empty.
    """

    key: str
    value: Any
    reason: str = ""

    @property
    def override(self) -> str:
        """The choice as `--set` takes it."""
        return f"{self.key}={flow(self.value)}"


def choose(found: Found, num_gpus: int = 0) -> tuple[Choice, ...]:
    """Return a complete configuration for a folder of images, but for where its data set lies.

    Args:
        found: What lies in the folder.
        num_gpus: GPUs of the cluster.
    """
    return (
        Choice("name", found.name),
        Choice("seed", 1),
        *_model(found, num_gpus),
        *_data(found, num_gpus),
        *_training(found, num_gpus),
        *_search(found, num_gpus),
    )


def input_size(side: int, num_train: int) -> tuple[int, str]:
    """Return the side of the network's input, pixels, and the reason.

    Args:
        side: Shorter side of the median image, pixels.
        num_train: Training images.
    """
    if side <= _SMALL_SIDE:
        return max(_SMALLEST_INPUT, -(-side // 8) * 8), f"the images' own {side}, up to the next multiple of 8"
    largest = _LEAST_STRIDED if num_train < _MEDIUM else 128 if num_train < _HUGE else 224
    size = max(_LEAST_STRIDED, min(largest, side // 32 * 32))
    if side < size:
        return size, "above 64 the network begins with a stride of 4, which is several times as fast"
    if size < largest:
        return size, f"the images' own {side}, down to a multiple of 32"
    return size, f"detail enough for {num_train:,} images; a larger one costs time by its square"


def batch_size(num_train: int) -> int:
    """Return the samples of a step: as many as leave 50 steps an epoch, 16 at least and 256 at most."""
    fitting = [size for size in _BATCHES if size * _LEAST_STEPS_PER_EPOCH <= num_train]
    return max(fitting, default=_BATCHES[0])


def epochs(num_train: int, batch: int) -> int:
    """Return the epochs that make about 3,000 steps, 30 at least and 60 at most."""
    shortest, longest = _EPOCHS
    return min(longest, max(shortest, round(_STEPS / -(-num_train // batch))))


def width(num_train: int, num_gpus: int) -> tuple[float, str]:
    """Return the factor on the network's channels, and the reason."""
    if not num_gpus:
        return 0.25, "a quarter of the channels, a sixteenth of the work: what CPU cores train in minutes to hours"
    if num_train < _MEDIUM:
        return 0.5, "half of the channels: more would only learn so few images by heart"
    return 1.0, "the published one; the cluster has GPUs"


def _model(found: Found, num_gpus: int) -> list[Choice]:
    size, why_size = input_size(found.side, found.num_train)
    factor, why_width = width(found.num_train, num_gpus)
    binary_inputs = found.num_train >= _LARGE and num_gpus > 0
    colour = "all images are grey" if found.channels == 1 else "there are colour images"
    if binary_inputs:
        name, why = (
            "resnetfbin18",
            "weights and inputs binary: enough images to learn that, and bit operations are fast",
        )
    else:
        name, why = "resnetwbin18", "weights binary, inputs real: nearly as accurate as float with few images or epochs"
    choices = [
        Choice("model.name", name, why),
        Choice("model.input_size", size, why_size),
        Choice("model.in_channels", found.channels, colour),
        Choice("model.width", factor, why_width),
    ]
    if binary_inputs:
        choices.append(
            Choice("model.block", "bireal", "a shortcut round each binary convolution keeps what signs lose")
        )
    return [
        *choices,
        Choice(
            "binarize.weights", "dab", "two values a filter; all layers but the first and the last, which are small"
        ),
    ]


def _data(found: Found, num_gpus: int) -> list[Choice]:
    batch = batch_size(found.num_train)
    steps = -(-found.num_train // batch)
    if found.channels == 1:
        transform, why = (
            "plain",
            "grey images may be characters, which a mirror changes; crop_flip if yours may be mirrored",
        )
    elif found.num_train < _HUGE or found.side <= _SMALL_SIDE:
        transform, why = "crop_flip", "shifted and mirrored at random; plain if a mirror image would be another class"
    else:
        transform, why = "imagenet", "any part of a photograph, mirrored at random: the strongest, for many images"
    loaders = 4 if num_gpus else 0
    return [
        Choice("data.batch_size", batch, f"{steps:,} steps an epoch"),
        Choice("data.eval_batch_size", 128),
        Choice("data.num_loaders", loaders, "keep a GPU busy" if num_gpus else "the worker reads its images itself"),
        Choice("data.transform", transform, why),
    ]


def _training(found: Found, num_gpus: int) -> list[Choice]:
    batch = batch_size(found.num_train)
    passes = epochs(found.num_train, batch)
    steps = passes * -(-found.num_train // batch)
    return [
        Choice("optim.name", "adam", "its steps do not depend on the scale of a binary filter"),
        Choice("optim.max_lr", _RATE, "better than 2e-3 where both were tried; the search tries 1e-4 to 1e-2"),
        Choice("optim.min_lr", 0.0),
        Choice("schedule.name", "one_cycle", "rises first, then falls to 0: most accurate in few epochs"),
        Choice("train.epochs", passes, f"about {steps:,} steps; binary networks improve late"),
        Choice("cluster.num_workers", 1, "so that trials of a search run side by side; more train one run faster"),
        Choice("cluster.gpus_per_worker", min(1, num_gpus), "" if num_gpus else "1 on a cluster with GPUs"),
    ]


def _search(found: Found, num_gpus: int) -> list[Choice]:
    factor, _ = width(found.num_train, num_gpus)
    return [
        Choice(
            "search.preset", "quick", "the range of binary layers and the rate: 8 trials of a quarter of the epochs"
        ),
        Choice("search.space.model.width", {"choice": [factor / 2, factor]}, "a narrow network is smaller still"),
        Choice(
            "search.objectives",
            [{"metric": "val_top1", "mode": "max"}, {"metric": "packed_bytes", "mode": "min"}],
            "a Pareto front: how accurate at how many bytes",
        ),
    ]


def to_text(found: Found, choices: tuple[Choice, ...], folder: str, file: str) -> str:
    """Return the choices as a YAML file with their reasons.

    Args:
        found: What lies in the folder.
        choices: What `choose` returned.
        folder: The folder, as the user wrote it.
        file: The name that the file will have.
    """
    head = [f"# {one_line(line)}" for line in (*str(found).splitlines(), *found.notes)]
    folder, file = one_line(folder), one_line(file)
    fraction = f" --val-fraction {found.val_fraction:g}" if found.val_fraction else ""
    shards = f"shards/{found.name}"
    head += [
        "#",
        f"#   dab submit {file} --images {folder}            builds the data set where it is missing, and trains",
        f"#   dab submit {file} --images {folder} --sweep    tries the section `search` instead",
        "",
    ]
    built = f"what --images puts in its place, or: dab data build {folder} {shards}{fraction}"
    where = next(place for place, choice in enumerate(choices) if choice.key.startswith("data."))
    lines: list[str] = []
    section: list[str] = []
    for choice in (*choices[:where], Choice("data.train", shards, built), *choices[where:]):
        *parents, leaf = _path(choice.key)
        for depth, parent in enumerate(parents):
            if section[: depth + 1] != parents[: depth + 1]:
                lines.append(f"{'  ' * depth}{parent}:")
        section = parents
        comment = f"  # {choice.reason}" if choice.reason else ""
        lines.append(f"{'  ' * len(parents)}{leaf}: {flow(choice.value)}{comment}")
    return "\n".join([*head, *lines, ""])


def _path(key: str) -> list[str]:
    """Return the keys of the file, of which the last of a search space has dots itself."""
    space = "search.space."
    return ["search", "space", key.removeprefix(space)] if key.startswith(space) else key.split(".")


def flow(value: Any) -> str:
    """Return a value as YAML in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(flow(item) for item in value) + "]"
    if isinstance(value, str) and _PLAIN_TEXT.fullmatch(value) and value.lower() not in _WORDS:
        return value
    return json.dumps(value, ensure_ascii=False)
