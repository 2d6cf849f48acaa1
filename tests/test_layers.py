"""Who may import whom: reads the imports of every module, runs none."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dgr_jax"


def table() -> dict[str, set[str]]:
    """room -> rooms that it may import, as CONTRIBUTING.md says."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## To add")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    rows = [(layer, re.findall(r"`(\w+)`", rooms), may) for layer, rooms, may in rows[1:]]
    layers: dict[str, set[str]] = {}
    for layer, rooms, _ in rows:
        layers.setdefault(layer, set()).update(rooms)
    allowed = {}
    for _, rooms, may in rows:
        named = set(re.findall(r"`(\w+)`", may)).union(
            *(rooms for layer, rooms in layers.items() if re.search(rf"\b{layer}\b", may))
        )
        for place, room in enumerate(rooms):
            before = rooms[:place] if "before it" in may else ()
            allowed[room] = set().union(*layers.values()) if "everything" in may else named
            allowed[room] = allowed[room] | set(before)
    return allowed


def modules():
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Full names of what a module imports, type checking included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def own_rooms(path: Path) -> set[str]:
    return {n.split(".")[1] for n in imported(path) if n.startswith("dgr_jax.")} - {room(path)}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_lower_layers(path):
    if path == PACKAGE / "__init__.py":
        assert own_rooms(path) == {"moved"}
    else:
        assert own_rooms(path) <= table()[room(path)], path


def test_no_modules_import_each_other_in_a_circle():
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in modules()}
    left = {name: imported(path) & names.keys() - {name} for name, path in names.items()}
    while free := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in free}
    assert not left


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_tensorflow_and_gin_stay_in_their_rooms(path):
    outside = {name.split(".")[0] for name in imported(path)}
    if room(path) != "data":
        assert not outside & {"tensorflow", "tensorflow_datasets", "seqio"}
    if room(path) != "config":
        assert "gin" not in outside
    if room(path) != "t5x_adapter":
        assert "t5x" not in outside


def test_the_package_itself_imports_nothing_heavy():
    heavy = "('jax', 'tensorflow', 'numpy')"
    code = f"import dgr_jax, sys; print(sorted(m for m in {heavy} if m in sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"


def test_training_and_decoding_import_without_tensorflow():
    code = """
import sys
import dgr_jax.training.loop, dgr_jax.retrieval.generative, dgr_jax.losses.ranking
import dgr_jax.decoding.beam_search, dgr_jax.stages.pipeline, dgr_jax.data.rank_lists
print(*{"tensorflow", "seqio", "tensorflow_datasets", "tensorflow_text"} & {*sys.modules})
"""
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert found.stdout.strip() == ""


def test_no_data_set_is_named_in_the_library():
    for path in modules():
        if room(path) not in {"corpora", "config"}:
            text = path.read_text(encoding="utf-8").lower()
            assert "msmarco" not in text.replace("msmarco.gin", ""), path


def test_extras_that_messages_name_can_be_installed():
    named = {
        extra
        for path in modules()
        for extra in re.findall(r"dgr_jax\[(\w+)\]", path.read_text(encoding="utf-8"))
    }
    offered = re.findall(r'^        "(\w+)": \[', (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert {"encoders", "irds"} <= named <= set(offered)
