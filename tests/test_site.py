"""The documents as a site: pages made of the code, and the built pages."""

import ast
import html.parser
import inspect
import os
import re
import runpy
import subprocess
import sys
from urllib.parse import unquote, urlsplit

import pytest

from dgr_jax.config import configurables
from tests.conftest import ROOT

PAGES = runpy.run_path(str(ROOT / "scripts" / "docs_pages.py"))


def rows_of(section):
    """Setting -> (what it takes, its default, what it is), of a component's table."""
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \| (?:`(.+?)`)? \| ?(.*) \|$", section, re.MULTILINE)
    return {name: cells for name, *cells in rows}


def test_every_component_and_default_stands_in_the_reference():
    text = PAGES["components"]()
    sections = dict((part.partition("`\n")[0], part) for part in text.split("\n### `@")[1:])
    assert sections.keys() == {f"{name}()" for name in configurables.configurables()}
    for name, make in configurables.configurables().items():
        rows = rows_of(sections[f"{name}()"])
        settings = inspect.signature(make).parameters
        assert rows.keys() == settings.keys(), name
        for setting, parameter in settings.items():
            written = rows[setting][1]
            if parameter.default is parameter.empty:
                assert not written, (name, setting)
            elif not written.startswith("@") and repr(parameter.default) != "<factory>":
                assert ast.literal_eval(written) == parameter.default, (name, setting)


def test_a_docstring_becomes_prose_and_settings():
    doc = (
        "What it is.\n\nsize: of it,\n  in tokens.\nseed, draws: numbers; depth: how far.\n\nMore."
    )
    prose, meanings = PAGES["described"](doc, ["size", "depth", "seed", "draws"])
    assert prose == "What it is.\n\n\nMore."
    assert meanings == {
        "size": "of it, in tokens.", "seed": "numbers", "draws": "numbers", "depth": "how far."
    }  # fmt: skip


def test_every_flag_stands_in_the_reference():
    text = PAGES["commands"]()
    for name in PAGES["COMMANDS"]:
        section = text.split(f"## `python -m dgr_jax.{name}`")[1].partition("\n## ")[0]
        for action in PAGES["_parser"](name)._actions:
            assert f"| `{action.option_strings[-1]}" in section


def test_links_of_the_repository_hold_on_the_site():
    links = "[a](../../README.md#x) [b](docs/tour.md) [c](../benchmarks/RESULTS.md)"
    assert PAGES["site_links"](links, "how_to/y.md") == (
        "[a](../index.md#x) [b](docs/tour.md) [c](../benchmarks.md)"
    )
    assert PAGES["site_links"]("[b](docs/tour.md)", "index.md") == "[b](tour.md)"


# The built site


class Assets(html.parser.HTMLParser):
    """What a browser fetches to show a page, and the links that it offers."""

    def __init__(self):
        super().__init__()
        self.fetched, self.links = [], []

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag != "a":
            self.fetched += [given[key] for key in ("src", "srcset", "data") if key in given]
        if tag == "link":
            self.fetched.append(given["href"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=900,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_the_site_is_built_and_needs_no_other_host(site):
    """mkdocs itself refuses links to pages and headings that are not there."""
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 35
    for page in pages:
        assets = Assets()
        assets.feed(page.read_text(encoding="utf-8"))
        assert assets.fetched
        for url in assets.fetched:
            parts = urlsplit(url)
            assert not parts.netloc and parts.scheme in ("", "data"), (page, url)
            if parts.path and page.name != "404.html":
                assert (page.parent / unquote(parts.path)).is_file(), (page, url)
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", text), style


@pytest.mark.slow
def test_the_reference_shows_what_docstrings_say(site):
    modules = (site / "reference" / "modules.html").read_text(encoding="utf-8")
    assert 'id="dgr_jax.retrieval.retriever.Retriever.search"' in modules
    gin = (site / "reference" / "gin.html").read_text(encoding="utf-8")
    assert "<code>first_weight</code>" in gin and "<code>int | None</code>" in gin
