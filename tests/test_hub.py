"""A retriever as a folder to publish, and a stand-in of the Hugging Face Hub."""

from __future__ import annotations

import functools
import json
import shutil
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from dgr_jax.corpora.types import Passage
from dgr_jax.model_dir import kept
from dgr_jax.models import tensor_files
from dgr_jax.retrieval.retriever import Retriever

QUESTIONS = ["Why do bees dance?", "What moves the tides?"]


@pytest.fixture(scope="module")
def saved(tiny_model_dir, tmp_path_factory) -> Path:
    retriever = Retriever.load(tiny_model_dir)
    folder = tmp_path_factory.mktemp("published") / "retriever"
    return retriever.save(folder, license="cc0-1.0", datasets=("me/bees",))


def answers(retriever: Retriever) -> list[list[tuple[str, float]]]:
    return [[(hit.pid, hit.score) for hit in hits] for hits in retriever.search(QUESTIONS, k=5)]


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def test_the_folder_answers_as_its_model_dir_and_lacks_what_only_training_reads(
    saved, tiny_model_dir
):
    assert answers(Retriever.load(saved)) == answers(Retriever.load(tiny_model_dir))
    made = {path.relative_to(saved).as_posix() for path in saved.rglob("*") if path.is_file()}
    expected = "distill/model.safetensors", "prepare/spiece.model", "prepare/trie/header.json"
    assert {*expected, "distill/student.json", "evaluate/metrics.json"} <= made
    assert {name.partition("/")[0] for name in made} == {
        "README.md", "config.gin", "pt_meta.json", "prepare", "distill", "evaluate",
    }  # fmt: skip
    kinds = {Path(name).suffix for name in made}
    assert kinds <= {".md", ".gin", ".json", ".jsonl", ".txt", ".npy", ".model", ".safetensors"}
    assert not [name for name in made if "arrays" in name or "queries" in name]


def test_parameters_are_those_of_the_checkpoint(saved, tiny_model_dir):
    import flax.traverse_util

    stored = tensor_files.read_folder(saved / "distill")
    params = Retriever.load(tiny_model_dir, system="distill").decoder.params
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    assert stored.keys() == flat.keys()
    for name in flat:
        np.testing.assert_array_equal(stored[name], flat[name])


