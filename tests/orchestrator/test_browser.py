"""The experiment browser in a real Chromium, over a real server with a sweep that was recorded as real ones are.

Pictures of what is shown go into the folder that DAB_SCREENSHOTS names.
"""

import json
import os
import sys
import tempfile
import zlib
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tracked_sweep import track_sweep

import cli
from orchestrator import browser, browser_view, tracking
from orchestrator.browser import has_desktop
from orchestrator.sweep_record import Aim

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import screenshots

NUM_TRIALS = 12
ON_A_DESKTOP = {"DISPLAY": ":0"}
needs_chromium = pytest.mark.skipif(
    screenshots.CHROMIUM is None, reason="needs Chromium (Debian: apt install chromium)"
)


@dataclass
class Store:
    uri: str
    sweep_id: str


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with tempfile.TemporaryDirectory(prefix="dab-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("DAB_HOME", folder)
        uri = tracking.ensure_tracking()
        yield Store(uri, track_sweep(uri, Path(folder) / "digits-sweep", NUM_TRIALS))
        tracking.tracking_down()


@pytest.fixture(autouse=True)
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses that the web browser of the desktop was asked to open."""
    asked: list[str] = []
    monkeypatch.setattr(browser.webbrowser, "open", lambda url: bool(asked.append(url)) or True)
    return asked


def ui(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    capsys.readouterr()
    code = cli.run(["ui", *arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def keep(page: Any, name: str) -> None:
    if folder := os.environ.get("DAB_SCREENSHOTS"):
        screenshots.take(page, Path(folder) / f"{name}.png")


@needs_chromium
def test_a_sweep_is_looked_at_from_the_list_of_runs_to_the_page_of_a_trial(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    code, whole = ui(capsys)
    _, sweep = ui(capsys, "digits-sweep")
    assert code == 0
    complaints: list[str] = []
    with screenshots.chromium() as chromium:
        page = screenshots.new_page(chromium, complaints)
        assert screenshots.show_table(page, whole["url"]) == ["digits-sweep"]
        assert page.get_by_test_id("saved-views-trigger").inner_text() == "Newest runs"
        screenshots.expand_all(page)
        page.get_by_text("digits-sweep-t11").wait_for()
        names = screenshots.names_in(page)
        assert names[0] == "digits-sweep"
        assert sorted(names[1:]) == [f"digits-sweep-t{number:02d}" for number in range(NUM_TRIALS)]
        keep(page, "experiment")

        page = screenshots.new_page(chromium, complaints)
        trials = screenshots.show_table(page, sweep["url"])
        values = {
            trial.name: trial.metrics["val_top1"] for trial in tracking.find_runs(store.uri, parent=store.sweep_id)
        }
        assert trials == sorted(values, key=lambda name: -values[name])
        shown = ["val_top1", "packed_bytes", "bit_ops", "binarize.bin_start", "binarize.bin_end", "optim.max_lr"]
        assert screenshots.headings(page)[:6] == shown
        keep(page, "sweep")

        page = screenshots.new_page(chromium, complaints)
        assert screenshots.show_charts(page, sweep["charts_url"], "val_top1") == NUM_TRIALS
        assert page.get_by_text("layers/02").count() == 0
        keep(page, "charts")

        page = screenshots.new_page(chromium, complaints)
        report = screenshots.show_report(page, sweep["report_url"])
        assert report.locator(".chart canvas").count() == 7
        assert report.locator("#framed").is_visible()
        link = report.locator("tbody a").first
        best = link.inner_text()
        link.click()  # the frame would refuse this with an error
        with page.context.expect_page() as opening:
            link.click(modifiers=["Control"])
        opening.value.get_by_role("heading", name=best).wait_for()
        keep(page, "report")
        keep(opening.value, "trial")
    assert complaints == []


def test_a_run_is_found_and_its_page_printed(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    trial = tracking.find_run(store.uri, "digits-sweep-t03")
    code, told = ui(capsys, trial.run_id[:8])
    assert code == 0
    page = f"{store.uri}/#/experiments/1/runs/{trial.run_id}"
    assert told["url"] == f"{page}?workflowType=machine_learning"
    assert told["charts_url"].startswith(f"{page}/model-metrics")
    assert told["report_url"] is None
    assert ui(capsys, "digits-swep")[0] == 2


def test_the_web_browser_opens_where_it_is_asked_for_and_never_for_a_program(
    store: Store, opened: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(browser, "has_desktop", lambda *_: True)
    ui(capsys)
    cli.run(["ui", "--no-open"])
    assert opened == []
    cli.run(["ui", "digits-sweep"])
    assert opened == [capsys.readouterr().out.splitlines()[-3]]


@pytest.mark.parametrize(
    ("environment", "platform", "is_terminal", "expected"),
    [
        (ON_A_DESKTOP, "linux", True, True),
        ({"WAYLAND_DISPLAY": "wayland-0"}, "linux", True, True),
        ({}, "darwin", True, True),
        ({}, "linux", True, False),
        (ON_A_DESKTOP, "linux", False, False),
        (ON_A_DESKTOP | {"CI": "true"}, "linux", True, False),
        ({"SSH_CONNECTION": "a"}, "darwin", True, False),
    ],
)
def test_a_desktop_is_known_by_its_environment(
    environment: dict[str, str], platform: str, is_terminal: bool, expected: bool
) -> None:
    assert has_desktop(environment, platform, is_terminal) is expected


def test_a_server_without_runs_is_shown_its_first_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_runs", lambda *_, **__: [])
    assert browser._of_all("http://127.0.0.1:1").url.startswith("http://127.0.0.1:1/#/experiments?")


def test_a_view_has_few_columns_and_fits_into_a_tag() -> None:
    aims = [Aim("latency_ms", "min"), Aim("val_top1", "max")]
    view = browser_view.best(aims, [f"section.parameter_{number:03d}" for number in range(50)], "5" * 32)
    assert view["selectedColumns"][:2] == ["metrics.`latency_ms`", "metrics.`val_top1`"]
    assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`latency_ms`", True)
    assert len(view["selectedColumns"]) == 12
    tag = browser_view.tag_of("Sweep", view, 1.7e9)
    assert len(tag) < 5000  # MLflow refuses more
    state = json.loads(tag)["state"]
    assert json.loads(zlib.decompress(b64decode(state.removeprefix("deflate;")))) == view


def test_the_columns_of_a_sweep_are_what_its_trials_differ_in() -> None:
    trials = [{"seed": "1", "optim.max_lr": "0.1"}, {"seed": "1", "optim.max_lr": "0.2", "schedule.level": "2"}]
    assert browser_view.varied(trials) == ["optim.max_lr", "schedule.level"]
    assert browser_view.varied(trials[:1]) == []


@pytest.mark.parametrize("text", ["", "[", "null", "[1]", '[{"metric": "val_loss"}]'])
def test_objectives_that_cannot_be_read_leave_top1(text: str) -> None:
    assert browser._aims({"search.objectives": text}) == [Aim("val_top1", "max")]
