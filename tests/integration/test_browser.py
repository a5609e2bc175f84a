"""What a person sees: TensorBoard in a real browser, on the loopback interface only.

With ``KEEP_SCREENSHOTS=docs/images`` in the environment the documentation's pictures are drawn anew.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from lightning_koopman.cli.main import main

pytestmark = pytest.mark.slow

QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--disable-quic",
]


@pytest.fixture(scope="module")
def page():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=QUIET)
        page = browser.new_page(viewport={"width": 1500, "height": 1000})
        page.set_default_timeout(60_000)
        # Nothing but the machine itself is asked for anything.
        page.route(re.compile(r"^https?://(?!127\.0\.0\.1)"), lambda route: route.abort())
        yield page
        browser.close()


@pytest.fixture(scope="module")
def tensorboard(page, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "koopman_demo"
    epochs = "12" if os.environ.get("KEEP_SCREENSHOTS") else "3"
    assert main(["demo", "--logdir", str(folder), "--epochs", epochs]) == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder.name, "--load_fast=false"]
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        stderr=subprocess.DEVNULL,
        cwd=folder.parent,
    )
    url = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(240):
            try:
                if b"version" in urllib.request.urlopen(f"{url}data/runs").read():
                    break
            except OSError:
                pass
            time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait()


def show(page, url: str, tab: str, query: str = "") -> None:
    page.goto("about:blank")
    page.goto(f"{url}{query}#{tab}")


def keep(page, name: str) -> None:
    """Draw a page, for the documentation where that is asked for."""
    time.sleep(3)
    picture = page.screenshot()
    assert picture[:4] == b"\x89PNG"
    if folder := os.environ.get("KEEP_SCREENSHOTS"):
        Path(folder, name).write_bytes(picture)


def test_each_chart_tells_the_components_apart_in_order_of_execution(page, tensorboard):
    charts = ("credit", "drift", "drift_bands", "skip", "skip_bands", "total")
    query = f"?smoothing=0&tagFilter=koopman/({'|'.join(charts)})$"
    show(page, tensorboard, "timeseries", query)
    page.get_by_role("button", name="Toggle settings side pane").click()
    for name in charts:
        page.get_by_text(f"koopman/{name}", exact=True).first.wait_for()
    listed = page.locator("runs-data-table tb-data-table-content-row").all_inner_texts()
    ours = [name.strip().split("/")[-1] for name in listed if "koopman" in name]
    assert ours == ["1-net.1", "2-net.3", "3-net.5", "4-net.7"]
    rows = page.locator("tb-data-table-content-row").filter(has=page.locator(".row-circle"))
    rows.first.wait_for()
    colours = {row.inner_text().split()[0]: row.locator(".row-circle span") for row in rows.all()}
    styles = [found.get_attribute("style") for found in colours.values()]
    assert len(set(styles)) == len(styles) == 5
    keep(page, "tensorboard.png")


def test_images_are_drawn(page, tensorboard):
    show(page, tensorboard, "images")
    for name in ("importance", "skip_bands", "drift_bands"):
        page.get_by_text(f"koopman/{name}", exact=True).first.wait_for()
    page.wait_for_function(
        """() => {
          const found = [];
          const walk = node => {
            if (node.shadowRoot) walk(node.shadowRoot);
            for (const child of node.children || []) {
              if (child.tagName === "IMG" && child.naturalWidth > 200) found.push(child);
              walk(child);
            }
          };
          walk(document.body);
          return found.length >= 3;
        }"""
    )


def test_text_says_what_the_charts_show_and_how_it_ended(page, tensorboard):
    show(page, tensorboard, "text")
    page.get_by_text("how far the outputs move").first.wait_for()
    page.get_by_text("in bands of two standard errors up and down").first.wait_for()
    page.get_by_text("drift", exact=True).first.wait_for()
    assert page.locator("table td", has_text="net.5").count() >= 1
