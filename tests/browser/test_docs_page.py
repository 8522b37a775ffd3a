"""The API page in a real browser: it shows every operation and asks nobody but this server."""

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator

import pytest
import uvicorn
from playwright.sync_api import Browser, sync_playwright

from server.main import create_app

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-default-apps"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Give the system's Chromium; without one the test is skipped, and fails under CI."""
    program = next(filter(None, map(shutil.which, CHROMIUM_NAMES)), None)
    if program is None:
        if os.environ.get("CI"):
            pytest.fail("no Chromium is installed")
        pytest.skip("no Chromium is installed")
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=program, args=QUIET)
        yield opened
        opened.close()


@contextlib.contextmanager
def running(app):
    """Serve `app` on a free port; gives its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="on", log_config=None, timeout_graceful_shutdown=3))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        thread.join(0.02)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)


def test_the_page_shows_every_operation_and_asks_nobody_else(browser, valkey, s3, settings_for, tmp_path):
    """All files of the page come from the server, no script fails, and each operation of the document is shown."""
    app = create_app(settings_for(valkey=valkey, s3=s3))
    operations = sum(len(path) for path in app.openapi_schema.to_schema()["paths"].values())
    with running(app) as url:
        page = browser.new_page()
        asked, mistakes = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: mistakes.append(str(error)))
        page.on("console", lambda message: mistakes.append(message.text) if message.type == "error" else None)
        try:
            page.goto(f"{url}/docs")
            page.wait_for_selector(".opblock", timeout=30_000)
            # Unfolding one operation draws schemas and icons, too.
            page.click("#operations-Batches-submit_batch .opblock-summary-control")
            page.wait_for_selector(".opblock.is-open .opblock-body", timeout=30_000)
            page.wait_for_load_state("networkidle")
            shown = page.locator(".opblock").count()
            title = page.locator(".info .title").first.inner_text()
        finally:
            page.screenshot(path=tmp_path / "docs.png", full_page=True)
            print(f"screenshot: {tmp_path / 'docs.png'}")  # noqa: T201 (pytest shows it with a failure)
            page.close()
    assert mistakes == []
    assert shown == operations
    assert title.startswith("Restage")
    assert len(asked) >= 5
    assert [one for one in asked if not one.startswith((f"{url}/", "data:"))] == []
