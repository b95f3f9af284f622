import pytest
from ray._private.thirdparty import pynvml

from orchestrator.machine_load import sampler


def test_a_sample_has_the_names_that_mlflow_shows() -> None:
    found = sampler()()
    assert all(name.startswith("system/") for name in found)
    assert 0 < found["system/system_memory_usage_percentage"] <= 100
    assert found["system/network_receive_megabytes"] >= 0


class Driver:
    """A driver that tells of memory and nothing else, as a slice of a GPU does."""

    def __call__(self) -> None:
        pass

    def memory(self, device: object) -> object:
        return type("Memory", (), {"used": 5_000_000, "total": 10_000_000})

    def refusal(self, device: object) -> object:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


def test_a_gpu_that_does_not_tell_all_tells_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(pynvml, "nvmlInit", driver)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 1)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: object())
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", driver.memory)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", driver.refusal)
    found = sampler()()
    assert found["system/gpu_0_memory_usage_percentage"] == 50
    assert "system/gpu_0_utilization_percentage" not in found
