"""What a person sees: TensorBoard in a real browser, on the loopback interface only.

With ``KEEP_SCREENSHOT=docs/images/tensorboard.png`` in the environment the picture is kept.
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
    assert main(["demo", "--logdir", str(folder), "--epochs", "12"]) == 0
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


def show(page, url: str, tab: str) -> None:
    page.goto("about:blank")
    page.goto(f"{url}#{tab}")


def test_custom_scalars_show_every_chart(page, tensorboard):
    show(page, tensorboard, "custom_scalars")
    for title in ("credit, all components", "skip, all components", "drift, all components"):
        page.get_by_text(title, exact=True).wait_for()
    assert page.get_by_text("Matches (4)").count() == 3
    time.sleep(3)
    picture = page.screenshot()
    assert picture[:4] == b"\x89PNG"
    if keep := os.environ.get("KEEP_SCREENSHOT"):
        Path(keep).parent.mkdir(parents=True, exist_ok=True)
        Path(keep).write_bytes(picture)


def test_images_are_drawn(page, tensorboard):
    show(page, tensorboard, "images")
    for name in ("credits", "directions", "evolution", "spectra"):
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
          return found.length >= 4;
        }"""
    )


def test_closing_table_is_rendered(page, tensorboard):
    show(page, tensorboard, "text")
    page.get_by_text("drift", exact=True).first.wait_for()
    assert page.locator("table td", has_text="net.5").count() >= 1
