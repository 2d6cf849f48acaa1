"""Passages that are added to whole experiments, from the command line, and found."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from dgr_jax.corpora.store import PassageStore
from dgr_jax.corpora.types import Passage
from dgr_jax.retrieval import dense, exact_search, kept_vectors
from dgr_jax.retrieval.living import update
from dgr_jax.retrieval.retriever import Retriever
from tests.conftest import TINY
from tests.test_dense_experiment import DENSE

NEW = Passage("zebra-1", "Zebras have stripes that confuse flies.", "Zebra")

pytestmark = pytest.mark.slow


def test_a_student_goes_on_with_passages_that_were_added(tiny_model_dir, tmp_path, command):
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    new, pids = tmp_path / "new.jsonl", tmp_path / "pids.txt"
    new.write_text(json.dumps({"pid": NEW.pid, "title": NEW.title, "text": NEW.text}))
    gone = Retriever.load(folder).store.pids[0]
    pids.write_text(f"{gone}\n")
    to = f"--model_dir={folder}"
    done = command("dgr_jax.update", to, f"--add={new}", f"--remove={pids}")
    assert "index: version 1 has 240 passages (1 added, 1 removed), made in " in done.stderr
    asked = command("dgr_jax.retrieve", to, "--system=bm25", "--query=zebra stripes")
    assert "zebra-1" in asked.stdout
    listed = command("dgr_jax.update", to, "--list").stdout
    assert "answers" in listed
    again = command("dgr_jax.train", to)
    assert again.stderr.count("skipped") == 8, "stages never see the index"
    assert "version 0 answers" in command("dgr_jax.update", to, "--rollback").stderr
    for flags, expected in [
        ((to,), "expected --add, --remove or both, or one of --list, --rollback, --compact"),
        ((to, "--list", f"--add={new}"), "expected --add, --remove or both, or one of --list"),
        ((to, f"--add={tmp_path}/none"), "no such file; expected a file of JSON lines"),
        ((f"--model_dir={tmp_path}", "--list"), "no trained student in"),
        (("--list",), "--model_dir is missing"),
    ]:
        refused = command("dgr_jax.update", *flags, check=False)
        assert refused.returncode == 2
        assert expected in refused.stderr
        assert "Traceback" not in refused.stderr


def changed(folder, system: str, question: str) -> None:
    """Adds a passage that the system finds, within shapes that it has compiled once."""
    retriever = Retriever.load(folder, system=system)
    before = [hit.pid for hit in retriever.search([question], k=5)[0]]
    retriever.add([NEW, Passage("copy", retriever.store[7].text, retriever.store[7].title)])
    assert retriever.store.index_of("copy") == len(retriever.store) - 1
    after = [hit.pid for hit in retriever.search([question], k=8)[0]]
    assert [pid for pid in after if pid in before] == [p for p in before if p in after]
    gone = after[0]
    assert retriever.remove([gone]) == 2
    assert gone not in [hit.pid for hit in retriever.search([question], k=8)[0]]
    assert Retriever.load(folder, system=system).version == 2
    update.compact(update.versions(folder))
    assert retriever.newest().version == 3


def test_a_dense_retriever_goes_on_with_passages_that_were_added(tmp_path, command):
    folder = tmp_path / "model"
    command("dgr_jax.train", *DENSE, f"--model_dir={folder}")
    changed(folder, "dense", "Why do bees dance?")
    versions = update.versions(folder)
    place, capacity = kept_vectors.located(folder / "dense", versions.at(3))
    pids = PassageStore(versions.at(3) / "passages").pids
    vectors = exact_search.open_vectors(place / dense.VECTORS)
    assert len(pids) == len(vectors) < capacity
    old = PassageStore(folder / "prepare" / "passages")
    before = exact_search.open_vectors(folder / "dense" / dense.VECTORS)
    there = [pid for pid in pids if pid in old]
    rows = [pids.index(pid) for pid in there]
    np.testing.assert_array_equal(vectors[rows], before[[old.index_of(pid) for pid in there]])
    np.testing.assert_allclose(vectors[pids.index("copy")], before[7], atol=1e-5)


def test_a_student_of_several_views_goes_on_with_passages_that_were_added(tmp_path, command):
    folder = tmp_path / "model"
    tiny = ("--gin_file=quickstart_dgr.gin", *TINY[1:])
    command("dgr_jax.train", *tiny, f"--model_dir={folder}", "--stages=generate")
    changed(folder, "generate", "Why do bees dance?")


def test_a_student_of_atomic_identifiers_finds_passages_that_were_added(tmp_path, command):
    folder = tmp_path / "model"
    flags = [flag for flag in TINY if "codebook_size" not in flag and "TfidfSvd" not in flag]
    command(
        "dgr_jax.train", *flags, "--gin.IDENTIFIERS=@Atomic()", "--gin.Atomic.reserve=2",
        "--gin.GENERATE_STEPS=300", "--gin.BATCH_SIZE=64", "--gin.Training.checkpoint_every=300",
        "--stages=generate", f"--model_dir={folder}",
    )  # fmt: skip
    first = Retriever.load(folder)
    asked = [passage.title for passage in first.store]
    found = lambda retriever, texts: [[h.pid for h in hits] for hits in retriever.search(texts, 8)]
    before = found(first, asked)
    search = first.decoder._decode
    compiled = search._cache_size()
    versions = update.versions(folder)
    update.update(versions, [NEW])
    retriever = first.newest()
    texts = [NEW.title, NEW.text]
    assert [pids[0] for pids in found(retriever, texts)] == [NEW.pid] * 2
    after = found(retriever, asked)
    same = [now[0] == was[0] for now, was in zip(after, before, strict=True)]
    assert sum(same) >= 0.95 * len(same)
    for now, was in zip(after, before, strict=True):
        staying = [pid for pid in now if pid != NEW.pid]
        assert staying == was[: len(staying)], "the rows of old passages stay"
    update.rollback(versions)
    assert found(retriever.newest(), asked) == before
    versions.switch(1)
    bees = Passage("dance-1", "Bees dance. A dance tells other bees where flowers are.", "Dances")
    update.update(versions, [bees], [before[0][0]])
    both = retriever.newest()
    now = [pids[0] for pids in found(both, [*texts, bees.title])]
    assert now == [NEW.pid, NEW.pid, bees.pid]
    assert search._cache_size() == compiled
    with pytest.raises(ValueError, match="Atomic: got 1 passages, expected at most 0: so many of"):
        both.add([Passage("third", "Nothing is left.")])
    update.update(versions, [Passage("third", "A row that was left.", "Third")], [NEW.pid])
    third = found(both.newest(), ["Third", NEW.title])
    assert third[0][0] == "third"
    assert NEW.pid not in third[1]
    update.rollback(versions)
    assert found(both.newest(), asked) == found(both, asked)
    versions.switch(3)
    update.compact(versions)
    assert found(both.newest(), ["Third", NEW.title]) == third
    assert found(Retriever.load(folder), ["Third", NEW.title]) == third