def test_the_card_says_what_was_made(saved):
    text = (saved / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    fields = {k: json.loads(v) for k, _, v in (row.partition(": ") for row in front.splitlines())}
    assert (fields["library_name"], fields["license"]) == ("dgr_jax", "cc0-1.0")
    assert fields["datasets"] == ["me/bees"]
    measures = json.loads((saved / "evaluate/metrics.json").read_text())
    (entry,) = fields["model-index"]
    for result in entry["results"]:
        given = {metric["type"]: metric["value"] for metric in result["metrics"]}
        assert given == measures["distill"][result["dataset"]["split"]]
    assert "# A retriever over 240 passages" in body
    assert f"| distill | {measures['distill']['test']['Success@1']:.4f} |" in body
    assert "distill against control, RR@10: " in body
    assert "  - emb_dim: 16" in body
    for word in ("--gin_file=config.gin", "Licence: cc0-1.0", "## Limits", "Retriever.from_hub"):
        assert word in body


def test_a_file_that_was_changed_is_named(saved, tmp_path):
    folder = copy(saved, tmp_path / "changed")
    path = folder / "distill/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(kept.Damaged, match="model.safetensors"):
        Retriever.load(folder, system="distill")


def test_parameters_of_another_model_are_refused(saved, tmp_path):
    folder = copy(saved, tmp_path / "other")
    (folder / "distill/stage.json").write_text(
        json.dumps(json.loads((folder / "distill/stage.json").read_text()) | {kept.KEY: {}})
    )
    arrays = dict(tensor_files.read_folder(folder / "distill"))
    arrays.pop(sorted(arrays)[0])
    tensor_files.write_folder(folder / "distill", {k: np.array(v) for k, v in arrays.items()})
    with pytest.raises(ValueError, match="is missing"):
        Retriever.load(folder, system="distill")


def test_what_cannot_be_saved(saved, tmp_path):
    retriever = Retriever.load(saved)
    with pytest.raises(FileExistsError, match="there is something already, expected a new folder"):
        retriever.save(saved)
    pid = retriever.store.pids[0]
    with pytest.raises(ValueError, match="got one that was restricted"):
        retriever.restrict([pid]).save(tmp_path / "some")
    with pytest.raises(ValueError, match="or has no trained student"):
        Retriever.load(saved, system="bm25").save(tmp_path / "bm25")
    again = retriever.save(tmp_path / "again")
    assert answers(Retriever.load(again)) == answers(retriever)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_an_index_that_was_changed_is_saved_as_it_answers(saved, tmp_path):
    model_dir = tmp_path / "model"
    shutil.copytree(saved, model_dir)
    retriever = Retriever.load(model_dir)
    pids = retriever.store.pids
    retriever.add([Passage("later", "Sourdough rises by wild yeast.", "Sourdough")])
    retriever.remove(pids[:1])
    again = Retriever.load(retriever.save(tmp_path / "again"))
    assert again.version == retriever.version == 2
    assert set(again.store.pids) == {*pids[1:], "later"}
    assert answers(again) == answers(retriever)


# The hub


class Hub:
    """As much of huggingface_hub as is called, with its repositories in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, []
        self.HfApi = lambda: self

    def create_repo(self, *, repo_id, private, repo_type, exist_ok):
        self.calls.append(("create", repo_id, private, repo_type, exist_ok))
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        self.calls.append(("upload", repo_id, commit_message))
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)

    def snapshot_download(self, repo_id, *, revision):
        self.calls.append(("download", repo_id, revision))
        if not (self.folder / repo_id).is_dir():
            raise ConnectionError("no route to host\nmore")
        return str(self.folder / repo_id)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Hub:
    stand_in = Hub(tmp_path / "hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)
    return stand_in


def test_push_and_fetch(hub, saved):
    retriever = Retriever.load(saved)
    assert retriever.push_to_hub("me/bees", private=True, message="one") == "https://hub/me/bees"
    assert hub.calls == [
        ("create", "me/bees", True, "model", True),
        ("upload", "me/bees", "one"),
    ]
    fetched = Retriever.from_hub("me/bees", revision="main", num_beams=4)
    assert hub.calls[-1] == ("download", "me/bees", "main")
    assert fetched.decoder.search.num_beams == 4
    assert answers(Retriever.from_hub("me/bees"))[0] == answers(retriever)[0]
    assert answers(Retriever.from_hub(saved)) == answers(retriever)


def test_a_hub_that_is_not_reached_is_one_clear_line(hub, saved, tmp_path):
    message = (
        "'me/none' could not be reached on the hub .ConnectionError: no route to host.; without a "
        "network, write a folder by Retriever.save and give it to Retriever.from_hub$"
    )
    with pytest.raises(OSError, match=message):
        Retriever.from_hub("me/none")
    with pytest.raises(FileNotFoundError, match="/nowhere: no such folder"):
        Retriever.from_hub("/nowhere")
    with pytest.raises(FileNotFoundError, match="none: no such folder"):
        Retriever.from_hub(tmp_path / "none")


def test_without_the_library_the_extra_is_named(monkeypatch, saved):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"Retriever.from_hub needs the extra 'dgr_jax\[pretrai"):
        Retriever.from_hub("me/bees")
    with pytest.raises(ImportError, match="Retriever.push_to_hub needs the extra"):
        Retriever.load(saved).push_to_hub("me/bees")


def test_the_real_library_has_what_is_called():
    """The stand-in takes what the library takes."""
    import inspect

    library = pytest.importorskip("huggingface_hub")
    for stand_in, real in (
        (Hub.create_repo, library.HfApi.create_repo),
        (Hub.upload_folder, library.HfApi.upload_folder),
        (Hub.snapshot_download, library.snapshot_download),
    ):
        asked = inspect.signature(stand_in).parameters.keys() - {"self"}
        assert asked <= inspect.signature(real).parameters.keys()


def test_pyterrier_opens_it_as_an_artifact(saved):
    pytest.importorskip("pyterrier")
    from dgr_jax.integrations.pyterrier import DgrArtifact

    meta = json.loads((saved / "pt_meta.json").read_text())
    assert (meta["type"], meta["format"]) == (
        DgrArtifact.ARTIFACT_TYPE, DgrArtifact.ARTIFACT_FORMAT,
    )  # fmt: skip
    found = DgrArtifact.load(str(saved)).retriever(num_results=5).search(QUESTIONS[0])
    assert found["docno"].tolist() == [pid for pid, _ in answers(Retriever.load(saved))[0]]


def test_pyterrier_publishes_and_fetches_it_in_its_own_format(saved, tmp_path, monkeypatch):
    pytest.importorskip("pyterrier")
    from dgr_jax.integrations.pyterrier import DgrArtifact

    monkeypatch.setenv("PYTERRIER_HOME", str(tmp_path / "home"))
    DgrArtifact.load(str(saved)).build_package(str(tmp_path / "package.tar.lz4"))
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            url = f"http://127.0.0.1:{server.server_port}/package.tar.lz4"
            fetched = DgrArtifact.from_url(url)
        finally:
            server.shutdown()
            thread.join()
    assert fetched.path.is_relative_to(tmp_path / "home")
    assert answers(Retriever.load(fetched.path)) == answers(Retriever.load(saved))
