"""One contender of `data.py` in a process of its own: our stream, or a peer as its manual has it.

Started by `data_turns.py`; commands and answers are lines of JSON. Every contender delivers shuffled batches of float32
images and labels with 2 loader processes that stay, the last smaller batch dropped, memory not pinned, torch's own
start method, one thread a loader, and its library's own sizes of buffers and chunks. Peers augment with torchvision's
v2 transforms, image by image in the loaders. There are two ways for them to decode a JPEG: with Pillow, as most manuals
do, and with torchvision into tensors (`_tensors`), which is faster for small images; litdata does that of its own
accord. Sketches need a bicubic rotation, which torchvision has for Pillow's images only.
"""

import json
import os
import sys
import time

STARTED = time.time()

import importlib  # noqa: E402
import io  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from dataclasses import asdict, dataclass  # noqa: E402
from functools import partial  # noqa: E402
from itertools import chain, count, islice  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

    Epoch = Iterator[tuple[Tensor, Tensor]]
    Decode = Callable[[bytes], Tensor]

BATCH = 128
NUM_LOADERS = 2
_UNTIMED = 8  # batches; twice what torch's loaders read ahead
_TORCH = ["torch", "torchvision.transforms.v2", "torchvision.datasets"]
# What a training script would have imported before it opens its data.
_MODULES = {
    "dab": ["torch", "dabnn.data.stream"],
    "imagefolder": _TORCH,
    "webdataset": [*_TORCH, "webdataset"],
    "mosaicml": [*_TORCH, "streaming"],
    "litdata": [*_TORCH, "litdata"],
}


@dataclass(frozen=True)
class Task:
    """What every contender has to deliver.

    Attributes:
        transform: Name of our transform; the peers' are built from it.
        size: Height and width of an image of a batch.
        channels: 1 or 3.
        mean: Per channel, that is subtracted.
        std: Per channel, that is divided by.
        num_images: Training images.
        extension: Of the image files.
    """

    transform: str
    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_images: int
    extension: str


def open_dab(root: Path, task: Task, *, decoded: bool) -> Callable[[int], "Epoch"]:
    """Our stream."""
    from dabnn.data import open_stream
    from dabnn.data.shard_cache import ShardCache
    from dabnn.data.transforms import make_transform

    transform = make_transform(
        task.transform, input_size=task.size, in_channels=task.channels, mean=task.mean, std=task.std, training=True
    )
    stream = open_stream(
        root / "shards",
        "train",
        batch_size=BATCH,
        num_loaders=NUM_LOADERS,
        transform=transform,
        remainder="drop",
        cache=ShardCache(root / "cache" / "shards"),
        decoded_bytes=2**32 if decoded else 0,
    )
    return lambda number: ((batch.images, batch.labels) for batch in stream.epoch(number))


def open_imagefolder(root: Path, task: Task, *, tensors: bool) -> Callable[[int], "Epoch"]:
    """Torchvision's folder of images with torch's loader."""
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import pil_loader
    from torchvision.io import decode_image

    kept = {"transform": _augmentation(task, tensors=tensors)}
    if tensors:
        dataset = ImageFolder(str(root / "folder/train"), loader=partial(decode_image, mode="RGB"), **kept)
    else:
        loader = pil_loader if task.channels == 3 else _gray_loader
        dataset = ImageFolder(str(root / "folder/train"), loader=loader, **kept)
    batches = DataLoader(dataset, BATCH, shuffle=True, **_loader_options(), drop_last=True)
    return lambda _: iter(batches)


def open_webdataset(root: Path, task: Task, *, tensors: bool) -> Callable[[int], "Epoch"]:
    """Plain webdataset on our shards: these mixed, then samples in a buffer of 1,000."""
    import webdataset

    urls = sorted(str(path) for path in (root / "shards").glob("train-*.tar"))
    decode = _decode(task, tensors=tensors)
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=100)
        .shuffle(1000)
        .to_tuple(task.extension, "cls")
        .map_tuple(decode, int)
        .batched(BATCH, partial=False)
    )
    batches = webdataset.WebLoader(dataset, batch_size=None, **_loader_options())
    return lambda _: iter(batches)


def open_mosaicml(root: Path, task: Task, *, tensors: bool) -> Callable[[int], "Epoch"]:
    """mosaicml-streaming, with samples prepared as `StreamingVision` does."""
    from streaming import StreamingDataLoader, StreamingDataset

    decode = _decode(task, tensors=tensors)

    class Images(StreamingDataset):
        def __getitem__(self, index: int) -> tuple["Tensor", int]:
            sample = super().__getitem__(index)
            return decode(sample["image"]), sample["label"]

    dataset = Images(local=str(root / "mds"), shuffle=True, batch_size=BATCH)
    batches = StreamingDataLoader(dataset, batch_size=BATCH, **_loader_options(), drop_last=True)
    return lambda _: iter(batches)


def open_litdata(root: Path, task: Task) -> Callable[[int], "Epoch"]:
    """LitData: JPEG files become tensors in RGB by themselves, others are stored as bytes."""
    from litdata import StreamingDataLoader, StreamingDataset

    is_decoded = task.extension == "jpg"
    prepare = _augmentation(task, tensors=True) if is_decoded else _decode(task, tensors=False)

    class Images(StreamingDataset):
        def __getitem__(self, index: Any) -> tuple["Tensor", int]:
            sample = super().__getitem__(index)
            return prepare(sample["image"]), sample["label"]

    dataset = Images(str(root / "litdata"), shuffle=True, drop_last=True)
    batches = StreamingDataLoader(dataset, batch_size=BATCH, **_loader_options(), drop_last=True)
    return lambda _: iter(batches)


