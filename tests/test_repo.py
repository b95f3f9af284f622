"""What the repository promises about itself: documents, pins, Make targets, nothing of one machine in tracked files."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TARGETS = ("setup", "demo", "test", "test-all", "chaos", "check", "gpu", "bench", "lock", "clean")
ONE_MACHINE_ONLY = {
    "a path of one machine": re.compile(r"(?<![\w.~-])/(?:home|root|work|Users)/\w"),
    "a package index": re.compile(
        r"pypi\.org|pythonhosted\.org|download\.pytorch\.org|--(?:(?:extra-)?index-url|find-links)"
    ),
    "a package address": re.compile(r"https?://\S+\.(?:whl|tar\.gz)"),
}


def tracked_texts() -> dict[str, str]:
    """Return the text of every tracked file that is text."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    contents = {name: (ROOT / name).read_bytes() for name in listed.stdout.split("\0") if (ROOT / name).is_file()}
    return {name: data.decode() for name, data in contents.items() if b"\0" not in data}


def requirement_names(lines: list[str]) -> set[str]:
    """Return the normalized package names of requirement lines, extras and markers left out."""
    stripped = [line.strip() for line in lines if re.match(r"\s*[A-Za-z]", line)]
    return {re.split(r"[^\w.-]", line)[0].lower().replace("_", "-") for line in stripped}


def lock_lines() -> list[str]:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.strip().startswith("#")]


def test_readme_is_short_and_shows_a_command_early() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert any(re.match(r"\s*(?:\$ )?(?:make|(?:\.venv/bin/)?dab) \w", line) for line in lines[:29])


@pytest.mark.parametrize("name", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"])
def test_document_is_there(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8").strip()


def test_licence_is_mit() -> None:
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("MIT License")


def test_changelog_has_an_unreleased_part() -> None:
    assert re.search(r"^## \[Unreleased\]$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("what", ONE_MACHINE_ONLY)
def test_tracked_files_hold_nothing_of_one_machine(what: str) -> None:
    pattern = ONE_MACHINE_ONLY[what]
    found = {name: match[0] for name, text in tracked_texts().items() if (match := pattern.search(text))}
    assert found == {}


def test_lock_pins_every_package_exactly() -> None:
    assert [line for line in lock_lines() if not re.fullmatch(r"[a-z0-9._-]+==[\w.+!]+(?: ; .+)?", line)] == []


def test_lock_holds_every_direct_requirement_at_its_pin() -> None:
    direct = (ROOT / "requirements.in").read_text(encoding="utf-8").splitlines()
    pins = {line.split(" ;")[0] for line in lock_lines()}
    wanted = {re.sub(r"\[.*\]", "", line.split(" ;")[0]) for line in direct if re.match(r"[A-Za-z]", line)}
    assert wanted - pins == set(), "run `make lock`"


def test_lock_holds_every_dependency_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    needed = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    assert requirement_names(needed) - requirement_names(lock_lines()) == set()


def test_every_package_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    rooms = ("dabnn", "jobs", "kernels", "orchestrator")
    files = [path for room in rooms for path in (ROOT / room).rglob("__init__.py")]
    packages = sorted(".".join(path.parent.relative_to(ROOT).parts) for path in files)
    assert sorted(project["tool"]["setuptools"]["packages"]) == packages


@pytest.mark.parametrize("target", TARGETS)
def test_make_target_is_there(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(rf"^{target}:.* ## \S", makefile, re.MULTILINE), "a target says what it does after ##"


def test_ci_runs_check_and_test_and_nothing_else() -> None:
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    commands = [line for line in lines if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["make check", "make test"]


def test_pytest_is_configured_with_its_own_options_only() -> None:
    """`make gpu` runs where no plugin is installed: an option of one would end the run under --strict-config."""
    options = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    assert set(options) <= {"testpaths", "addopts", "xfail_strict", "filterwarnings", "markers"}
