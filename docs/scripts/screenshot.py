"""Takes the picture of the server's page: docs/images/serve-light.png and serve-dark.png.

    python docs/scripts/screenshot.py

Needs `pip install -e '.[serve]' playwright` and Chromium. SmolLM2 is told and asked what stands
in SAID, by the page itself; the memory is a new one in a folder that is removed in the end.
Replies are greedy: the same model says the same.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from mlx_sleep.memory.location import data_dir

IMAGES = Path(__file__).resolve().parents[1] / "images"
SAID = (  # a line, and whether the model sleeps after it
    ("hi, I'm Anna, I just moved to Lisbon with my dog Biscuit", True),
    ("my brother Tom drives a blue van", True),
    ("what's my dog called?", False),
    ("where do i live?", False),
)


@contextmanager
def serving() -> Iterator[str]:
    """The address of a server with SmolLM2 and no memory."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with tempfile.TemporaryDirectory() as home:
        os.symlink(data_dir() / "models", Path(home, "models"))
        command = [sys.executable, "-m", "mlx_sleep", "serve", "--model", "smollm2"]
        env = {**os.environ, "MLX_SLEEP_HOME": home, "MLX_SLEEP_CONFIG": f"{home}/config.toml"}
        server = subprocess.Popen([*command, "--port", port, "--idle", "0"], env=env)
        try:
            while server.poll() is None:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models").close()
                    break
                except OSError:
                    time.sleep(0.2)
            else:
                sys.exit(1)  # it has said why
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait()


def chat(page: Page) -> None:
    """Types SAID, with a press of the button for each sleep."""
    page.locator("#name").fill("anna")
    page.keyboard.press("Enter")
    page.get_by_text("Tell it something.").wait_for()
    sleeps = 0
    for turn, (text, sleep) in enumerate(SAID):
        page.locator("#text").fill(text)
        page.keyboard.press("Enter")
        page.locator("#told li").nth(turn).wait_for()
        if sleep:
            page.get_by_role("button", name="Sleep now").click()
            page.get_by_text("slept:").nth(sleeps).wait_for()
            sleeps += 1
    page.locator("#text").focus()


def main() -> None:
    browser = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
    with serving() as url, sync_playwright() as running:
        chromium = running.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1180, "height": 700})
        page.set_default_timeout(120_000)
        page.goto(url)
        chat(page)
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.screenshot(path=IMAGES / f"serve-{scheme}.png")


if __name__ == "__main__":
    main()
