import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgr_jax.identifiers.table import IdentifierTable, sort_rows
from tests.reference import identifiers as reference


def padded(sequences, width=None):
    width = width or max(map(len, sequences))
    return np.array([list(s) + [0] * (width - len(s)) for s in sequences], np.int32)


def contents(table):
    return [
        (tuple(row[:length].tolist()), table.passages_of(u).tolist())
        for u, (row, length) in enumerate(zip(table.tokens, table.lengths, strict=True))
    ]


# Sequences without EOS inside; the test adds it, so that no row is a prefix of another.
sequences = st.lists(
    st.lists(st.integers(2, 5) | st.integers(2, 2**31 - 1), max_size=4).map(lambda s: [*s, 1]),
    min_size=1,
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(rows=sequences, data=st.data())
def test_a_table_equals_a_dictionary_of_rows(rows, data):
    passages = data.draw(st.lists(st.integers(0, 9), min_size=len(rows), max_size=len(rows)))
    table = IdentifierTable.from_rows(
        padded(rows, 6), view="title", passages=np.array(passages), num_passages=10
    )
    assert contents(table) == reference.table(rows, passages)
    assert table.tokens.dtype == table.lengths.dtype == table.passages.dtype == np.int32
    assert table.offsets.dtype == np.int64
    assert (table.tokens[:, -1] > 0).any(), "the table is no wider than its longest row"
    assert table.lookup(padded(rows, 9)).tolist() == [
        [tokens for tokens, _ in contents(table)].index(tuple(row)) for row in rows
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=3), min_size=1, max_size=8),
)
def test_prefixes_are_refused_wherever_they_stand(rows):
    if reference.has_prefix([tuple(row) for row in rows]):
        with pytest.raises(ValueError, match="is a prefix of identifier"):
            IdentifierTable.from_rows(padded(rows), view="title")
    else:
        table = IdentifierTable.from_rows(padded(rows), view="title")
        assert contents(table) == reference.table(rows, range(len(rows)))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 5).flatmap(
        lambda width: st.lists(
            st.lists(st.integers(0, 2**31 - 1) | st.integers(0, 2), min_size=width, max_size=width),
            min_size=1,
            max_size=20,
        )
    )
)
def test_sort_rows_is_lexicographic_and_stable(rows):
    order, differs = sort_rows(np.array(rows, np.int32))
    assert order.tolist() == sorted(range(len(rows)), key=lambda i: (rows[i], i))
    ordered = [rows[i] for i in order]
    expected = [a != b for a, b in zip(ordered[1:], ordered, strict=False)]
    assert differs.tolist() == [True, *expected]


def test_lookup_of_absent_sequences_and_leading_axes():
    table = IdentifierTable.from_rows(padded([[5, 6], [5, 7], [9, 2]]), view="rq")
    asked = np.array([[[5, 7, 0], [5, 7, 1]], [[5, 0, 0], [9, 2, 0]], [[0, 0, 0], [9, 3, 0]]])
    assert table.lookup(asked).tolist() == [[1, -1], [-1, 2], [-1, -1]]
    assert table.lookup(np.array([[5], [9]])).tolist() == [-1, -1]
    assert table.lookup(np.array([5, 6])).shape == ()


def test_rows_of_passages():
    rows = padded([[8], [3], [8]])
    table = IdentifierTable.from_rows(
        rows, view="title", passages=np.array([0, 3, 1]), num_passages=5
    )
    assert table.rows_of_passages().tolist() == [1, 1, -1, 0, -1]
    assert table.rows_of_passages().dtype == np.int32
    several = IdentifierTable.from_rows(rows, view="title", passages=np.array([0, 0, 1]))
    with pytest.raises(ValueError, match="view 'title' has 3 identifiers of 2 passages"):
        several.rows_of_passages()


@pytest.mark.parametrize(
    ("rows", "kwargs", "message"),
    [
        (np.zeros((0, 3), np.int32), {}, r"got none \(shape \(0, 3\)\); is the corpus empty"),
        (np.ones((2, 3)), {}, r"got float64 of shape \(2, 3\), expected integers"),
        (np.array([[1, -4]]), {}, "got token -4, expected 0 and above"),
        (np.array([[7, 1], [0, 0]]), {}, "identifier row 1 is empty or begins with padding"),
        (np.array([[7, 0, 1]]), {}, "identifier row 0 has a token after padding"),
        (np.array([[7], [8]]), {"passages": np.array([1])}, "expected one index for each of 2"),
        (
            np.array([[7], [8]]),
            {"passages": np.array([1, 4]), "num_passages": 3},
            r"passage index 4 is outside 0\.\.2",
        ),
        (
            padded([[7, 9], [7]]),
            {},
            r"identifier \[7\] of passage 1 is a prefix of identifier \[7, 9\] of passage 0",
        ),
    ],
)
def test_bad_rows_are_named(rows, kwargs, message):
    with pytest.raises(ValueError, match=message):
        IdentifierTable.from_rows(rows, view="x", **kwargs)


