"""The page of each method: what stands on it, and that the code it names is there."""

import inspect
import re

import pytest

from dgr_jax.config import configurables
from dgr_jax.losses import contrastive, ranking
from tests.conftest import ROOT

METHODS = ROOT / "docs" / "methods"
PAGES = sorted(path for path in METHODS.glob("*.md") if path.name != "index.md")


def section(page, title):
    return page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_a_page_has_a_formula_its_code_and_what_was_published_and_measured(path):
    page = path.read_text(encoding="utf-8")
    titles = re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert titles == ["Formula", "In the code", "Published", "Measured here"]
    assert re.search(r"^ {4}\S", section(page, "Formula"), re.MULTILINE)
    named = re.findall(r"`([\w/]+\.(?:py|gin))`", page) + re.findall(r"`([\w/]+/)`", page)
    assert named
    for name in named:
        rooms = ("", "dgr_jax", "gin_configs")
        assert any((ROOT / room / name).exists() for room in rooms), name


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_setting_of_a_page_is_one(path):
    """`Name.setting`, `Name.*` and `@name()`."""
    page = path.read_text(encoding="utf-8")
    known = configurables.configurables()
    for name in re.findall(r"@(\w+)\(\)", page):
        assert name in known or name in ranking.LOSSES or hasattr(contrastive, name), name
    for name, setting in re.findall(r"[`.](\w+)\.(\w+|\*)(?=[=`])", page):
        if name in known and setting not in ("*", "gin"):
            assert setting in inspect.signature(known[name]).parameters, (name, setting)


def test_the_table_of_methods_has_every_page_and_its_numbers():
    lines = (METHODS / "index.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.split("|")] for line in lines if "](" in line]
    rows = [(re.search(r"\]\((\w+\.md)\)", row[1])[1], *row[2:4]) for row in cells if len(row) == 6]
    assert sorted(page for page, *_ in rows) == [path.name for path in PAGES]
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page, marco, questions in rows:
        published = section((METHODS / page).read_text(encoding="utf-8"), "Published")
        assert f"MRR@10 {marco}" in published if marco else "MRR@10" not in published
        assert f"hits@5 {questions}" in published if questions else "hits@5" not in published
        assert f"methods/{page}" in nav
