import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from orchestrator import provenance as module
from orchestrator.provenance import PROGRAM_ROOT, provenance


def test_it_names_python_and_the_packages_that_decide_a_result() -> None:
    tags = provenance()
    assert tags["dab.version.torch"] == version("torch")
    assert tags["dab.version.ray"] == version("ray")
    assert tags["dab.python"].startswith("3.")


def test_it_names_the_commit_and_whether_the_sources_were_changed_since(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    (tmp_path / "file").write_text("1")
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *arguments], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    monkeypatch.setattr(module, "PROGRAM_ROOT", tmp_path)
    clean = provenance()
    assert (clean["dab.git_commit"], clean["mlflow.source.git.commit"]) == (commit, commit)
    assert clean["dab.git_dirty"] == "false"
    (tmp_path / "file").write_text("2")
    assert provenance()["dab.git_dirty"] == "true"


def test_a_copy_without_history_is_of_an_unknown_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROGRAM_ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    tags = provenance()
    assert tags["dab.git_commit"] == "unknown"
    assert "dab.git_dirty" not in tags


def test_the_root_of_the_program_is_where_its_rooms_lie() -> None:
    assert (PROGRAM_ROOT / "orchestrator" / "provenance.py").exists()
    assert (PROGRAM_ROOT / "cli.py").exists()
