"""The page in a browser: headless Chromium, where playwright and a browser are installed."""

from __future__ import annotations

import re
import shutil
from importlib import resources

import pytest

pytest.importorskip("uvicorn")
from tests.servers import Server, until

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)


def test_it_is_one_file():
    page = resources.files("mlx_sleep.server").joinpath("page.html").read_text("utf-8")
    assert not re.search(r"https?:|\bsrc=|\bimport\b|@import|url\(|innerHTML|style=| on\w+=", page)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as running:
        yield running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def open_page(browser, tmp_path, monkeypatch):
    """A page on a new server; what it complains of fails the test."""
    complaints, opened = [], []

    def open_page(**options):
        server = Server(tmp_path, monkeypatch, **options).__enter__()
        page = browser.new_page()
        opened.append((page, server))
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda m: m.type == "error" and complaints.append(m.text))
        page.goto(server.url)
        return page, server

    yield open_page
    for page, server in opened:
        page.close()
        server.stop()
    assert [c for c in complaints if not c.startswith("Failed to load resource")] == []


def name_memory(page, name):
    page.locator("#name").fill(name)
    page.keyboard.press("Enter")
    page.get_by_role("heading", name=f"Memory “{name}”").wait_for()


def test_a_chat_by_keyboard_that_sleeps(open_page):
    page, server = open_page(idle=0.3)
    assert page.locator("#text").evaluate("e => e === document.activeElement")
    name_memory(page, "anna")
    page.keyboard.type("My cat is <b>Zorvi</b>.")
    page.keyboard.press("Enter")
    page.get_by_role("log").get_by_text("I see").wait_for()
    page.get_by_role("log").get_by_text("My cat is <b>Zorvi</b>.").wait_for()  # as it was typed
    page.get_by_role("log").get_by_text("slept:").wait_for()
    page.locator("#told").get_by_text("Zorvi").wait_for()
    page.locator("#find").fill("dog")
    page.get_by_text("Nothing found.").wait_for()
    assert server.sessions.named("anna").session.stats().sleeps == 1

    page.reload()  # the memory and its transcript are there again
    page.get_by_role("log").get_by_text("Zorvi").wait_for()
    assert page.locator("#model").text_content() == "tiny"


def test_escape_stops_a_reply(open_page):
    page, server = open_page()
    server.pause, server.reply = 0.05, "x" * 60
    name_memory(page, "anna")
    page.keyboard.type("hello")
    page.keyboard.press("Enter")
    page.get_by_role("log").get_by_text("xxx").wait_for()
    page.keyboard.press("Escape")
    page.get_by_text("stopped; what was said stays said").wait_for()
    until(lambda: server.engine.queued == 0)
    [turn] = server.sessions.named("anna").conversation.turns
    assert 3 <= len(turn.reply) < 60


def test_a_sleep_under_way_is_shown(open_page, monkeypatch):
    page, server = open_page()
    name_memory(page, "anna")
    page.keyboard.type("hello")
    page.keyboard.press("Enter")
    page.get_by_role("log").get_by_text("I see").wait_for()
    server.sessions.named("anna").progress = (1, 2, 0.25)
    page.get_by_text("asleep: pass 1 of 2").wait_for()
    assert page.locator("#bar").get_attribute("value") == "0.25"
    server.sessions.named("anna").progress = None
    page.get_by_text("awake", exact=True).wait_for()
    page.get_by_role("button", name="Sleep now").click()
    until(lambda: server.sessions.named("anna").session.stats().sleeps == 1)


def test_the_key_is_asked_for(open_page):
    page, server = open_page(key="sesame")
    page.locator("#key").fill("wrong")
    page.keyboard.press("Enter")
    page.locator("#key").fill("sesame")
    page.keyboard.press("Enter")
    page.get_by_text("Without a memory nothing is kept").wait_for()
    page.keyboard.type("hello")
    page.keyboard.press("Enter")
    page.get_by_role("log").get_by_text("I see").wait_for()
    assert server.sessions.slots[0].name is None


def test_errors_are_shown(open_page):
    page, server = open_page()
    name_memory(page, "anna")
    server.reply = lambda request: 1 / 0
    page.keyboard.type("hello")
    page.keyboard.press("Enter")
    page.get_by_text("the server failed at this").wait_for()


def test_a_wrong_name_and_a_server_that_is_gone(open_page):
    page, server = open_page()
    name_memory(page, "anna")
    page.locator("#name").fill("../x y")
    page.keyboard.press("Enter")
    page.get_by_text("letters, digits, dots").wait_for()
    assert page.locator("#name").input_value() == "anna"
    page.route("**/v1/**", lambda route: route.abort())
    page.keyboard.type("hello")
    page.keyboard.press("Enter")
    page.get_by_role("log").get_by_text("the server does not answer").wait_for()
    page.unroute("**/v1/**")
    page.keyboard.type("hello")
    page.keyboard.press("Enter")
    page.get_by_role("log").get_by_text("I see").wait_for()
