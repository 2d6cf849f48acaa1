"""The passage store: what goes in comes out, by index, by pid and in order."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from dgr_jax.corpora import store
from dgr_jax.corpora.types import Passage
from dgr_jax.model_dir import kept

PASSAGES = [Passage("b", "zwei\nLinien", "Über"), Passage("a", "one\u2028\r"), Passage("c", "{}")]


def test_store_by_index_by_pid_and_in_order(tmp_path):
    stored = store.write(iter(PASSAGES), tmp_path)
    assert len(stored) == 3
    assert [stored[i] for i in range(3)] == PASSAGES == list(stored)
    assert stored[np.int32(-1)] == PASSAGES[2]
    assert stored.pids == ["b", "a", "c"]
    assert [stored.index_of(pid) for pid in stored.pids] == [0, 1, 2]
    assert list(store.PassageStore(str(tmp_path))) == PASSAGES
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "offsets.npy", "passages.jsonl", "pids.txt",
    ]  # fmt: skip


def test_store_can_be_sent_to_another_process(tmp_path):
    stored = store.write(PASSAGES, tmp_path)
    assert stored[1] == PASSAGES[1]
    assert pickle.loads(pickle.dumps(stored))[1] == PASSAGES[1]


def test_unknown_index_and_pid(tmp_path):
    stored = store.write(PASSAGES, tmp_path)
    with pytest.raises(IndexError, match="passage index 3 of a store of 3 passages"):
        stored[3]
    with pytest.raises(IndexError):
        stored[-4]
    with pytest.raises(KeyError, match="pid 'x' is not in the passage store"):
        stored.index_of("x")


@pytest.mark.parametrize(
    ("passages", "message"),
    [
        ([], "found an empty corpus; expected at least one passage"),
        (
            [Passage("a", "1"), Passage("b", "2"), Passage("a", "3")],
            "found the pid 'a' twice, at the passages 1 and 3 of the corpus; expected each pid",
        ),
        ([Passage("a\nb", "1")], r"found the pid 'a\\nb'; expected an id without line ends"),
        ([Passage("", "1")], "found the pid ''; expected an id"),
        ([Passage("a", "\ud800")], "found half of a surrogate pair in the passage 'a'"),
    ],
)
def test_refused_corpora_leave_the_old_store(tmp_path, passages, message):
    store.write(PASSAGES, tmp_path)
    with pytest.raises(ValueError, match=message):
        store.write(passages, tmp_path)
    assert list(store.PassageStore(tmp_path)) == PASSAGES
    assert len(list(tmp_path.iterdir())) == 3


def test_a_stream_that_fails_leaves_the_old_store(tmp_path):
    def broken():
        yield PASSAGES[1]
        raise RuntimeError("the disk is gone")

    store.write(PASSAGES, tmp_path)
    with pytest.raises(RuntimeError):
        store.write(broken(), tmp_path)
    assert store.PassageStore(tmp_path).pids == ["b", "a", "c"]


def test_a_smaller_store_replaces_a_larger(tmp_path):
    store.write(PASSAGES, tmp_path)
    assert list(store.write(PASSAGES[2:], tmp_path)) == PASSAGES[2:]
    assert store.PassageStore(tmp_path).index_of("c") == 0


def test_blank_texts_are_kept_and_the_warning_is_left_to_the_reader(tmp_path, caplog):
    passages = [Passage(str(i), "\t\n", "title") for i in range(4)] + [Passage("x", "y")]
    assert list(store.write(passages, tmp_path)) == passages
    assert caplog.messages == []


def test_training_queries_stay_with_their_passages(tmp_path):
    stored = store.write(PASSAGES, tmp_path / "0")
    assert stored.queries is None
    asked = {"a": ["Why?", "Wie oft\u2028?"], "c": ["x"]}
    store.write_queries(asked, stored.folder)
    stored = store.PassageStore(stored.folder)
    assert stored.queries == asked
    stay = np.array([True, True, False])
    changed = store.write_changed(stored, stay, [Passage("d", "new")], tmp_path / "1")
    assert changed.queries == {"a": asked["a"]}
    assert store.write(PASSAGES, stored.folder).queries is None


def test_damaged_training_queries_are_named(tmp_path):
    stored = store.write(PASSAGES, tmp_path)
    (tmp_path / store.QUERIES).write_text('{"pid": "a"')
    with pytest.raises(kept.Damaged, match="queries.jsonl"):
        stored.queries  # noqa: B018


def test_whether_a_pid_is_there(tmp_path):
    written = store.write(PASSAGES, tmp_path)
    assert all(passage.pid in written for passage in PASSAGES)
    assert "no such pid" not in written


def test_parts_and_misfits_are_no_store(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lacks passages.jsonl, pids.txt, offsets.npy"):
        store.PassageStore(tmp_path)
    store.write(PASSAGES, tmp_path)
    whole = (tmp_path / "passages.jsonl").read_bytes()
    (tmp_path / "passages.jsonl").write_bytes(whole[:-5])
    with pytest.raises(ValueError, match=f"found {len(whole) - 5} bytes; expected {len(whole)} as"):
        store.PassageStore(tmp_path)
    (tmp_path / "passages.jsonl").write_bytes(whole)
    (tmp_path / "pids.txt").write_text("a\n")
    with pytest.raises(ValueError, match=r"pids.txt: found 1 pids; expected 3 as in offsets.npy"):
        _ = store.PassageStore(tmp_path).pids
    np.save(tmp_path / "offsets.npy", np.zeros(3, np.float32))
    with pytest.raises(ValueError, match=r"found float32 \[3\]; expected int64 \[P\+1\]"):
        store.PassageStore(tmp_path)
    (tmp_path / "offsets.npy").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"not a whole passage store, it lacks offsets.npy;"
    ):
        store.PassageStore(tmp_path)
