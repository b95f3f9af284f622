"""The load of rank 0's machine while it trains, sampled into `system.jsonl`; the metrics' follower sends it to MLflow.

MLflow's own sampler is not used: it asks the server in the process that trains, and ends for good when there is no
answer. Nothing here ends a run or is waited for. What is in a sample: `orchestrator.machine_load`.
"""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from dabnn.run_folder import RunFolder
from dabnn.run_mirror import work_folder
from orchestrator.machine_load import sampler

_MAX_PER_DOUBLING = 360  # so that a week is 2,500 lines: behind a URL the whole file is sent each time

_log = logging.getLogger(__name__)


@contextmanager
def sampling(folder: RunFolder, interval_s: float) -> Iterator[None]:
    """Within the block a thread leaves a sample in the run's folder every `interval_s` seconds, 0 for none.

    After the first 360 samples of a run the interval grows with the run's age.
    """
    over = threading.Event()
    if interval_s:
        place = work_folder(folder)
        threading.Thread(target=_keep, args=(place, interval_s, over), name="system-metrics", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def pause_s(interval_s: float, age_s: float) -> float:
    """Return how long to wait for the next sample of a run that began `age_s` seconds ago."""
    return max(interval_s, age_s / _MAX_PER_DOUBLING)


def _keep(place: RunFolder, interval_s: float, over: threading.Event) -> None:
    try:
        sample, age_s = sampler(), 0.0
        while not over.wait(pause_s(interval_s, age_s)):
            attempts = place.attempts()
            if attempts:  # before, there is no folder to write to
                age_s = time.time() - attempts[0]["time"]
                place.append_system(round(age_s), sample())
    except (OSError, ValueError, KeyError) as error:
        _log.warning("%s: the load of the machine is recorded no more (%s)", place.location, error)
