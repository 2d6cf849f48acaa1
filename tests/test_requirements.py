"""What must be installed: one list, one check, and runs where nothing else can be imported."""

import re
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from dgr_jax import train
from dgr_jax.config import requirements
from tests.conftest import ROOT, TINY

SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")
EVENTS = {"clu", "tensorboard"}  # TensorBoard's event files
TENSORFLOW = {"seqio", "tensorflow-datasets"}


def listed(name):
    """The requirements of a list of setup.py."""
    (found,) = re.findall(
        rf'^\s*"?{name}"?(?:=|: )\[\n(.*?)\n\s*\]', SETUP, re.MULTILINE | re.DOTALL
    )
    strings = re.findall(r'"([\w-]+[^";]*)(?:;[^"]*)?"', found)
    return {Requirement(text).name: Requirement(text) for text in strings}


def floor(requirement):
    return next(Version(part.version) for part in requirement.specifier if part.operator == ">=")


def test_the_check_asks_for_what_setup_asks_for():
    asked = listed("install_requires")
    assert {r.name for r in map(Requirement, requirements.PACKAGES.values())} == (
        asked.keys() - EVENTS - TENSORFLOW
    )
    for text in requirements.PACKAGES.values():
        requirement = Requirement(text)
        assert str(requirement) == str(asked[requirement.name])


@pytest.mark.parametrize("name", ["install_requires", "test"])
def test_floors_are_what_the_oldest_stack_has(name):
    """.ci/oldest.txt pins the lowest version that setup.py admits of every package it names."""
    lines = (ROOT / ".ci" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    for package, requirement in listed(name).items():
        key = re.sub(r"[-_.]+", "-", package).lower()
        assert Version(pinned[key]) == floor(requirement), package


def test_tensorflow_is_asked_for_where_it_has_wheels():
    where = "python_version < '3.14' and sys_platform != 'win32'"
    assert f'with_tensorflow = "{where}"' in SETUP
    for name in TENSORFLOW:
        assert re.search(rf'f"{name}>=[\d.]+; {{with_tensorflow}}"', SETUP)


# the check


def test_everything_is_here():
    assert requirements.problem() == ""


def test_all_that_is_missing_or_old_is_named_at_once(monkeypatch, tmp_path, capsys):
    for module in ("bm25s", "ir_measures", "sentencepiece", "matplotlib"):
        monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.setitem(sys.modules, module, None)
    versions = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: "0.5.3" if name == "jax" else versions(name)
    )
    with pytest.raises(ValueError) as error:
        train.command(["--gin_file=quickstart.gin", f"--model_dir={tmp_path / 'model'}"])
    lines = (ROOT / "setup.py").read_text()
    floors = {
        name: re.search(rf'"({name}>=[\d.]+)"', lines)[1]
        for name in ("bm25s", "ir_measures", "jax", "matplotlib", "sentencepiece")
    }
    assert str(error.value) == (
        "needs other packages than are here (bm25s missing, ir_measures missing, jax 0.5.3, "
        "matplotlib missing, sentencepiece missing): pip install "
        + " ".join(f"'{text}'" for text in floors.values())
    )
    assert not (tmp_path / "model").exists()


def test_a_module_that_is_missed_later_names_the_others_too(monkeypatch, capsys):
    from dgr_jax.config import cli

    monkeypatch.setattr(cli, "_configure_logging", lambda verbose: None)
    for module in ("rich", "ir_measures"):
        monkeypatch.setitem(sys.modules, module, None)

    def command(_):
        import rich  # noqa: F401

    with pytest.raises(SystemExit, match="2"):
        cli.main(command)
    assert "(ir_measures missing, rich missing): pip install 'ir_measures>=" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("0.8", (0, 8, 0)), ("0.11.18.dev3", (0, 11, 18)), ("2.0.0rc1+cuda12", (2, 0, 0))],
)
def test_versions_are_compared_by_number(version, numbers):
    assert requirements._numbers(version) == numbers


# an environment of these packages


def test_the_small_install_is_what_is_needed():
    """scripts/without_tensorflow.txt: no more and no less; the documents name it."""
    text = (ROOT / "scripts" / "without_tensorflow.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert sorted(lines) == sorted(requirements.PACKAGES.values())
    for page in ("README.md", "docs/how_to/install.md"):
        assert "pip install -r scripts/without_tensorflow.txt && pip install --no-deps ." in (
            (ROOT / page).read_text(encoding="utf-8")
        )


def test_every_extra_is_explained():
    after = SETUP.partition("extras_require={")[2]
    extras = re.findall(r'^        "(\w+)": \[', after, re.MULTILINE)
    assert len(extras) > 10
    page = (ROOT / "docs" / "how_to" / "install.md").read_text(encoding="utf-8")
    explained = re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)))
    assert set(extras) <= set(explained)


# As where they are not installed: no finder finds them. Programs are kept as they usually are.
BLOCK = """
import os, sys
for name in ("DIR", "MAX_SIZE"):
    os.environ.pop(f"JAX_COMPILATION_CACHE_{{name}}", None)
class Finder:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *rest):
        if name.partition(".")[0] not in {names!r}:
            return self.finder.find_spec(name, *rest)
sys.meta_path[:] = map(Finder, sys.meta_path)
"""


def others():
    """Top-level modules of all packages but PACKAGES and what these ask for."""
    kept, asked = set(), [Requirement(text).name for text in requirements.PACKAGES.values()]
    while asked:
        name = re.sub(r"[-_.]+", "-", asked.pop()).lower()
        if name in kept:
            continue
        kept.add(name)
        for text in metadata.requires(name) or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                asked.append(requirement.name)
    modules = metadata.packages_distributions()
    return {
        module
        for module, packages in modules.items()
        if not kept & {re.sub(r"[-_.]+", "-", p).lower() for p in packages}
    } - {"dgr_jax"}


@pytest.mark.slow
def test_an_experiment_where_nothing_else_can_be_imported(command, tmp_path):
    names = others()
    assert "pytest" in names and "jax" not in names
    (tmp_path / "sitecustomize.py").write_text(BLOCK.format(names=names))
    alone = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    model = f"--model_dir={tmp_path / 'model'}"
    done = command("dgr_jax.train", *TINY, model, env=alone)
    assert done.stderr.count("neither SeqIO tasks nor a TensorFlow dataset") == 1
    assert done.stderr.count("no TensorBoard summaries") == 1
    found = command("dgr_jax.retrieve", model, "--k=3", "--query=Why do bees dance?", env=alone)
    assert found.stdout.strip() and list((tmp_path / "cache").rglob("*.traced"))
    dense = [flag for flag in TINY[1:] if "T5Config" in flag or "Training" in flag]
    done = command(
        "dgr_jax.train", "--gin_file=quickstart_dense.gin", *dense, "--gin.STEPS=4",
        "--gin.Mesh.data=1", f"--model_dir={tmp_path / 'dense'}", env=alone,
    )  # fmt: skip
    assert done.stderr.count("neither SeqIO tasks nor a TensorFlow dataset") == 1
