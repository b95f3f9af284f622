"""`dab ui`: the experiment browser, opened on the runs, the sweep or the run that a person wants to see.

The server is MLflow's (`orchestrator.tracking_server`); what its table shows is in `orchestrator.browser_view`.
"""

import json
import os
import sys
import time
import webbrowser
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlencode

from dabnn.errors import InvalidInputError
from orchestrator import browser_view, tracking
from orchestrator.commands import Say, patiently, tracking_uri
from orchestrator.mlflow_client import connected
from orchestrator.output import View
from orchestrator.sweep_record import Aim
from orchestrator.tracking import RunRecord

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

# Else the page opens with the menu of language models.
_TRAINING = {"workflowType": "machine_learning"}
_REPORTS, _REPORT = "report", "report/report.html"  # as `orchestrator.report.log_report` keeps them
_NUM_LOOKED_AT = 200
_SHORT_ID = 8


@dataclass(frozen=True)
class Pages:
    """Addresses in the experiment browser.

    Attributes:
        url: The table of runs, or the page of a run.
        charts_url: Its charts; None where there is nothing to show yet.
        report_url: The report that is kept with the run.
    """

    url: str
    charts_url: str | None = None
    report_url: str | None = None


def start_browser(
    reference: str | None, uri: str | None, port: int | None, *, opens: bool | None, say: Say, is_json: bool = False
) -> View:
    """Return the addresses of pages of the experiment browser, started if it does not run.

    Args:
        reference: A run or a sweep; None for the experiment that ran last.
        uri: A tracking server elsewhere.
        port: Port of this machine's own.
        opens: Whether the web browser is opened; None where a person sits at a desktop.
        say: Told what is waited for.
        is_json: A program reads the result, so no web browser is opened unless asked for.

    Raises:
        InvalidInputError: There is no such run.
        DabError: The server does not start or answer.
    """
    own = None if uri else tracking.ensure_tracking(port=port, on_wait=patiently(say))
    address = tracking_uri(uri, say, reference or "")
    pages = _of_run(address, tracking.find_run(address, reference)) if reference else _of_all(address)
    status = tracking.tracking_status()
    user, file = (status.user, status.password_file) if address == own else (None, None)
    guard = [] if user is None else [f"user: {user}, password: that in {file}"]
    is_wanted = not is_json and has_desktop(os.environ, sys.platform, sys.stdout.isatty()) if opens is None else opens
    if is_wanted and not webbrowser.open(pages.url):
        say("no web browser could be opened; this is the address:")
    more = {"charts": pages.charts_url, "report": pages.report_url}
    lines = [pages.url, *(f"{name}: {url}" for name, url in more.items() if url), *guard]
    return {"tracking_uri": address, **asdict(pages), "user": user, "password_file": file}, "\n".join(lines)


def has_desktop(environment: Mapping[str, str], platform: str, is_terminal: bool) -> bool:
    """Whether a person sits at this machine's desktop: not in CI, over SSH, or behind a pipe."""
    if not is_terminal or any(environment.get(name) for name in ("CI", "SSH_CONNECTION", "SSH_CLIENT", "SSH_TTY")):
        return False
    return platform in ("darwin", "win32") or any(environment.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


def _of_all(uri: str) -> Pages:
    """Return the pages of the experiment that ran last; of a server without runs its first page."""
    last = tracking.find_runs(uri, max_results=1)
    if not last:
        return Pages(f"{uri}/#/experiments?{urlencode(_TRAINING)}")
    with connected(uri) as client:
        experiment = _experiment_id(client, last[0].experiment)
        newest, best = browser_view.newest(), browser_view.best()
        for key, name, view in (("dab", "Newest runs", newest), ("dab-best", "Best runs", best)):
            client.set_experiment_tag(experiment, browser_view.TAG + key, browser_view.tag_of(name, view, time.time()))
    return Pages(_table(uri, experiment, "dab"), _charts(uri, experiment, "dab-best"))


def _of_run(uri: str, record: RunRecord) -> Pages:
    with connected(uri) as client:
        experiment = _experiment_id(client, record.experiment)
        files = {file.path for file in client.list_artifacts(record.run_id, _REPORTS)}
    page, query = f"{uri}/#/experiments/{experiment}/runs/{record.run_id}", urlencode(_TRAINING)
    report = f"{page}/artifacts/{_REPORT}?{query}" if _REPORT in files else None
    if record.tags.get("dab.kind") != "sweep":
        return Pages(f"{page}?{query}", f"{page}/model-metrics?{query}", report)
    key = _keep_sweep(uri, experiment, record)
    return Pages(_table(uri, experiment, key), _charts(uri, experiment, key), report)


def _keep_sweep(uri: str, experiment: str, record: RunRecord) -> str:
    """Keep the view of a sweep's trials with its experiment and return its key."""
    trials = tracking.find_runs(uri, record.experiment, parent=record.run_id, max_results=_NUM_LOOKED_AT)
    params = browser_view.varied([trial.params for trial in trials]) or browser_view.PARAMS
    view = browser_view.best(_aims(record.params), params, record.run_id)
    key = f"dab-{record.run_id[:_SHORT_ID]}"
    with connected(uri) as client:
        tag = browser_view.tag_of(f"Sweep {record.name}", view, record.start_time)
        client.set_experiment_tag(experiment, browser_view.TAG + key, tag)
    return key


def _aims(params: Mapping[str, str]) -> list[Aim]:
    """Return the objectives of a sweep, as its parameters name them."""
    try:
        objectives = json.loads(params.get("search.objectives", "[]"))
        found = [Aim(objective["metric"], objective["mode"]) for objective in objectives]
    except (ValueError, TypeError, KeyError):  # of another version, or cut
        found = []
    return found or [browser_view.TOP1]


def _experiment_id(client: "MlflowClient", name: str) -> str:
    """Return the id of an experiment that holds a run."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        raise InvalidInputError(f"experiment: {name!r} was deleted just now.")
    return str(experiment.experiment_id)


def _table(uri: str, experiment: str, key: str, **more: str) -> str:
    return f"{uri}/#/experiments/{experiment}/runs?{urlencode(_TRAINING | {'viewStateShareKey': key} | more)}"


def _charts(uri: str, experiment: str, key: str) -> str:
    return _table(uri, experiment, key, compareRunsMode="CHART")