def test_docids_must_be_one_to_one():
    shared = IdentifierTable.from_rows(padded([[7], [8], [7]]), view="rq")
    with pytest.raises(ValueError, match=r"view 'rq' .* but passages \[0, 2\] share \[7\]"):
        shared.require_docids()
    lacking = IdentifierTable.from_rows(padded([[7], [8]]), view="rq", num_passages=3)
    with pytest.raises(ValueError, match="3 passages have 2 identifiers"):
        lacking.require_docids()


def test_report_counts_sharing_and_code_usage():
    rows = padded([[10, 20, 30], [10, 20, 31], [10, 21, 30], [11, 21, 30], [11, 21, 30]])
    report = IdentifierTable.from_rows(rows, view="rq", num_code_tokens=30).report()
    levels = report.pop("levels")
    assert report == {
        "view": "rq",
        "passages": 5,
        "passages_without_identifier": 0,
        "identifiers": 4,
        "passages_sharing_an_identifier": 2,
        "largest_group": 2,
        "mean_length": 3.0,
        "longest": 3,
        "code_tokens": 30,
    }
    shares = np.array([3, 2]) / 5
    entropy = -(shares * np.log2(shares)).sum()
    assert levels[0] == {
        "passages": 5,
        "codes": 2,
        "entropy": pytest.approx(entropy),
        "perplexity": pytest.approx(2**entropy),
        "largest_share": pytest.approx(0.6),
    }
    assert [level["codes"] for level in levels] == [2, 2, 2]


def test_saved_tables_are_the_same_and_mapped(tmp_path):
    table = IdentifierTable.from_rows(
        padded([[5, 6], [9, 2], [5, 6]]), view="rq", num_code_tokens=8
    )
    table.save(tmp_path / "a")
    loaded = IdentifierTable.load(tmp_path / "a")
    assert isinstance(loaded.tokens, np.memmap)
    assert contents(loaded) == contents(table) == [((5, 6), [0, 2]), ((9, 2), [1])]
    assert (loaded.view, loaded.num_code_tokens, loaded.num_passages) == ("rq", 8, 3)
    loaded.save(tmp_path / "a")  # over the files it is mapped from
    assert contents(IdentifierTable.load(tmp_path / "a")) == contents(table)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "identifiers.json", "lengths.npy", "offsets.npy", "passages.npy", "tokens.npy"
    ]  # fmt: skip


def test_foreign_and_truncated_tables_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no identifier table here"):
        IdentifierTable.load(tmp_path)
    table = IdentifierTable.from_rows(padded([[5, 6], [9, 2]]), view="rq")
    table.save(tmp_path)
    header = tmp_path / "identifiers.json"
    good = json.loads(header.read_text())

    tokens = (tmp_path / "tokens.npy").read_bytes()
    (tmp_path / "tokens.npy").write_bytes(tokens[:-4])
    with pytest.raises(ValueError, match=r"tokens\.npy: cannot be read \(.*\); truncated"):
        IdentifierTable.load(tmp_path)
    (tmp_path / "tokens.npy").unlink()
    with pytest.raises(ValueError, match=r"tokens\.npy: is missing; make the table again"):
        IdentifierTable.load(tmp_path)
    np.save(tmp_path / "tokens.npy", np.zeros((2, 2), np.int64))
    with pytest.raises(ValueError, match=r"got int64 of shape \[2, 2\], expected int32 of shape"):
        IdentifierTable.load(tmp_path)
    (tmp_path / "tokens.npy").write_bytes(tokens)
    np.save(tmp_path / "offsets.npy", np.array([0, 1, 9]))
    with pytest.raises(ValueError, match="offsets end at 9, but there are 2 passages"):
        IdentifierTable.load(tmp_path)

    header.write_text(json.dumps({**good, "version": 99}))
    with pytest.raises(ValueError, match="got version 99, expected 1; make the table again"):
        IdentifierTable.load(tmp_path)
    header.write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match="got another format, expected 'dgr_jax identifier table'"):
        IdentifierTable.load(tmp_path)
    header.write_text('{"format": "dgr_jax')
    with pytest.raises(
        ValueError, match=r"identifiers\.json: cannot be read \(JSONDecodeError: .*\); truncated"
    ):
        IdentifierTable.load(tmp_path)
