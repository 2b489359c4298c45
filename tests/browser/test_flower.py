"""Flower in a browser, over SNS and SQS, shows each of 300 tasks of two workers."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, expect

from mdstore.local.emulator import EmbeddedAws, free_port
from mdstore.local.stack import stop_process
from mdstore.provision import provision
from mdstore.settings import load_settings
from tests.integration.plain_app import plain_app
from tests.waiting import until

ROOT = Path(__file__).parents[2]
USER, PASSWORD = "operator", "made-up"
NODES = ("one@here", "two@here")
ROWS = "#tasks-table tbody tr"


@contextmanager
def running(environ: Mapping[str, str], log: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a Python module as a process."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments], cwd=ROOT, env=environ, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        stop_process(process)


def api(url: str, *, password: str = PASSWORD) -> Any:
    """Return an answer of Flower's API."""
    key = base64.b64encode(f"{USER}:{password}".encode()).decode()
    request = urllib.request.Request(url, headers={"Authorization": f"Basic {key}"})  # noqa: S310  our own child
    with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
        return json.load(answer)


def knows_both_workers(url: str) -> bool:
    """Return whether Flower answers and knows both workers."""
    try:
        return set(api(f"{url}/api/workers?refresh=true")) == set(NODES)
    except (urllib.error.URLError, OSError):
        return False


@pytest.mark.timeout(180)
def test_flower_shows_every_task_and_no_other(browser: Browser, tmp_path: Path, pictures: Path | None) -> None:
    """Flower lists exactly the 300 tasks of two workers, each as SUCCESS, and both workers as online.

    After a restart Flower uses the same queue; a wrong password is refused.
    """
    log = tmp_path / "flower.log"
    with ExitStack() as stack:
        aws = stack.enter_context(EmbeddedAws(port=free_port()))
        url = f"http://127.0.0.1:{free_port()}"
        environ = {
            **os.environ,
            "AWS_ENDPOINT_URL": aws.url,
            "MDSTORE_NAMESPACE": "flowers",
            "MDSTORE_WAIT_TIME": "1",
            "FLOWER_BASIC_AUTH": f"{USER}:{PASSWORD}",
        }
        settings = load_settings(environ).settings
        for _ in provision(settings):
            pass
        worker = ("celery", "-A", "tests.integration.plain_app", "worker", "-c", "2", "-n")
        for node in NODES:
            stack.enter_context(running(environ, tmp_path / node, *worker, node))
        flower = ("mdstore", "flower", f"--port={url.rpartition(':')[2]}")
        with running(environ, log, *flower):
            until(lambda: knows_both_workers(url))
        app = plain_app(settings)
        left = set(app.topics.listed())
        stack.enter_context(running(environ, log, *flower))
        until(lambda: knows_both_workers(url))
        assert f"{settings.events_topic}-flower" in left
        assert {name for name in app.topics.listed() if name.startswith(settings.events_topic)} == {
            f"{settings.events_topic}-flower"
        }

        results = [app.tasks["add"].delay(n, n) for n in range(300)]
        ids = {str(result) for result in results}
        for result in results:
            result.get(timeout=60)

        page = browser.new_context(
            http_credentials={"username": USER, "password": PASSWORD},
            viewport={"width": 1100, "height": 850},
            device_scale_factor=0.6,
        ).new_page()
        info = page.locator("#tasks-table_info")
        page.goto(f"{url}/tasks?state=SUCCESS")  # the page does not refresh itself
        until(lambda: "of 300 tasks" in info.inner_text() or not page.reload())
        page.get_by_role("button", name="All", exact=True).click()
        expect(info).to_have_text("Showing 1 to 15 of 300 tasks")
        if pictures:
            pictures.mkdir(parents=True, exist_ok=True)
            page.screenshot(path=pictures / "flower.png", full_page=True)
        page.locator("#tasks-table_length select").select_option("100")
        shown: dict[str, str] = {}
        for number in range(1, 4):
            page.locator("#tasks-table_paginate").get_by_text(str(number), exact=True).click()
            expect(info).to_have_text(f"Showing {number * 100 - 99} to {number * 100} of 300 tasks")
            shown |= {row.get_attribute("id") or "": row.inner_text() for row in page.locator(ROWS).all()}
        assert set(shown) == ids
        assert all("SUCCESS" in row for row in shown.values())
        workers = {node: sum(node in row for row in shown.values()) for node in NODES}
        assert sum(workers.values()) == 300
        assert min(workers.values()) > 0

        page.goto(f"{url}/workers")
        for node in NODES:
            row = page.locator("#workers-table tbody tr", has_text=node)
            expect(row).to_contain_text("Online")
            expect(row).to_contain_text(str(workers[node]))

        with pytest.raises(urllib.error.HTTPError, match="401"):
            api(f"{url}/api/workers", password="wrong")
    text = log.read_text()
    assert PASSWORD not in text
    assert "Traceback" not in text
