"""Pictures of the experiment browser, taken in a headless Chromium.

    PYTHONPATH=. python tools/screenshots.py URL SWEEP OUT

URL is the address of a tracking server, SWEEP a sweep there, OUT the folder for experiment.png, sweep.png, charts.png
and report.png.
"""

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, ConsoleMessage, Frame, Locator, Page, sync_playwright

from orchestrator.browser import start_browser

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
SIZE = {"width": 1500, "height": 850}
TIMEOUT_MS = 60_000
# MLflow opens its assistant over a quarter of the first page that a web browser asks of a server on loopback.
_NO_ASSISTANT = "try { localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true') } catch {}"
# What MLflow's own pages say: a server without users, AG Grid's deprecations, a notice of layout.
_MLFLOWS_OWN = ("/mlflow/users/current", "AG Grid:", "ResizeObserver loop")


@contextmanager
def chromium() -> Iterator[Browser]:
    """Gives a headless Chromium."""
    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def new_page(browser: Browser, complaints: list[str]) -> Page:
    """Returns a page of a fresh profile; what its console and scripts complain of, MLflow's own aside, is added."""

    def hear(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            tell(f"{message.text} ({message.location.get('url')})")

    def tell(text: str) -> None:
        if not any(known in text for known in _MLFLOWS_OWN):
            complaints.append(text)

    page = browser.new_context(viewport=SIZE).new_page()  # type: ignore[arg-type] # a dict of two numbers
    page.set_default_timeout(TIMEOUT_MS)
    page.add_init_script(_NO_ASSISTANT)
    page.on("console", hear)
    page.on("pageerror", lambda error: tell(str(error)))
    return page


def show_table(page: Page, url: str) -> list[str]:
    """Opens a table of runs and returns the names in it, from top to bottom."""
    page.goto(url)
    return names_in(page)


def names_in(page: Page) -> list[str]:
    """Returns the names of the runs in the table that is shown."""
    links = page.locator(".ag-pinned-left-cols-container .ag-row a")
    links.first.wait_for()
    rows = page.locator(".ag-pinned-left-cols-container .ag-row").all()
    return [row.locator("a").first.inner_text() for row in sorted(rows, key=_position)]


def expand_all(page: Page) -> None:
    """Lists the trials below each sweep in the table that is shown."""
    for button in page.locator(".ag-pinned-left-cols-container .ag-row button").all():
        button.click()


def headings(page: Page) -> list[str]:
    """Returns the headings right of names and dates, from left to right, those that are not scrolled out of sight."""
    page.wait_for_timeout(1000)  # the columns are put in order after they are drawn
    cells = page.locator(".ag-header-viewport .ag-header-cell").all()
    cells.sort(key=lambda cell: int(cell.get_attribute("aria-colindex") or 0))
    return [text for text in (cell.inner_text().strip() for cell in cells) if text]


def show_charts(page: Page, url: str, metric: str) -> int:
    """Opens charts and returns how many curves of a metric there are, once they are drawn."""
    page.goto(url)
    card = page.get_by_test_id("experiment-view-compare-runs-card").filter(has_text=metric).first
    curves = card.locator(".scatterlayer .trace .lines path.js-line")
    curves.first.wait_for(state="attached")
    page.wait_for_timeout(1000)
    return len(
        set(curves.evaluate_all("curves => curves.map(curve => curve.getAttribute('d'))"))
    )  # each is there twice


def show_report(page: Page, url: str) -> Frame:
    """Opens a report among the files of its run and returns its frame, once its charts are drawn."""
    page.goto(url)
    page.frame_locator("iframe.mlflow-html-iframe").locator(".chart canvas").last.wait_for()
    return next(frame for frame in page.frames if frame.url.startswith("blob:"))


def take(page: Page, file: Path) -> None:
    """Writes what is shown as a picture, once it has come to rest."""
    page.wait_for_timeout(1500)
    file.parent.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=file)


def main(uri: str, sweep: str, out: Path) -> None:
    """Takes the pictures."""
    whole, _ = start_browser(None, uri, None, opens=False, say=_nobody)
    one, _ = start_browser(sweep, uri, None, opens=False, say=_nobody)
    with chromium() as browser:
        page = new_page(browser, [])
        show_table(page, whole["url"])
        expand_all(page)
        take(page, out / "experiment.png")
        show_table(page, one["url"])
        take(page, out / "sweep.png")
        page = new_page(browser, [])  # of a page that differs in the part behind `#` alone little is loaded anew
        show_charts(page, one["charts_url"], "val_top1")
        take(page, out / "charts.png")
        if one["report_url"]:
            show_report(page, one["report_url"])
            take(page, out / "report.png")


def _position(row: Locator) -> int:
    return int(row.get_attribute("row-index") or 0)


def _nobody(_: str) -> None:
    pass


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