OPEN: dict[str, Callable[[Path, Task], Callable[[int], "Epoch"]]] = {
    "dab": partial(open_dab, decoded=False),
    "dab_decoded": partial(open_dab, decoded=True),
    "imagefolder": partial(open_imagefolder, tensors=False),
    "imagefolder_tensors": partial(open_imagefolder, tensors=True),
    "webdataset": partial(open_webdataset, tensors=False),
    "webdataset_tensors": partial(open_webdataset, tensors=True),
    "mosaicml": partial(open_mosaicml, tensors=False),
    "mosaicml_tensors": partial(open_mosaicml, tensors=True),
    "litdata": open_litdata,
}


def _loader_options() -> dict[str, Any]:
    return {"num_workers": NUM_LOADERS, "persistent_workers": True}


def _augmentation(task: Task, *, tensors: bool) -> Callable[[Any], "Tensor"]:
    """Returns torchvision's transforms with the pixels of ours, see `dabnn.data.transforms`."""
    import torch
    from torchvision.transforms import v2

    if task.transform == "crop_flip":
        steps = [v2.RandomCrop(task.size, padding=task.size // 8), v2.RandomHorizontalFlip()]
    else:
        steps = [
            v2.Resize(256),
            v2.RandomResizedCrop(task.size, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)),
            v2.RandomHorizontalFlip(),
            v2.RandomRotation(10, interpolation=v2.InterpolationMode.BICUBIC, fill=255),
        ]
    steps += [] if tensors else [v2.PILToTensor()]
    steps += [v2.RandomInvert(p=1.0)] if task.transform == "sketch" else []
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(task.mean, task.std)])


def _decode(task: Task, *, tensors: bool) -> "Decode":
    """Returns what turns the bytes of an image file into an augmented tensor."""
    import torch
    from PIL import Image
    from torchvision.io import ImageReadMode, decode_image

    augment = _augmentation(task, tensors=tensors)
    mode = "RGB" if task.channels == 3 else "L"

    def by_pillow(data: bytes) -> "Tensor":
        return augment(Image.open(io.BytesIO(data)).convert(mode))

    def by_torchvision(data: bytes) -> "Tensor":
        return augment(decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB))

    return by_torchvision if tensors else by_pillow


def _gray_loader(path: str) -> Any:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("L")


def _read(batches: "Epoch", num_batches: int | None = None) -> int:
    """Reads some batches, or all, and returns how many images they hold."""
    num_images = 0
    for images, labels in islice(batches, num_batches):
        num_images += len(images)
        float(images[-1, -1, -1, -1]), int(labels[-1])
    return num_images


def _run_turn(batches: "Epoch", num_batches: int) -> dict[str, Any]:
    """Times batches after some more, so that those which were read ahead before the turn are not among them."""
    num_before = _read(batches, _UNTIMED)
    start = time.perf_counter()
    num_images = _read(batches, num_batches)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "images": num_images, "all_images": num_before + num_images}


def _inspect_epoch(batches: "Epoch") -> dict[str, Any]:
    """Returns what says whether the batches are what they have to be."""
    import torch

    shapes: set[str] = set()
    sums, labels_seen = [], []
    for images, labels in batches:
        shapes.add(f"{images.dtype} {tuple(images.shape)} {len(labels)}")
        sums.append((float(images.mean()), float(images.square().mean())))
        labels_seen.append(torch.as_tensor(labels))
    mean, square = (sum(column) / len(sums) for column in zip(*sums, strict=True))
    counts = torch.bincount(torch.cat(labels_seen)).tolist()
    std = (square - mean**2) ** 0.5
    return {"images": sum(counts), "shapes": sorted(shapes), "mean": mean, "std": std, "labels": counts}


def main() -> None:
    """Opens the contender and answers commands until there are no more."""
    # Libraries print what they like, so the answers go where standard output was.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    name, root, task = sys.argv[1], Path(sys.argv[2]), Task(**json.loads(sys.argv[3]))
    start = time.perf_counter()
    for module in _MODULES[name.removesuffix("_tensors").removesuffix("_decoded")]:
        importlib.import_module(module)
    imported = time.perf_counter()
    epoch = OPEN[name](root, task)
    first = next(batches := epoch(0))
    ready = time.perf_counter()
    say({"started": STARTED, "import_s": imported - start, "first_batch_s": ready - imported, "shape": first[0].shape})
    epochs = chain([chain([first], batches)], (epoch(number) for number in count(1)))
    running = chain.from_iterable(epochs)
    for line in sys.stdin:
        command, *number = line.split()
        if command == "turn":
            say(_run_turn(running, int(number[0])))
        else:
            say(_inspect_epoch(next(epochs)) if command == "inspect" else {"images": _read(next(epochs))})


def as_argument(task: Task) -> str:
    """Returns a task as the argument of this program."""
    return json.dumps(asdict(task))


if __name__ == "__main__":
    main()
