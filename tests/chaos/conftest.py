"""The lab, the run that nothing happens to, and the table of what faults cost."""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from lab import Lab
from machines import why_no_machines
from trial import Outcome, plain_run

from dabnn.run_folder import RunFolder

_OUTCOMES = pytest.StashKey[list[Outcome]]()


def pytest_configure(config: pytest.Config) -> None:
    """Begin an empty table."""
    config.stash[_OUTCOMES] = []


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """The cluster, in a folder with a short path, for Ray's sockets."""
    if reason := why_no_machines():
        pytest.skip(reason)
    with ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dab-", ignore_cleanup_errors=True)))
        yield stack.enter_context(Lab(base / "lab"))


@pytest.fixture(scope="session")
def data(lab: Lab) -> Path:
    """The digits, on the storage that all machines see."""
    from dabnn.data import build_dataset

    root = lab.shared / "digits"
    build_dataset("builtin:digits", root)
    return root


@pytest.fixture(scope="session")
def undisturbed(lab: Lab, data: Path) -> RunFolder:
    """The same run under plain torchrun: what every disturbed one must come to."""
    return plain_run(lab, data, "undisturbed")


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Callable[[Outcome], None]:
    """Give what adds a row to the table."""
    return request.config.stash[_OUTCOMES].append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the table."""
    outcomes = config.stash[_OUTCOMES]
    if not outcomes:
        return
    terminalreporter.section("faults")
    for line in table([outcome.to_dict() for outcome in outcomes]):
        terminalreporter.write_line(line)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Keep the table of `make chaos`, rows of faults that were not tried this time included."""
    outcomes, place = session.config.stash[_OUTCOMES], os.environ.get("DAB_CHAOS_OUT")
    if not outcomes or not place:
        return
    file = Path(place) / "chaos.json"
    rows = {row["fault"]: row for row in json.loads(file.read_text())["faults"]} if file.exists() else {}
    rows |= {outcome.fault: outcome.to_dict() | {"date": time.strftime("%Y-%m-%d")} for outcome in outcomes}
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "cluster": "head and 2 nodes of 2 CPUs in namespaces of one machine",
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"machine": machine, "faults": list(rows.values())}, indent=1) + "\n")


def table(rows: list[dict[str, object]]) -> list[str]:
    """Return the table as lines of Markdown."""
    head = ["fault", "detected after", "recovered after", "steps lost", "attempts", "remark"]
    cells = [head, ["---"] * len(head)]
    for row in rows:
        times = ["-" if row[key] is None else f"{row[key]:.1f} s" for key in ("detected_after_s", "recovered_after_s")]
        cells.append([str(row["fault"]), *times, str(row["steps_lost"]), str(row["attempts"]), str(row["remark"])])
    return [f"| {' | '.join(line)} |" for line in cells]
