"""What is damaged in a folder without lists of files is one line that names a file."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from dgr_jax.corpora.store import PassageStore
from dgr_jax.data.vocabulary import VIEWS, Vocabulary
from dgr_jax.decoding import suffix_array, trie
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.model_dir import kept
from dgr_jax.models.t5 import T5Config
from dgr_jax.retrieval import exact_search
from dgr_jax.retrieval.generative import Search
from dgr_jax.retrieval.kinds import write_student
from dgr_jax.retrieval.multiview.view_indexes import ViewIndexes
from dgr_jax.retrieval.retriever import Retriever
from dgr_jax.stages import pseudo_queries
from dgr_jax.stages.candidates import _is_whole
from dgr_jax.stages.prepared import export
from dgr_jax.stages.teach import _candidates
from dgr_jax.training import metrics
from dgr_jax.training.arrays import read_arrays, write_arrays
from tests import view_collections

DAMAGES = {
    "half": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "garbage": lambda content: bytes(range(256)) * 4,
    "foreign": lambda content: b'{"format": 3}',
    "deep": lambda content: b"[" * 100_000,
    "delete": None,
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A prepared collection of several views, token arrays and vectors among them."""
    folder = tmp_path_factory.mktemp("prepared")
    view_collections.prepare(folder, VIEWS)
    write_arrays(folder / "arrays", [{"tokens": np.arange(12, dtype=np.int32).reshape(4, 3)}])
    np.save(folder / "passages.npy", np.ones((5, 4), np.float32))
    np.savez(folder / "candidates.npz", passages=np.ones((3, 2)), scores=np.ones((3, 2)))
    return folder


def read_vocabulary(folder):
    Vocabulary.load(folder).encode("bees make honey")


def read_passages(folder):
    passages = PassageStore(folder / "passages")
    assert len(passages.pids) == len(list(passages)) == len(passages)
    assert [passages[i] for i in range(len(passages))] == list(passages)


def read_table(folder):
    for view in ("title", "query"):
        IdentifierTable.load(folder / "identifiers" / view).report()


# The beginning of a file's name -> what reads it.
READERS = {
    "spiece.model": read_vocabulary,
    "vocabulary.json": read_vocabulary,
    "passages.npy": lambda folder: exact_search.open_vectors(folder / "passages.npy"),
    "passages/": read_passages,
    "identifiers/": read_table,
    "trie/": lambda folder: [trie.load(folder / "trie" / view) for view in ("title", "query")],
    "text/": lambda folder: suffix_array.load(folder / "text"),
    "arrays/": lambda folder: read_arrays(folder / "arrays"),
    "candidates.npz": lambda folder: _candidates(folder),
    "views.json": lambda folder: ViewIndexes.load(folder, Vocabulary.load(folder)),
}


def read(folder, name):
    """Opens and reads what a file belongs to."""
    (reader,) = [reader for begin, reader in READERS.items() if name.startswith(begin)]
    reader(folder)


def spoil(path, damage):
    if DAMAGES[damage] is None:
        path.unlink()
    else:
        path.write_bytes(DAMAGES[damage](path.read_bytes()))


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_that_cannot_be_read_is_named(prepared, tmp_path, damage):
    copy = tmp_path / "copy"
    shutil.copytree(prepared, copy)
    names = [p.relative_to(copy).as_posix() for p in sorted(copy.rglob("*")) if p.is_file()]
    assert len(names) > 50
    for name in names:
        if damage in ("garbage", "foreign", "deep") and not name.endswith((".json", ".jsonl")):
            continue
        spoil(copy / name, damage)
        with pytest.raises((ValueError, OSError)) as error:
            read(copy, name)
        assert "\n" not in str(error.value)
        assert str(copy) in str(error.value), name
        shutil.copyfile(prepared / name, copy / name)
        read(copy, name)


