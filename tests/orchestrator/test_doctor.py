"""What the doctor concludes from what it finds; `tests/test_cli.py` runs it on this machine."""

from pathlib import Path

import pytest

from dabnn.machine import Device, Devices, compiled_folders, is_writable, triton_folder
from orchestrator.doctor import (
    Check,
    installed,
    judge_compiled,
    judge_devices,
    judge_free,
    judge_gpu_kernels,
    judge_packages,
    judge_python,
    judge_server,
)

H200 = Device("NVIDIA H200", (9, 0), 141 * 2**30)


def verdict(check: Check) -> str:
    """Return the status of a check, after a look whether it says what to do where something is to be done."""
    assert check.detail
    assert bool(check.advice) or check.status != "problem"
    return check.status


@pytest.mark.parametrize(("found", "status"), [((3, 10, 9), "problem"), ((3, 11, 0), "ok"), ((4, 0, 0), "ok")])
def test_an_old_python_is_a_problem(found, status):
    assert verdict(judge_python(found)) == status


@pytest.mark.parametrize(
    ("found", "status", "detail"),
    [
        ({"torch": "2.13.0", "ray": "2.60.0"}, "ok", "2 packages"),
        ({"torch": "2.13.0+cu130", "ray": "2.60.0"}, "ok", "2 packages"),
        ({"torch": "2.11.0", "ray": "2.60.0"}, "warning", "torch 2.11.0 (tested: 2.13.0)"),
        ({"torch": "2.11.0", "ray": None}, "problem", "not installed: ray"),
    ],
)
def test_missing_packages_are_a_problem_and_other_versions_a_warning(found, status, detail):
    check = judge_packages({"torch": "2.13.0", "ray": "2.60.0"}, found)
    assert verdict(check) == status
    assert detail in check.detail


def test_packages_for_development_are_not_asked_for():
    wanted, found = installed()
    assert {"torch", "ray", "mlflow", "numba"} <= wanted.keys() == found.keys()
    assert "pytest" not in wanted


@pytest.mark.parametrize(
    ("devices", "status"),
    [
        (Devices("13.0", has_driver=False, found=(), complaint=""), "ok"),
        (Devices("13.0", has_driver=True, found=(H200,), complaint=""), "ok"),
        (Devices(None, has_driver=True, found=(), complaint=""), "warning"),
        (Devices("13.0", has_driver=True, found=(), complaint="The driver is too old."), "problem"),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_not_passed_over(devices, status):
    check = judge_devices(devices)
    assert verdict(check) == status
    assert devices.complaint.rstrip(".") in check.detail


@pytest.mark.parametrize(("path", "status"), [("tensor_core", "ok"), ("popcount", "warning"), ("dense", "warning")])
def test_a_gpu_on_which_float_may_win_is_a_warning(path, status):
    check = judge_gpu_kernels("NVIDIA H200", path, "of its capability")
    assert verdict(check) == status
    assert check.detail == f"NVIDIA H200: {path}, since of its capability"


@pytest.mark.parametrize(("free", "status"), [(10, "ok"), (9, "warning"), (2, "warning"), (1, "problem")])
def test_little_space_is_a_warning_and_next_to_none_a_problem(free, status):
    assert verdict(judge_free("store", free, 10, 2, "there", "Free some.")) == status


def test_compiled_kernels_go_to_the_first_folder_that_takes_them():
    folders = [Path("a"), Path("b")]
    assert judge_compiled("Numba", "X", folders, lambda folder: folder.name == "b").detail.endswith("in b")
    check = judge_compiled("Numba", "NUMBA_CACHE_DIR", folders, lambda _: False)
    assert verdict(check) == "problem"
    assert "NUMBA_CACHE_DIR" in check.advice


def test_the_folders_of_compiled_kernels_are_those_of_the_environment(tmp_path):
    assert compiled_folders({"NUMBA_CACHE_DIR": str(tmp_path)}) == (tmp_path,)
    assert compiled_folders({"XDG_CACHE_HOME": str(tmp_path)})[1] == tmp_path / "numba"
    assert triton_folder({"TRITON_HOME": str(tmp_path)}) == tmp_path / ".triton" / "cache"
    assert triton_folder({"TRITON_CACHE_DIR": str(tmp_path)}) == tmp_path


def test_a_folder_below_a_file_cannot_be_written_to(tmp_path):
    assert is_writable(tmp_path / "new" / "deep")
    (tmp_path / "file").touch()
    assert not is_writable(tmp_path / "file" / "deep")


@pytest.mark.parametrize(("state", "status"), [("running", "ok"), ("stopped", "ok"), ("silent", "problem")])
def test_a_server_that_does_not_answer_is_a_problem_and_one_that_is_not_needed_is_none(state, status):
    assert verdict(judge_server("cluster", state, "4 CPUs", "`dab submit`")) == status
