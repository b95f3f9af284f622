"""Contenders of `data.py` in processes of their own, that take turns, are checked first, and are measured.

The others wait while one has its turn, so that a busy machine slows all alike; figures are medians over turns, ratios
those of the same turn.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from data_contender import BATCH, NUM_LOADERS, Task, as_argument

OURS, DECODED, REFERENCE = "dab", "dab_decoded", "imagefolder"
_SECONDS_BETWEEN_SAMPLES = 0.5


class Contender:
    """A running `data_contender.py`.

    Args:
        name: Which.
        root: Folder with the data set in all formats.
        task: What is delivered.
    """

    def __init__(self, name: str, root: Path, task: Task) -> None:
        self.name = name
        began = time.time()
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("data_contender.py")), name, str(root), as_argument(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.start = self._answer()
        self.start["process_s"] = self.start.pop("started") - began

    def turn(self, num_batches: int) -> dict[str, float]:
        """Goes on reading; returns images and seconds, and all images and the processor seconds of all processes."""
        before = self._cpu_seconds()
        answer = self._ask(f"turn {num_batches}")
        return {**answer, "cpu_s": self._cpu_seconds() - before}

    def epoch(self) -> int:
        """Reads an epoch and returns the number of its images; for contenders that have no turns."""
        images: int = self._ask("epoch")["images"]
        return images

    def inspect(self) -> dict[str, Any]:
        """Reads an epoch; returns the shapes of its batches, mean and deviation of the pixels, images of each class."""
        return self._ask("inspect")

    def processes(self) -> list[psutil.Process]:
        """Returns the contender's process and all that it started."""
        main = psutil.Process(self._process.pid)
        return [main, *main.children(recursive=True)]

    def close(self) -> None:
        """Ends the process and those that it started."""
        started = self.processes() if self._process.poll() is None else []
        self._process.communicate()
        for process in psutil.wait_procs(started, timeout=10)[1]:
            process.kill()

    def _ask(self, command: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: ended with code {self._process.wait()}; see its message above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _cpu_seconds(self) -> float:
        times = [process.cpu_times() for process in self.processes()]
        return sum(found.user + found.system for found in times)


def refuse_if_wrong(found: dict[str, dict[str, Any]], task: Task) -> None:
    """Raises RuntimeError unless the contenders deliver the same images in batches of the same shape.

    Args:
        found: What `Contender.inspect` returned, by name, with that of `imagefolder`.
        task: What has to be delivered.
    """
    shape = f"torch.float32 {(BATCH, task.channels, task.size, task.size)} {BATCH}"
    # Each loader may drop a batch that is not full.
    most_missing = BATCH * NUM_LOADERS
    reference = found[REFERENCE]
    tolerance = 3 / task.num_images**0.5
    for name, one in found.items():
        if one["shapes"] != [shape]:
            raise RuntimeError(f"{name}: batches {one['shapes']} instead of {shape}, so it is not timed")
        if not task.num_images - most_missing <= one["images"] <= task.num_images:
            raise RuntimeError(f"{name}: {one['images']} images of {task.num_images} an epoch, so it is not timed")
        for value in ("mean", "std"):
            if abs(one[value] - reference[value]) > tolerance:
                raise RuntimeError(f"{name}: {value} {one[value]} of the pixels, {reference[value]} in {REFERENCE}")
        difference = sum(abs(a - b) for a, b in zip(one["labels"], reference["labels"], strict=True))
        if difference > 2 * most_missing:
            raise RuntimeError(f"{name}: {difference} labels differ from those of {REFERENCE}, so it is not timed")


@contextmanager
def contenders(names: Sequence[str], root: Path, task: Task) -> Iterator[dict[str, Contender]]:
    """Opens contenders that were checked and have read an epoch by then."""
    with ExitStack() as stack:
        opened = {}
        for name in names:
            opened[name] = Contender(name, root, task)
            stack.callback(opened[name].close)
        refuse_if_wrong({name: contender.inspect() for name, contender in opened.items()}, task)
        if DECODED in opened:
            # An epoch leaves out the samples after its last full batch; by now each has been decoded.
            opened[DECODED].epoch()
            opened[DECODED].epoch()
        yield opened


def compare_rates(names: Sequence[str], root: Path, task: Task, turns: int, num_batches: int) -> list[dict[str, Any]]:
    """Returns a row for each contender: images a second, and how many times as fast ours is, plain and decoded."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with contenders(names, root, task) as opened:
        for turn in range(turns):
            for position in range(len(names)):
                name = names[(position + turn) % len(names)]
                runs[name].append(opened[name].turn(num_batches))
            print(f"turn {turn + 1}:", {name: round(_rate(done[-1])) for name, done in runs.items()}, flush=True)
    return [_row(name, runs) for name in names]


def _rate(run: dict[str, float]) -> float:
    return run["images"] / run["seconds"]


def _cpu_rate(run: dict[str, float]) -> float:
    return run["all_images"] / run["cpu_s"]


def _row(name: str, runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    own = runs[name]
    rates = sorted(_rate(run) for run in own)
    row: dict[str, Any] = {
        "contender": name,
        "images_per_s": median(rates),
        "low": rates[len(rates) // 4],
        "high": rates[-1 - len(rates) // 4],
        "images_per_cpu_s": median(_cpu_rate(run) for run in own),
    }
    for ours in (OURS, DECODED):
        pairs = list(zip(runs.get(ours, []), own, strict=False))
        row[f"{ours}_times"] = median(_rate(a) / _rate(b) for a, b in pairs) if pairs else None
        row[f"{ours}_times_cpu"] = median(_cpu_rate(a) / _cpu_rate(b) for a, b in pairs) if pairs else None
    return row


def compare_starts(names: Sequence[str], root: Path, task: Task, turns: int) -> list[dict[str, Any]]:
    """Returns a row for each contender: seconds of a new process until its first batch, in three parts."""
    starts: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    expected = [BATCH, task.channels, task.size, task.size]
    for _ in range(turns):
        for name in names:
            contender = Contender(name, root, task)
            contender.close()
            if contender.start["shape"] != expected:
                raise RuntimeError(f"{name}: a first batch of {contender.start['shape']}, so it is not timed")
            starts[name].append(contender.start)
    return [
        {
            "contender": name,
            "process_s": median(start["process_s"] for start in found),
            "import_s": median(start["import_s"] for start in found),
            "first_batch_s": median(start["first_batch_s"] for start in found),
            "first_batch_high_s": max(start["first_batch_s"] for start in found),
        }
        for name, found in starts.items()
    ]


def memory_curve(name: str, root: Path, task: Task, epochs: int) -> list[dict[str, Any]]:
    """Returns a row for each epoch with the memory of all of a contender's processes.

    The resident sizes count what processes share once for each (`rss_mb`); the proportional ones count it once
    (`pss_mb`), of which `anonymous_mb` is no file's. Medians over samples of an epoch; `peak_mb` is its highest `pss`.
    """
    contender = Contender(name, root, task)
    rows = []
    try:
        for number in range(epochs):
            with _sampled(contender) as samples:
                images = contender.epoch()
            rss, pss, anonymous = ([sample[part] for sample in samples] for part in range(3))
            middle = {"rss_mb": median(rss), "pss_mb": median(pss), "anonymous_mb": median(anonymous)}
            rows.append({"contender": name, "epoch": number + 1, "images": images, **middle, "peak_mb": max(pss)})
    finally:
        contender.close()
    return rows


@contextmanager
def _sampled(contender: Contender) -> Iterator[list[tuple[float, float, float]]]:
    samples = []
    done = threading.Event()

    def watch() -> None:
        while True:
            samples.append(_memory_mb(contender.processes()))
            if done.wait(_SECONDS_BETWEEN_SAMPLES):
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


def _memory_mb(processes: Sequence[psutil.Process]) -> tuple[float, float, float]:
    totals = {"Rss": 0, "Pss": 0, "Pss_Anon": 0}
    for process in processes:
        try:
            text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        for line in text.splitlines()[1:]:
            field, value = line.split(":")
            if field in totals:
                totals[field] += int(value.split()[0])
    rss, pss, anonymous = (total / 1024 for total in totals.values())
    return rss, pss, anonymous
