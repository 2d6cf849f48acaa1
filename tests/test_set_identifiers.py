"""Set identifiers: against a count of pieces, and what is kept of them."""

import numpy as np
import pytest

from dgr_jax.corpora import store as stores
from dgr_jax.corpora.types import Passage
from dgr_jax.data.vocabulary import SentencePiece, Vocabulary
from dgr_jax.retrieval import set_identifiers
from tests.reference import set_identifiers as reference

TEXTS = [
    "bees dance a waggle dance, and the dance is a dance", "ships sail the seas", "", "swans",
    "the bees and the ships dance in the sea of the swans while ships sail by", "a swan sails",
]  # fmt: skip


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    SentencePiece(size=60).write(folder, TEXTS)
    return Vocabulary.create(folder)


@pytest.fixture
def store(tmp_path):
    return stored(tmp_path / "store", TEXTS)


def stored(folder, texts):
    return stores.write((Passage(f"p{i}", text) for i, text in enumerate(texts)), folder)


@pytest.mark.parametrize("size", [1, 4, 30])
def test_pieces_that_tell_most_of_a_passage(store, vocabulary, size, monkeypatch):
    monkeypatch.setattr(set_identifiers, "_BLOCK", 4)  # the passages are two blocks
    sets = set_identifiers.build(store, vocabulary, size)
    expected = reference.sets(vocabulary.encode_all([p.contents for p in store]), size)
    assert sets.dtype == np.uint16
    assert [row[row > 0].tolist() for row in sets] == expected
    assert sets[2].tolist() == [0] * size


def test_sets_are_kept_and_those_of_others_refused(store, vocabulary, tmp_path, caplog):
    folder = tmp_path / "plans"
    made = set_identifiers.opened(store, vocabulary, 4, folder, keep=False)
    assert not folder.exists()
    set_identifiers.opened(store, vocabulary, 4, folder, keep=True)
    again = set_identifiers.opened(store, vocabulary, 4, folder, keep=False)
    np.testing.assert_array_equal(again, made)
    assert [path.name for path in folder.iterdir()] == ["sets-4"]
    other = stored(tmp_path / "other", TEXTS[:3])
    message = (
        "holds the sets of another corpus or vocabulary: got one of 6 passages, expected the 3"
    )
    with pytest.raises(ValueError, match=message):
        set_identifiers.opened(other, vocabulary, 4, folder, keep=False)
    file = folder / "sets-4" / "sets.npy"
    file.write_bytes(file.read_bytes()[:-3])
    again = set_identifiers.opened(store, vocabulary, 4, folder, keep=True)
    np.testing.assert_array_equal(again, made)
    assert "the sets are made again" in caplog.text


def test_more_pieces_than_there_are_are_refused(store, vocabulary):
    message = "Learned.set_size: got 9999, expected at most .*, the pieces of the vocabulary"
    with pytest.raises(ValueError, match=message):
        set_identifiers.build(store, vocabulary, 9999)
