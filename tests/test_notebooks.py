"""Every notebook is clean as it is committed, and runs from top to bottom at the smallest size."""

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# cell -> what stands there instead, so that a run takes seconds.
SMALLEST = {
    "tour": """
from dgr_jax.corpora.quickstart import QuickstartCollection
from dgr_jax.corpora.subset import Subset

SETTINGS = {
    "collection": Subset(QuickstartCollection(), size=24), "generate_steps": 6, "distill_steps": 3,
    "batch_size": 8, "list_batch_size": 4, "warmup_steps": 2, "query_length": 12, "num_beams": 16,
    "depth": 16, "bindings": {
        "T5Config.emb_dim": 16, "T5Config.num_heads": 2, "T5Config.head_dim": 8,
        "T5Config.mlp_dim": 32, "T5Config.num_encoder_layers": 1, "T5Config.num_decoder_layers": 1,
        "SentencePiece.size": 400, "TfidfSvd.dim": 8, "ResidualQuantization.codebook_size": 8,
        "TopM.size": 8, "Candidates.max_queries": 16, "Mesh.data": 1,
    },
}
MODEL_DIR = "quickstart_model"
""",
    "own_data": """
SETTINGS = {"generate_steps": 6, "distill_steps": 3, "batch_size": 8, "num_beams": 12, "depth": 12}
MODEL_DIR = "own_model"
""",
}  # fmt: skip


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_clean_and_installs_first(path):
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code[0].id == "install" and '"pip", "install"' in code[0].source
    for cell in code:
        assert cell.outputs == [] and cell.execution_count is None
        compile(cell.source, cell.id, "exec")
    assert len(text) < 20_000


def executed(name, folder, **environment):
    """cell id -> what it has printed and shown, as text; a failing cell raises."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.id == "settings":
            cell.source = SMALLEST[name]
    given = {"XLA_FLAGS": "--xla_backend_optimization_level=0", "PYTHONPATH": str(ROOT)}
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in (given | environment).items():
            patch.setenv(variable, value)
        NotebookClient(
            notebook, timeout=300, resources={"metadata": {"path": str(folder)}}
        ).execute()
    return {
        cell.id: "".join(
            output.get("text", "") or str(dict(output.get("data", {}))) for output in cell.outputs
            if output.get("name") != "stderr"
        )
        for cell in notebook.cells if cell.cell_type == "code"
    }  # fmt: skip


@pytest.mark.slow
def test_the_tour_trains_asks_and_shows(tmp_path):
    said = executed("tour", tmp_path)
    assert "--gin_file=quickstart.gin" in said["command"]
    assert said["asked"].count("log_prob") == 3
    assert "planned" in said["came-out"] and "image/png" in said["curves"]
    assert [line.split()[0] for line in said["systems"].splitlines()] == [
        "bm25", "generate", "distill"
    ]  # fmt: skip


@pytest.mark.slow
def test_own_data_train_change_and_are_saved(tmp_path):
    said = executed("own_data", tmp_path)
    assert said["asked"].count("->") == 3
    assert "version 2 has 12 passages; Pine: True Tram: False" in said["come"]
    assert "README.md" in said["save"] and "config.gin" in said["save"]


@pytest.mark.slow
def test_the_inside_of_a_search_is_shown(tiny_model_dir, tmp_path):
    said = executed("look_inside", tmp_path, DGR_JAX_MODEL_DIR=str(tiny_model_dir))
    assert said["levels"].startswith("level 1: ") and "log p = " in said["levels"]
    assert "image/png" in said["first"]
    assert "found at rank" in said["lost"] and said["narrow"].startswith("not among the 1 passages")
