"""Files for the people around the project: citation, changelog, issue forms, images."""

import ast
import json
import re
import sys
import tomllib

import pytest
import yaml
from packaging.version import Version

import dgr_jax
from tests.conftest import ROOT

FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def test_the_citation_is_of_this_version():
    """The fields that the Citation File Format 1.2.0 asks for."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert str(citation["version"]) == dgr_jax.__version__
    assert citation["license"] == "Apache-2.0"
    assert citation["title"] and citation["message"]
    assert all("name" in a or "family-names" in a for a in citation["authors"])
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= reference.keys()


def test_the_readme_compares_this_version():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"| | dgr_jax {dgr_jax.__version__} |" in readme


def test_the_changelog_is_as_keep_a_changelog_says():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    releases = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert releases[0] == "[Unreleased]"
    matches = [re.fullmatch(r"\[([\d.]+)\] - \d{4}-\d\d-\d\d", line) for line in releases[1:]]
    versions = [Version(match[1]) for match in matches]
    assert versions == sorted(versions, reverse=True)
    assert str(versions[0]) == dgr_jax.__version__
    for release in text.split("\n## ")[1:]:
        kinds = re.findall(r"^### (.*)$", release, re.MULTILINE)
        assert len(kinds) == len(set(kinds))
        assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_an_issue_form_is_one(form):
    """The fields that GitHub asks for, and a question for the versions where something is wrong."""
    described = yaml.safe_load(form.read_text(encoding="utf-8"))
    if form.stem == "config":
        assert described == {"blank_issues_enabled": True}
        return
    assert {"name", "description", "body"} <= described.keys()
    names = [field["id"] for field in described["body"]]
    assert len(names) == len(set(names))
    for field in described["body"]:
        assert field["type"] in ("input", "textarea") and field["attributes"]["label"]
    assert ("versions" in names) == (form.stem in ("bug", "result"))


def test_the_development_container_is_a_stage_of_the_image():
    settings = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    dockerfile = ROOT / ".devcontainer" / settings["build"]["dockerfile"]
    assert f" AS {settings['build']['target']}\n" in dockerfile.read_text()
    extras = re.search(r"\[([\w,]+)\]", settings["postCreateCommand"])[1].split(",")
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert all(f'"{extra}": [' in setup for extra in extras)


def test_an_image_for_each_kind_of_device():
    """The last one is what is built where no target is named: that of launch_gke.yaml."""
    lines = (ROOT / "scripts" / "Dockerfile").read_text().splitlines()
    stages = [line.split()[-1] for line in lines if line.startswith("FROM ")]
    assert stages[-3:] == ["cpu", "cuda", "tpu"]
    installs = [line.split()[-1] for line in lines if line.startswith("RUN pip install")]
    assert installs == [".", '".[gpu]"', '".[tpu]"']


def test_types_are_checked_without_the_packages_of_extras():
    """What only an extra brings is missing where the check runs: mypy is told so for each."""
    imported = set()
    for file in (ROOT / "dgr_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (excused,) = settings["tool"]["mypy"]["overrides"]
    told = {module.removesuffix(".*") for module in excused["module"]}
    typed = {  # of every installation, or of the extra `test`
        "fastapi", "flax", "ir_measures", "jax", "matplotlib", "ml_dtypes", "numpy",
        "prometheus_client", "pydantic", "rich", "sentencepiece", "starlette", "tensorstore",
        "upath", "uvicorn",
    }  # fmt: skip
    assert imported - set(sys.stdlib_module_names) - {"dgr_jax"} - typed == told