def test_every_file_of_a_list_is_compared(prepared, tmp_path):
    """A single bit of any file, in a stage that is done."""
    stage = tmp_path / "model" / "prepare"
    shutil.copytree(prepared, stage)
    record = {"status": "done", "files_made": kept.sign(stage)}
    (stage / "stage.json").write_text(json.dumps(record))
    again = f"`python -m dgr_jax.train --model_dir={tmp_path / 'model'}` makes it again"
    for name in record["files_made"]:
        content = (stage / name).read_bytes()
        changed = bytearray(content)
        changed[len(content) // 3] ^= 16
        (stage / name).write_bytes(changed)
        with pytest.raises(kept.Damaged) as error:
            read(stage, name)
        assert str(error.value).startswith(f"{stage / name}: got other contents than the ")
        assert str(error.value).endswith(again)
        (stage / name).write_bytes(content)
        read(stage, name)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_student_that_cannot_be_read(tmp_path, damage):
    (tmp_path / "generate").mkdir()
    write_student(tmp_path / "generate", "docid", T5Config(vocab_size=8), Search(), ("generate",))
    spoil(tmp_path / "generate" / "student.json", damage)
    with pytest.raises((ValueError, OSError), match=r"student\.json|no trained student") as error:
        Retriever.load(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_student_of_unknown_settings(prepared, tmp_path):
    (tmp_path / "generate").mkdir()
    shutil.copytree(prepared, tmp_path / "prepare")
    path = tmp_path / "generate" / "student.json"
    path.write_text('{"model": {"vocab_sine": 8}, "search": {}}')
    with pytest.raises(kept.Damaged, match=r"student\.json: cannot be read \(TypeError: .*vocab_s"):
        Retriever.load(tmp_path)


def test_parts_of_candidates_that_were_cut_off_are_asked_again(tmp_path, caplog):
    part = tmp_path / "part-000000000.npz"
    assert not _is_whole(part)
    np.savez(part, passages=np.arange(64), scores=np.ones(64))
    assert _is_whole(part)
    content = part.read_bytes()
    flipped = bytearray(content)
    flipped[200] ^= 1
    for damaged in (content[:150], b"", bytes(flipped), b"PK\x03\x04"):
        part.write_bytes(damaged)
        caplog.clear()
        assert not _is_whole(part)
        assert caplog.text.count("its queries are asked again") == 1


@pytest.mark.parametrize(
    "end", [b'{"step": 3, "lo', b"\xff\xfe\n", b"[]\n", b'{"stfp": 3}\n', b'{"step": null}\n']
)
def test_metrics_go_on_after_the_last_row_that_can_be_read(tmp_path, monkeypatch, end):
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.0}\n'
    path.write_bytes(whole + end + b'{"step": 9, "loss": 7.0}\n')
    assert [row["step"] for row in metrics.read_jsonl(path)] == [1, 2]
    monkeypatch.setattr(metrics, "_summary_writers", lambda: None)
    with metrics.MetricsWriter(tmp_path, after=2) as writer:
        writer.write(3, {"loss": 0.5})
    assert path.read_bytes() == whole + b'{"step": 3, "loss": 0.5}\n'


def test_blocks_of_pseudo_queries_that_were_cut_off_are_sampled_again(tmp_path, caplog):
    made = SimpleNamespace(
        store=SimpleNamespace(pids=["p0", "p1"]),
        vocabulary=SimpleNamespace(decode=lambda row: " ".join(map(str, row))),
        test_queries=frozenset(),
    )
    assert not pseudo_queries._is_whole(tmp_path, 0)
    pseudo_queries._write_block(tmp_path, made, 0, np.arange(8).reshape(2, 2, 2))
    assert pseudo_queries._is_whole(tmp_path, 0)
    counted, texts = tmp_path / "part-000000000.json", tmp_path / "part-000000000.tsv"
    for path, damage in [
        (counted, "half"),
        (counted, "foreign"),
        (texts, "half"),
        (texts, "delete"),
    ]:
        content = path.read_bytes()
        spoil(path, damage)
        caplog.clear()
        assert not pseudo_queries._is_whole(tmp_path, 0)
        assert "is damaged; its passages are sampled again" in caplog.text
        path.write_bytes(content)
    older = json.loads(counted.read_text())
    del older["texts"]
    counted.write_text(json.dumps(older))
    assert pseudo_queries._is_whole(tmp_path, 0)


@pytest.mark.slow
def test_a_sample_of_the_damage_campaign(command, tiny_model_dir):
    flags = (f"--model_dir={tiny_model_dir}", "--damages=12")
    assert "docid: 12 damages" in command("tests.campaigns.damage", *flags).stdout


def test_an_export_carries_its_list_and_refuses_damage(prepared, tmp_path):
    origin = tmp_path / "model" / "prepare"
    shutil.copytree(prepared, origin)
    (origin / "tfds").mkdir()
    (origin / "tfds" / "records").write_bytes(b"examples")
    (tmp_path / "model" / "config.gin").write_text("")
    record = {"status": "done", "files_made": kept.sign(origin)}
    (origin / "stage.json").write_text(json.dumps(record))
    experiment = SimpleNamespace(model_dir=str(tmp_path / "model"))
    export(experiment, str(tmp_path / "away"))
    kept.whole(tmp_path / "away" / "prepare")
    assert kept.is_listed(tmp_path / "away" / "prepare" / "spiece.model")
    spoil(origin / "spiece.model", "half")
    with pytest.raises(kept.Damaged, match=r"spiece\.model: got \d+ bytes, expected \d+ as it"):
        export(experiment, str(tmp_path / "other"))
    assert not (tmp_path / "other" / "prepare").exists()
