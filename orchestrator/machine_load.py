"""The load of this machine, under the names that MLflow shows on its page "System metrics", in their units.

A sample takes half a millisecond (2 cores of an AMD EPYC, without a GPU). NVIDIA's driver is asked through the bindings
that come with Ray. Leaves out when samples are taken and where they go.
"""

import os
from collections.abc import Callable
from typing import Any

import psutil

_PREFIX = "system/"
_MEGABYTE = 1e6


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
        }
        if before and network:  # None where there is no interface
            found["network_receive_megabytes"] = (network.bytes_recv - before.bytes_recv) / _MEGABYTE
            found["network_transmit_megabytes"] = (network.bytes_sent - before.bytes_sent) / _MEGABYTE
        for index, device in enumerate(devices):
            found |= {f"gpu_{index}_{name}": value for name, value in _of_device(device).items()}
        return {_PREFIX + name: round(value, 1) for name, value in found.items()}

    return sample


def _devices() -> list[Any]:
    """Return the GPUs of this machine, none where there is no driver."""
    from ray._private.thirdparty import pynvml

    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return []


def _of_device(device: Any) -> dict[str, float]:
    """Return the load of a GPU; a slice of one does not tell all of it."""
    from ray._private.thirdparty import pynvml

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
