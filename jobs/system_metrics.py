"""The load of rank 0's machine while it trains, sampled into `system.jsonl`; the metrics' follower sends it to MLflow.

Names and units are those of MLflow's own sampler, whose page "System metrics" shows them. That one is not used: it asks
the server in the process that trains, and ends for good when there is no answer. Nothing here ends a run or is waited
for; a sample takes half a millisecond (2 cores of an AMD EPYC, without a GPU).
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
from ray._private.thirdparty import pynvml

from dabnn.run_folder import RunFolder
from dabnn.run_mirror import work_folder

_PREFIX = "system/"
_MEGABYTE = 1e6
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
    except (OSError, ValueError, KeyError, psutil.Error) as error:
        _log.warning("%s: the load of the machine is recorded no more (%s)", place.location, error)


def sampler() -> Callable[[], dict[str, float]]:
    """Return what takes a sample: CPU and GPU since the sample before, network since this call."""
    psutil.cpu_percent()
    devices, before = _devices(), psutil.net_io_counters()

    def sample() -> dict[str, float]:
        memory, disk, network = psutil.virtual_memory(), psutil.disk_usage(os.sep), psutil.net_io_counters()
        found = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / _MEGABYTE,
            "system_memory_usage_percentage": 100 * memory.used / memory.total,
            "disk_usage_percentage": disk.percent,
            "disk_available_megabytes": disk.free / _MEGABYTE,
            "network_receive_megabytes": (network.bytes_recv - before.bytes_recv) / _MEGABYTE,
            "network_transmit_megabytes": (network.bytes_sent - before.bytes_sent) / _MEGABYTE,
        }
        for index, device in enumerate(devices):
            found |= {f"gpu_{index}_{name}": value for name, value in _of_device(device).items()}
        return {_PREFIX + name: round(value, 1) for name, value in found.items()}

    return sample


def _devices() -> list[Any]:
    """Return the GPUs of this machine, none where there is no driver."""
    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def _of_device(device: Any) -> dict[str, float]:
    """Return the load of a GPU; a slice of one does not tell all of it."""
    found: dict[str, float] = {}
    try:
        memory = pynvml.nvmlDeviceGetMemoryInfo(device)
        found["memory_usage_megabytes"] = memory.used / _MEGABYTE
        found["memory_usage_percentage"] = 100 * memory.used / memory.total
        found["utilization_percentage"] = pynvml.nvmlDeviceGetUtilizationRates(device).gpu
        found["power_usage_watts"] = pynvml.nvmlDeviceGetPowerUsage(device) / 1000
    except pynvml.NVMLError:
        pass
    return found
