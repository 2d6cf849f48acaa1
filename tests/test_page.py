"""The page at `/`: what it may do and, where Chromium is installed, what a person can do there."""

from __future__ import annotations

import json
import re
import shutil
import threading
import time

import pytest
import uvicorn

from dgr_jax.serving import page
from dgr_jax.serving.app import Api, application
from dgr_jax.serving.settings import Service
from tests import served as small

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
QUERY = "who dances alert"


def test_the_page_is_one_file_that_runs_nothing_else():
    assert not re.findall(
        r"""(?:src|href|action)=|url\(|@import|https?://(?!www\.w3\.org)""", page.HTML
    )
    assert (
        "innerHTML" not in page.HTML
        and "style=" not in page.HTML
        and "on" + "click=" not in page.HTML
    )
    assert page.POLICY.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in page.POLICY and "connect-src 'self'" in page.POLICY


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Where a small service listens."""
    model = small.model(small.retriever(tmp_path_factory.mktemp("store"), num_beams=4))
    model.served.compile((1, 2))
    api = Api([model], Service(batch_size=2))
    server = uvicorn.Server(uvicorn.Config(application(api), port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started or not api.is_ready:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join(10)


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("Chromium is not installed (apt-get install chromium)")
    driver = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with driver.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def opened(browser, address):
    """The page in a window, and what its console says of errors."""
    said = []
    window = browser.new_page()
    window.on(
        "console", lambda message: said.append(message.text) if message.type == "error" else 0
    )
    window.on("pageerror", lambda error: said.append(str(error)))
    window.on("dialog", lambda dialog: said.append(f"dialog: {dialog.message}"))
    window.goto(address)
    window.wait_for_selector("#choice input")
    yield window
    assert [line for line in said if "status of 422" not in line] == []
    window.close()


def searched(window):
    """Types and submits a question, by the keyboard alone."""
    assert window.evaluate("document.activeElement.id") == "query"
    window.keyboard.type(QUERY)
    window.keyboard.press("Enter")
    window.wait_for_selector(".hit")


def test_a_question_finds_passages_and_their_words_are_marked(opened):
    searched(opened)
    assert opened.locator(".hit").count() == 4
    assert "4 passages for" in opened.locator("#said").inner_text()
    marks = set(opened.locator(".hit mark").all_inner_texts())
    assert "dances" in marks and marks <= {"dances", "dance", "alert"}
    first = opened.locator(".hit").first.inner_text()
    assert "score" in first and re.search(r"<\d+> <\d+> <\d+>", first)


def test_a_title_with_markup_is_text(opened):
    opened.evaluate(
        "document.body.append(shownHit({rank: 1, pid: 'p', score: -1, title: '<img src=x "
        "onerror=alert(1)>', text: '<script>alert(2)</scr' + 'ipt>', identifier: '<b>', parts: {}},"
        " 'alert', 'distill', ''))"
    )
    shown = opened.locator("body > .hit").inner_text()
    assert "<img src=x onerror=alert(1)>" in shown and "<script>alert(2)</script>" in shown
    assert opened.locator("body > .hit img, body > .hit script, body > .hit b").count() == 0


def test_the_beam_is_drawn_and_a_passage_followed_by_keyboard(opened):
    searched(opened)
    opened.get_by_role("button", name="Draw the beam").focus()
    opened.keyboard.press("Enter")
    opened.wait_for_selector("#drawing svg")
    assert opened.locator("#drawing g.live").count() >= 12
    assert opened.evaluate("document.activeElement.id") == "drawing"
    title = opened.get_by_role("button", name=re.compile("follow it through the search")).nth(1)
    title.focus()
    opened.keyboard.press("Enter")
    opened.wait_for_selector(".hit.followed")
    assert "found at rank 2." in opened.locator("#followed").inner_text()
    assert opened.locator("#drawing g.way").count() == 3  # one of each step
    opened.get_by_text("The same as a table").click()
    assert opened.locator("#levels tbody tr").count() == opened.locator("#drawing g").count()


def test_what_was_not_found_is_followed_to_where_it_fell(opened):
    searched(opened)
    found = opened.locator(".hit").evaluate_all("hits => hits.map(hit => hit.dataset.pid)")
    lost = next(p.pid for p in small.PASSAGES if p.pid not in found)
    opened.evaluate(f"look({json.dumps(QUERY)}, 'distill', {json.dumps(lost)})")
    opened.wait_for_selector("#drawing g.dropped.way")
    said = opened.locator("#followed").inner_text()
    assert said.startswith(f"{lost}: not among the 4 passages that were found: at step ")


def test_errors_are_told(opened):
    opened.evaluate("document.getElementById('query').value = 'x'.repeat(1001)")
    opened.get_by_role("button", name="Search").click()
    opened.wait_for_selector("#said.wrong")
    assert "got 1,001 characters" in opened.locator("#said").inner_text()


def test_every_control_has_a_name_and_nothing_overflows_a_phone(opened):
    searched(opened)
    opened.set_viewport_size({"width": 360, "height": 700})
    unnamed = opened.evaluate(
        "[...document.querySelectorAll('input, select, button')].filter(part => !(part.labels && "
        "part.labels.length) && !part.getAttribute('aria-label') && !part.textContent.trim())"
        ".length"
    )
    assert unnamed == 0
    assert opened.evaluate("document.documentElement.scrollWidth") <= 360
