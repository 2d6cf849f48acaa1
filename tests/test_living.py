"""Passages that are added to a trained student's index, and removed from it."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest

from dgr_jax.corpora import changes, store
from dgr_jax.corpora.store import PassageStore
from dgr_jax.corpora.types import Passage
from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.identifiers.embeddings import TfidfSvd
from dgr_jax.identifiers.kept_models import KEPT
from dgr_jax.identifiers.rq import ResidualQuantization
from dgr_jax.identifiers.scheme import Material
from dgr_jax.identifiers.table import IdentifierTable
from dgr_jax.model_dir import index_versions, kept, records, writer_lock
from dgr_jax.retrieval import kinds
from dgr_jax.retrieval.bm25 import Bm25, Bm25Baseline, Bm25Index
from dgr_jax.retrieval.kept_postings import PLANS, KeptPostings, place
from dgr_jax.retrieval.living import update
from dgr_jax.retrieval.planned import Planned
from dgr_jax.retrieval.retriever import Retriever
from dgr_jax.retrieval.simultaneous import Lexical
from dgr_jax.serving import living
from tests.test_old_model_dir import KEPT as ARCHIVE

SCHEME = ResidualQuantization(num_codes=2, codebook_size=16, embeddings=TfidfSvd(dim=8))
ZEBRA = Passage("zebra-1", "Zebras have stripes that confuse flies.", "Zebra")
BEES = Passage("dance-1", "Why do bees dance? A dance tells other bees where flowers are.", "Bees")
QUESTION = "Why do bees dance?"


def kept_model(folder: Path) -> tuple[Path, PassageStore]:
    """(MODEL_DIR, its passages) of a trained student, with the model that later passages need."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    prepared = folder / "model" / "prepare"
    passages, vocabulary = PassageStore(prepared / "passages"), Vocabulary.load(prepared)
    material = Material(passages, vocabulary.encode, vocabulary.first_code_id, keep=prepared / KEPT)
    SCHEME.tables(material)
    return folder / "model", passages


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A MODEL_DIR whose prepare stage has kept its model, evaluated with BM25 and a plan."""
    model_dir, passages = kept_model(tmp_path_factory.mktemp("living"))
    prepared = model_dir / "prepare"
    plan = Lexical(planned=20, num_beams=8)
    KeptPostings.save(
        plan.bm25.fit(passages).kept(), place(prepared / PLANS, plan.bm25), plan.bm25,
        passages.pids,
    )  # fmt: skip
    systems = [Planned("planned", plan), Bm25Baseline("bm25", plan.bm25)]
    kinds.write_untrained(model_dir, systems, depth=8)
    return model_dir


@pytest.fixture
def model_dir(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "model")


def found(retriever: Retriever, question: str = QUESTION) -> list[str]:
    (hits,) = retriever.search([question], k=8)
    return [hit.pid for hit in hits]


def test_passages_come_and_go_for_a_student_a_plan_and_bm25(model_dir):
    names = ("distill", "planned", "bm25")
    students = {name: Retriever.load(model_dir, system=name) for name in names}
    before = {name: found(student) for name, student in students.items()}
    assert students["planned"].add([ZEBRA, BEES]) == 1
    for name, student in students.items():
        student = student.newest()
        assert student.version == 1
        assert len(student.store) == 27
        assert found(student, "zebra stripes")[0] == "zebra-1" or name == "distill"
        assert "dance-1" in found(student)
        staying = [p for p in found(student) if p not in ("dance-1", "zebra-1")]
        assert staying == before[name][: len(staying)], "those that were there keep their order"
    gone = before["planned"][0]
    assert students["planned"].remove([gone, "zebra-1"]) == 2
    for name in names:
        student = Retriever.load(model_dir, system=name)
        assert student.version == 2
        assert gone not in found(student)
        assert "zebra-1" not in found(student, "zebra stripes")
    assert students["distill"].version == 0, "an opened retriever stays as it is"
    assert found(students["distill"]) == before["distill"]


def test_a_passage_of_the_same_pid_replaces_the_one_that_was(model_dir):
    retriever = Retriever.load(model_dir, system="bm25")
    pid = retriever.store.pids[3]
    assert retriever.add([Passage(pid, ZEBRA.text, ZEBRA.title)]) == 1
    assert len(retriever.store) == 25
    assert retriever.store[retriever.store.index_of(pid)].text == ZEBRA.text
    assert found(retriever, "zebra")[0] == pid
    (version,) = update.versions(model_dir).all()
    assert (version.added, version.removed, version.passages) == (1, 1, 25)


def test_passages_that_are_there_as_they_are_make_no_version(model_dir, caplog):
    versions = update.versions(model_dir)
    there = list(PassageStore(versions.at(0) / "passages"))
    with caplog.at_level(logging.INFO):
        kept_as_it_is = update.update(versions, there[:2])
    assert (kept_as_it_is.version, kept_as_it_is.passages) == (0, 25)
    assert "index: 2 passages are there as they are\n" in caplog.text.replace("  ", " ")
    assert "index: version 0 stays as it is" in caplog.text
    assert Retriever.load(model_dir, system="bm25").add(there) == 0
    assert not versions.all()
    made = update.update(versions, [*there[:2], ZEBRA])
    assert (made.version, made.added, made.removed, made.passages) == (1, 1, 0, 26)
    assert update.update(versions, [ZEBRA]) == made
    assert update.update(versions, [there[0]], [there[1].pid]).removed == 1


def test_those_that_stay_keep_their_identifiers_and_new_ones_are_of_the_nearest_codes(model_dir):
    retriever = Retriever.load(model_dir, system="distill")
    before, old = retriever.decoder.table, retriever.store
    copy = old[7]
    retriever.add([ZEBRA, Passage("copy", copy.text, copy.title)])
    retriever.remove([old.pids[0]])
    table, rows = retriever.decoder.table, retriever.decoder.table.rows_of_passages()
    old_rows = before.rows_of_passages()
    for pid in old.pids[1:]:
        now = table.tokens[rows[retriever.store.index_of(pid)]]
        assert now.tolist() == before.tokens[old_rows[old.index_of(pid)]].tolist()
    assert table.num_code_tokens == before.num_code_tokens
    first = table.tokens[rows[retriever.store.index_of("copy")]][0]
    assert first == before.tokens[old_rows[7]][0], "the same text has the same first code"
    assert len(np.unique(table.tokens, axis=0)) == 26


def test_nothing_is_compiled_again_within_a_size_class(model_dir):
    retriever = Retriever.load(model_dir, system="distill")
    retriever.search([QUESTION], k=8)
    search = retriever.decoder._decode
    compiled = search._cache_size()
    for number in range(3):
        retriever.add([Passage(f"new-{number}", f"{ZEBRA.text} {number}", "Zebra")])
        retriever.search([QUESTION], k=8)
        assert retriever.decoder._decode is search
    retriever.remove(["new-1"])
    retriever.search([QUESTION], k=8)
    assert search._cache_size() == compiled


def test_versions_are_listed_rolled_back_and_compacted(model_dir, capsys, caplog):
    versions = update.versions(model_dir)
    with pytest.raises(ValueError, match="version 0, the prepare stage, answers; expected a later"):
        update.rollback(versions)
    update.update(versions, [ZEBRA])
    update.update(versions, [], ["zebra-1"])
    living.rollback(str(model_dir))
    assert versions.current() == 1
    assert Retriever.load(model_dir).version == 1
    update.update(versions, [BEES])
    assert [(v.version, v.before, v.passages) for v in versions.all()] == [
        (1, 0, 26), (2, 1, 25), (3, 1, 27),
    ]  # fmt: skip
    living.show(str(model_dir))
    printed = capsys.readouterr().out
    assert printed.count("answers") == 1
    assert "prepare stage" in printed
    living.compact(str(model_dir))
    assert [v.version for v in versions.all()] == [4]
    assert [path.name for path in sorted(versions.folder.iterdir())] == ["4", "current.json"]
    with pytest.raises(ValueError, match="version 3, from which 4 was made, was dropped"):
        update.rollback(versions)


def test_a_compaction_counts_words_anew(model_dir):
    versions, bm25 = update.versions(model_dir), Lexical().bm25
    update.update(versions, [ZEBRA, BEES], ["bees-02"])
    passages = PassageStore(versions.at(1) / "passages")
    anew = bm25.fit(passages)
    grown = KeptPostings.load(place(versions.at(1) / PLANS, bm25), passages.pids)
    index = bm25.reopened(grown.postings, passages.pids)
    question = "Why do bees dance? Zebra stripes"
    assert not np.allclose(index.scores(question), anew.scores(question))
    assert np.corrcoef(index.scores(question), anew.scores(question))[0, 1] > 0.95
    update.compact(versions)
    renewed = Retriever.load(model_dir, system="bm25").decoder.index
    np.testing.assert_array_equal(renewed.scores(question), anew.scores(question))


def with_queries(model_dir: Path) -> tuple[index_versions.Versions, Bm25]:
    """The versions of an index whose plan counts training queries, and its settings."""
    passages, bm25 = model_dir / "prepare" / "passages", Bm25(queries_weight=0.5)
    store.write_queries({"bees-02": ["A brouillard?"], BEES.pid: ["Which brouillard?"]}, passages)
    of = PassageStore(passages)
    bm25.fit(of).kept().save(place(passages.parent / PLANS, bm25), bm25, of.pids)
    return update.versions(model_dir), bm25


def postings_of(versions: index_versions.Versions, version: int, bm25: Bm25) -> Bm25Index:
    pids = PassageStore(versions.at(version) / "passages").pids
    return bm25.reopened(
        KeptPostings.load(place(versions.at(version) / PLANS, bm25), pids).postings, pids
    )


def test_training_queries_count_for_passages_that_come_and_stay(model_dir):
    versions, bm25 = with_queries(model_dir)
    update.update(versions, [ZEBRA, BEES])
    passages = PassageStore(versions.at(1) / "passages")
    scores = postings_of(versions, 1, bm25).scores("Brouillards")
    asked = [passages.index_of(pid) for pid in ("bees-02", BEES.pid)]
    assert np.flatnonzero(scores).tolist() == sorted(asked)
    update.compact(versions)
    index, passages = postings_of(versions, 2, bm25), PassageStore(versions.at(2) / "passages")
    question = "Who waggles stripes in brouillards?"
    np.testing.assert_array_equal(index.scores(question), bm25.fit(passages).scores(question))


def test_a_version_of_before_training_queries_were_kept_has_those_of_the_prepare_stage(model_dir):
    versions = update.versions(model_dir)
    update.update(versions, [ZEBRA])
    with_queries(model_dir)
    planned = {"system": "planned", "queries_weight": 0.5, "ranked_by": "plan"}
    retriever = Retriever.load(model_dir, **planned)
    assert retriever.version == 1 and found(retriever, "brouillard") == ["bees-02"]
    retriever.add([BEES])
    assert sorted(found(retriever, "brouillard")) == sorted(["bees-02", BEES.pid])


def test_a_published_folder_without_training_queries_grows_and_is_compacted(model_dir, tmp_path):
    with_queries(model_dir)
    Retriever.load(model_dir, system="planned").save(tmp_path / "published")
    versions, bm25 = update.versions(tmp_path / "published"), Bm25(queries_weight=0.5)
    assert PassageStore(versions.at(0) / "passages").queries is None
    update.update(versions, [ZEBRA])
    before = postings_of(versions, 1, bm25).scores("Which stripes in brouillards?")
    update.compact(versions)
    np.testing.assert_array_equal(
        postings_of(versions, 2, bm25).scores("Which stripes in brouillards?"), before
    )


def test_only_the_last_versions_are_kept(model_dir, monkeypatch):
    monkeypatch.setattr(index_versions.Versions.drop, "__defaults__", (3,))
    versions = update.versions(model_dir)
    for number in range(5):
        update.update(versions, [Passage(f"new-{number}", ZEBRA.text)])
    assert [v.version for v in versions.all()] == [3, 4, 5]


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != kept.MEMORY
    }


@pytest.mark.parametrize("step", ["passages", "identifiers", "trie", "plans", "manifest", "switch"])
def test_a_full_disk_changes_nothing(model_dir, monkeypatch, step):
    versions = update.versions(model_dir)
    update.update(versions, [ZEBRA])
    before = contents(model_dir)

    def full(*args, **settings):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    place = {
        "passages": (store, "_write_places"),
        "identifiers": (update.docids.IdentifierTable, "save"),
        "trie": (update.docids.trie.Trie, "save"),
        "plans": (KeptPostings, "save"),
        "manifest": (kept, "write_manifest"),
        "switch": (Path, "rename"),
    }[step]
    with monkeypatch.context() as patch:
        patch.setattr(*place, full)
        with pytest.raises(
            OSError, match="the disk is full .*; nothing was changed, version 1 ans"
        ):
            update.update(versions, [BEES])
    assert contents(model_dir) == before
    assert writer_lock.holder(model_dir) == ""
    assert update.update(versions, [BEES]).version == 2


KILLED = """
import os, signal, sys
from dgr_jax.corpora.types import Passage
from dgr_jax.model_dir import kept
from dgr_jax.retrieval.living import update
versions = update.versions(sys.argv[1])
kept.write_manifest = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
update.update(versions, [Passage("new", "Zebras.")])
"""


@pytest.mark.slow
def test_a_killed_update_leaves_the_old_version(model_dir):
    versions = update.versions(model_dir)
    update.update(versions, [ZEBRA])
    done = subprocess.run([sys.executable, "-c", KILLED, model_dir], check=False)
    assert done.returncode == -signal.SIGKILL
    assert (versions.folder / "2.partial" / "passages").is_dir()
    assert versions.current() == 1
    assert found(Retriever.load(model_dir, system="bm25"), "zebra") == ["zebra-1"]
    assert update.update(versions, [BEES]).version == 3
    assert [path.name for path in sorted(versions.folder.iterdir())] == ["1", "3", "current.json"]


class Killed(BaseException):
    """The end of a process, after which nothing is put in order."""


@pytest.mark.parametrize("step", ["identifiers", "manifest", "rename", "switch"])
def test_what_a_killed_update_has_left_is_no_version(model_dir, monkeypatch, step):
    versions = update.versions(model_dir)
    update.update(versions, [ZEBRA])

    def killed(*args, **settings):
        raise Killed

    place = {
        "identifiers": (update.docids.IdentifierTable, "save"),
        "manifest": (kept, "write_manifest"),
        "rename": (Path, "rename"),
        "switch": (index_versions.Versions, "switch"),
    }[step]
    with monkeypatch.context() as patch:
        patch.setattr(*place, killed)
        patch.setattr(shutil, "rmtree", lambda *args, **settings: None)
        with pytest.raises(Killed):
            update.update(versions, [BEES])
    assert versions.current() == 1
    assert found(Retriever.load(model_dir, system="bm25"), "zebra") == ["zebra-1"]
    update.update(versions, [BEES])
    assert "dance-1" in found(Retriever.load(model_dir, system="bm25"))
    names = sorted(path.name for path in versions.folder.iterdir())
    assert names == (["1", "2", "3"] if step == "switch" else ["1", "3"]) + ["current.json"]


def test_two_threads_update_one_after_the_other(model_dir):
    versions, made = update.versions(model_dir), []
    new = [[Passage(f"new-{number}", ZEBRA.text)] for number in range(4)]
    threads = [
        threading.Thread(target=lambda added=added: made.append(update.update(versions, added)))
        for added in new
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(version.version for version in made) == [1, 2, 3, 4]
    assert len(PassageStore(versions.at(4) / "passages")) == 29


def test_who_else_writes_is_named(model_dir, monkeypatch):
    monkeypatch.setattr(writer_lock, "PATIENCE", 0.1)
    code = (
        "import sys; from dgr_jax.model_dir import writer_lock as w; w.take(sys.argv[1]); input()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{code}", model_dir], stdin=subprocess.PIPE, text=True
    )
    try:
        while not writer_lock.holder(model_dir):
            pass
        with pytest.raises(writer_lock.Locked, match=rf"is being written by process {holder.pid} "):
            update.update(update.versions(model_dir), [ZEBRA])
    finally:
        holder.communicate("\n")
    assert not (model_dir / "index").exists()


def test_an_index_of_other_identifiers_is_not_read(model_dir, caplog):
    versions = update.versions(model_dir)
    update.update(versions, [ZEBRA])
    record = records.read_record(model_dir / "prepare")
    records.write_record(model_dir / "prepare", **record | {"fingerprint": "another"})
    with caplog.at_level(logging.WARNING):
        assert Retriever.load(model_dir, system="distill").version == 0
    assert f"{versions.folder}: has passages that were added to other identifiers" in caplog.text
    other = update.versions(model_dir)
    shutil.copytree(versions.folder, other.folder)
    with pytest.raises(ValueError, match="1: is an index of another student, expected one of the"):
        Retriever.load(model_dir, system="distill")


def test_a_damaged_index_says_how_to_go_back(model_dir):
    versions = update.versions(model_dir)
    update.update(versions, [ZEBRA])
    path = versions.at(1) / "passages" / "passages.jsonl"
    path.write_bytes(path.read_bytes().replace(b"Zebra", b"Zobra"))
    with pytest.raises(
        kept.Damaged, match=r"other contents .* dgr_jax\.update .* --rollback` goes"
    ):
        Retriever.load(model_dir, system="distill")


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (None, "current.json: is missing, expected it beside 2 versions"),
        ("", r"current.json: cannot be read \(JSONDecodeError"),
        ('{"version": null}', r"current.json: cannot be read \(TypeError"),
        ('{"version": -1}', "there is no such file"),
        ('{"version": 7}', "there is no such file"),
    ],
)
def test_an_index_that_does_not_say_which_version_answers_goes_back(
    model_dir, contents, message, capsys
):
    versions = update.versions(model_dir)
    update.update(versions, [ZEBRA])
    update.update(versions, [BEES])
    file = versions.folder / "current.json"
    file.unlink() if contents is None else file.write_text(contents)
    with pytest.raises((kept.Damaged, FileNotFoundError), match=f"{message}.*--rollback` goes"):
        Retriever.load(model_dir, system="distill")
    living.show(str(model_dir))
    assert "answers" not in capsys.readouterr().out
    living.rollback(str(model_dir))
    assert Retriever.load(model_dir, system="distill").version == 2


def test_damaged_versions_are_passed_over_on_the_way_back(model_dir, caplog):
    versions = update.versions(model_dir)
    for passage in (ZEBRA, BEES, Passage("x", "Foxes hunt at night.")):
        update.update(versions, [passage])
    (versions.at(3) / "version.json").write_text("")
    table = versions.at(2) / "passages" / "passages.jsonl"
    table.write_bytes(table.read_bytes()[:-1])
    with pytest.raises(kept.Damaged, match=r"version\.json: .*--rollback` goes back to a whole"):
        Retriever.load(model_dir, system="distill")
    assert [version.version for version in versions.all()] == [1, 2]
    assert update.rollback(versions) == 1
    assert "what is said of version 3 is lost" in caplog.text
    assert "passages.jsonl: got" in caplog.text
    assert update.update(versions, [BEES]).version == 4
    assert (versions.folder / "3").is_dir(), "nothing that is damaged is removed"


def test_an_older_model_dir_learns_again_what_it_has_not_kept(model_dir, caplog):
    versions, places = update.versions(model_dir), []
    update.update(versions, [ZEBRA, BEES])
    expected = IdentifierTable.load(versions.at(1) / "identifiers").tokens
    update.rollback(versions)
    shutil.rmtree(model_dir / "prepare" / KEPT)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            update.update(versions, [ZEBRA, BEES])
            table = IdentifierTable.load(versions.at(versions.current()) / "identifiers")
            places.append(table.tokens)
            update.rollback(versions)
    np.testing.assert_array_equal(places, [expected] * 2)
    assert caplog.text.count("it is learned again, once") == 1
    shutil.rmtree(versions.folder / KEPT)
    record = records.read_record(model_dir / "prepare")
    record["settings"]["prepare"]["seed"] = 5
    records.write_record(model_dir / "prepare", **record)
    with pytest.raises(ValueError, match="what is learned now gives other identifiers than"):
        update.update(versions, [ZEBRA])
    assert not list(versions.folder.glob("*partial*"))


def test_what_cannot_be_changed_is_named_and_changes_nothing(model_dir):
    retriever = Retriever.load(model_dir, system="distill")
    pids = list(retriever.store.pids)
    for call, expected in [
        (lambda: retriever.remove(["bees-02", "no-1", "no-2"]),
         "pids: got 'no-1', 'no-2', expected pids of passages that are there; nothing was changed"),
        (lambda: retriever.remove(["bees-02", "bees-02"]), "pids: got 'bees-02' twice"),
        (lambda: retriever.remove("bees-02"), "pids: got one string 'bees-02', expected a list"),
        (lambda: retriever.remove([]), "got no passages to add and no pids to remove, expected"),
        (lambda: retriever.remove(pids[1:]), "pids: got 24 of 25 passages, expected two or more"),
        (lambda: retriever.add([]), "got no passages to add and no pids to remove, expected"),
        (lambda: retriever.add([ZEBRA, ZEBRA]),
         "passages: got, as number 2, the pid 'zebra-1' again, expected each once"),
        (lambda: retriever.add([Passage("a", " ", "\u200b")]),
         "passages: got, as number 1, nothing in the passage 'a', expected a title or a text"),
        (lambda: retriever.add([Passage("a b", "x")]),
         "passages: got, as number 1, the pid 'a b', expected an id without white space"),
        (lambda: retriever.add(["x"]), "passages: got, as number 1, str, expected dgr_jax.corpora"),
        (lambda: retriever.add(ZEBRA), "passages: got one passage 'zebra-1', expected a list"),
        (lambda: retriever.add([Passage("a", None)]),
         "passages: got, as number 1, the text None, expected a string"),
        (lambda: retriever.add([Passage(7, "x")]), "as number 1, the pid 7, expected a string"),
        (lambda: retriever.add([Passage("a", "x", metadata={"n": [1]})]),
         "got, as number 1, [1] as 'n' in the metadata of 'a', expected a string, a finite number"),
        (lambda: update.update(update.versions(model_dir), [ZEBRA], ["zebra-1"]),
         "pids: got 'zebra-1', expected pids of passages that are there"),
        (lambda: update.update(
            update.versions(model_dir), [Passage("bees-02", "x")], ["bees-02"]),
         "pids: got 'bees-02', which is among the passages that are added too"),
        (lambda: retriever.restrict(pids[:3]).add([ZEBRA]),
         "add: this retriever was opened from no MODEL_DIR, or finds only some passages"),
    ]:  # fmt: skip
        with pytest.raises(ValueError) as error:
            call()
        assert expected in str(error.value)
    assert not update.versions(model_dir).all()


ZEBRA_LINE = json.dumps({"pid": "a", "text": "Zebras."})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{ZEBRA_LINE}\n{{", "line 2: found invalid JSON (Expecting property name"),
        (f"{ZEBRA_LINE}\n[1]", "line 2: found a JSON list; expected one JSON object"),
        (f"{ZEBRA_LINE}\n{ZEBRA_LINE}", "line 2: found the pid 'a' again; expected each pid once"),
        ('{"pid": "a", "text": " "}', "line 1: found nothing in the passage 'a'; expected a title"),
        ('{"text": "a"}', "line 1: found the fields 'text'; expected a field 'pid'"),
        ('{"pid": "a b", "text": "a"}', "line 1: found the passage id 'a b'; expected an id"),
        ('{"pid": "a", "text": ["a"]}', "line 1: found 'text': ['a']; expected a string"),
        ("\n", "found no passages; expected JSON lines with 'pid' (or '_id'), 'text'"),
    ],
)
def test_what_no_file_of_passages_may_hold(tmp_path, text, expected):
    path = tmp_path / "new.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        changes.read_passages(path)
    assert str(error.value).startswith(str(path))
    assert expected in str(error.value)


def test_files_of_passages_and_pids(tmp_path):
    path = tmp_path / "new.jsonl"
    path.write_text('{"_id": 7, "text": "a", "title": "b"}\n\n{"pid": "x", "text": "c"}\n')
    assert changes.read_passages(path) == [Passage("7", "a", "b"), Passage("x", "c")]
    with pytest.raises(FileNotFoundError, match="--add=.*: no such file; expected a file of JSON"):
        changes.read_passages(tmp_path / "none")
    pids = tmp_path / "pids.txt"
    pids.write_text("a\n\nb\n")
    assert changes.read_pids(pids) == ["a", "b"]
    for text, expected in [
        ("a\na\n", "line 2: found the pid 'a' again; expected each pid once"),
        ("a b\n", "line 1: found the passage id 'a b'; expected an id without white space"),
        ("\n", "found no pids; expected one a line"),
    ]:
        pids.write_text(text)
        with pytest.raises(ValueError) as error:
            changes.read_pids(pids)
        assert expected in str(error.value)
