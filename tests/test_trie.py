"""The trie against sets of tuples: what it holds, what it costs, what it refuses."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgr_jax.decoding import trie, trie_build, trie_expand
from dgr_jax.decoding.trie_expand import TrieState
from tests.reference import decoding as reference

EOS = 1


def ragged(rows):
    lengths = np.array([len(row) for row in rows])
    out = np.zeros((len(rows), max(lengths.max(), 1)), np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out, lengths


def rows_of(index):
    tokens, lengths = index.rows()
    return [tuple(row[:n]) for row, n in zip(tokens.tolist(), lengths, strict=True)]


any_rows = st.lists(st.lists(st.integers(2, 9), min_size=1, max_size=5), min_size=1, max_size=20)
fixed_rows = st.integers(1, 5).flatmap(
    lambda n: st.lists(st.lists(st.integers(0, 9), min_size=n, max_size=n), min_size=1)
)


@settings(deadline=None)
@given(rows=any_rows)
def test_holds_the_rows_closed_by_eos(rows):
    index = trie.build(*ragged(rows), eos_id=EOS, vocab_size=10)
    assert rows_of(index) == reference.unique_rows(rows, eos_id=EOS)


@settings(deadline=None)
@given(rows=fixed_rows, big=st.sampled_from([0, 200, 60_000, 130_000]))
def test_holds_rows_of_one_length_and_any_vocabulary(rows, big):
    rows = np.asarray(rows)
    rows[:, ::2] += (big * (rows[:, ::2] > 4)).astype(rows.dtype)
    index = trie.build(rows, vocab_size=1 << 17)
    assert rows_of(index) == reference.unique_rows(rows)
    assert index.layout.ends == "fixed"


@settings(deadline=None)
@given(rows=any_rows)
def test_holds_prefix_free_rows_of_several_lengths_and_refuses_others(rows):
    legal = reference.unique_rows(rows)
    nested = any(b[: len(a)] == a for a, b in zip(legal, legal[1:], strict=False))
    if nested:
        with pytest.raises(ValueError, match="is a proper prefix of row .*: set eos_id"):
            trie.build(*ragged(rows), vocab_size=10)
    else:
        assert rows_of(trie.build(*ragged(rows), vocab_size=10)) == legal


@settings(deadline=None)
@given(rows=any_rows, seed=st.integers(0, 9))
def test_order_and_repeats_of_the_rows_change_nothing(rows, seed):
    legal = sorted({tuple(row) for row in rows})
    shuffled = [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]
    ordered = trie.build(*ragged(legal), eos_id=EOS, vocab_size=10)
    index = trie.build(*ragged(shuffled), eos_id=EOS, vocab_size=10)
    for (name, want), (_, got) in zip(ordered.arrays.items(), index.arrays.items(), strict=True):
        np.testing.assert_array_equal(got, want, err_msg=name)
    assert sorted(index.row_ids) == list(range(len(legal)))


def test_sorted_rows_are_not_sorted_again(monkeypatch):
    monkeypatch.setattr(trie_build, "sorting_order", None)
    rows = np.array([[1, 5], [1, 5], [1, 7], [3, 0]])
    assert len(trie.build(rows, vocab_size=8)) == 3
    with pytest.raises(TypeError):
        trie.build(rows[::-1], vocab_size=8)


def test_rows_that_tie_on_the_first_keys_are_sorted_too():
    rows = np.random.default_rng(0).integers(0, 2, (500, 64)) * 70_000
    index = trie.build(rows, vocab_size=1 << 17)
    assert rows_of(index) == reference.unique_rows(rows.tolist())


def test_rows_of_a_search_are_rows_of_the_table():
    index = trie.build(np.array([[3, 3], [2, 2], [3, 3]]), vocab_size=4)
    order = np.argsort(index.row_ids)
    assert index.table_rows(np.array([[order[1], order[0], -1]])).tolist() == [[1, 0, -1]]


def test_a_small_index_of_random_codes():
    rows = np.random.default_rng(0).integers(0, 256, (50_000, 8))
    index = trie.build(rows, vocab_size=256)
    bound = 8 - np.log2(np.arange(1, 50_001)).sum() / 8 / 50_000  # bytes of information a row
    assert index.nbytes / len(index) < 1.4 * bound
    blocks = trie.build(rows + 32_100 + 256 * np.arange(8), vocab_size=34_148)
    assert blocks.arrays.tails.dtype == np.uint8
    assert blocks.nbytes == index.nbytes


def narrow_build(rows, narrow, middle, **settings):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trie_build, "GATHERS", (narrow,))
        patch.setattr(trie_build, "WIDEST_GATHER", middle)
        return trie.build(*ragged(rows), **settings)


SLOTS = 64


compiled = functools.partial(  # quick to compile, slow to run
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


@functools.partial(compiled, static_argnames="width")
def expand(constraint, state, logits, width):
    """Every state for itself."""
    alone = lambda leaf: leaf[:, None]
    prior = jnp.zeros((len(logits), 1))
    if not constraint.renormalise:
        prior -= jax.nn.logsumexp(logits.astype(jnp.float32), -1)[:, None]
    return constraint.expand(jax.tree.map(alone, state), alone(logits), prior, width=width)


def walk(index, rows, vocab_size, width, renormalise, dtype=np.float32):
    """Compares expand with the legal tokens of every prefix, level by level."""
    constraint = index.constraint(renormalise=renormalise)
    level = [((), 0, 0)]
    rng = np.random.default_rng(0)
    while level:
        prefixes, nodes, depths = zip(*level[:SLOTS], strict=True)
        dead = SLOTS - len(nodes)
        state = TrieState(*(np.array(list(x) + [-1] * dead, np.int32) for x in (nodes, depths)))
        logits = jnp.asarray(rng.normal(size=(SLOTS, vocab_size)), dtype)
        found = jax.tree.map(np.asarray, expand(constraint, state, logits, width))
        assert (found.log_probs[len(nodes) :] == -np.inf).all()
        row_ids = index.table_rows(constraint.rows(TrieState(*found.next_state)))
        scores, following = np.asarray(logits.astype(jnp.float32)), []
        for i, prefix in enumerate(prefixes):
            row_scores = scores[i]
            wanted = reference.token_log_probs(
                lambda *_, x=row_scores: x, 0, rows, prefix, renormalise
            )
            valid = np.flatnonzero(found.log_probs[i] > -np.inf)
            got = {int(found.token_ids[i, j]): found.log_probs[i, j] for j in valid}
            assert len(got) == len(valid)
            best = sorted(wanted, key=wanted.get, reverse=True)
            ended = [token for token in best if (*prefix, token) in rows]
            other = [token for token in best if (*prefix, token) not in rows]
            if index.layout.ends == "mixed" and len(wanted) > index.layout.gathers[-1]:
                assert set(best[:width]) <= set(got)
            else:
                assert set(got) == set(ended[:width] + other[:width])
            np.testing.assert_allclose(
                [got[token] for token in got], [wanted[token] for token in got], atol=1e-5
            )
            for j in valid:
                child = (*prefix, int(found.token_ids[i, j]))
                assert found.complete[i, j] == (child in rows)
                node, depth = found.next_state.node[i, j], found.next_state.depth[i, j]
                if child in rows:
                    assert rows[row_ids[i, j]] == child
                else:
                    following.append((child, node, depth))
        level = following[:: -(-len(following) // SLOTS) or 1]


@pytest.mark.parametrize(
    ("narrow", "middle", "ends", "renormalise"),
    [
        (1, 2, "token", False),
        (1, 2, "mixed", True),
        pytest.param(2, 2, "fixed", True, marks=pytest.mark.slow),
        pytest.param(64, 64, "token", True, marks=pytest.mark.slow),
        pytest.param(1, 2, "token", True, marks=pytest.mark.slow),
        pytest.param(1, 2, "mixed", False, marks=pytest.mark.slow),
        pytest.param(2, 2, "fixed", False, marks=pytest.mark.slow),
        pytest.param(2, 4, "token", False, marks=pytest.mark.slow),
    ],
)
def test_expand_is_exact_for_every_node(narrow, middle, ends, renormalise):
    rng = np.random.default_rng(narrow)
    lengths = rng.integers(2, 5, 60) if ends != "fixed" else np.full(60, 3)
    rows = [rng.integers(2, 38, 1).tolist() + rng.integers(2, 9, n - 1).tolist() for n in lengths]
    if ends == "mixed":
        rows = [row[:-1] + [10 + len(row)] for row in rows]
    eos_id = EOS if ends == "token" else None
    index = narrow_build(rows, narrow, middle, eos_id=eos_id, vocab_size=38)
    assert index.layout.ends == ends
    walk(index, reference.unique_rows(rows, eos_id=eos_id), 40, 3, renormalise)


def test_expand_where_levels_lie_in_blocks_of_the_vocabulary():
    rows = (np.random.default_rng(0).integers(0, 20, (200, 3)) + [20, 40, 60]).tolist()
    index = narrow_build(rows, 2, 4, vocab_size=80)
    walk(index, reference.unique_rows(rows), 80, 5, False)


@pytest.mark.parametrize(("highest", "counted"), [(1300, True), (2300, False)])
def test_expand_in_a_large_vocabulary_and_bfloat16(highest, counted):
    rng = np.random.default_rng(0)
    rows = np.stack([rng.integers(100, highest, 800), rng.integers(0, 3, 800)], 1).tolist()
    index = narrow_build(rows, 2, 4, vocab_size=highest)
    assert len(index.arrays.wide) == 1
    assert (index.layout.bitmap_words <= trie_expand._COUNTED_WORDS) == counted
    walk(index, reference.unique_rows(rows), highest + 1, 2, False, dtype=jnp.bfloat16)


def test_one_row_and_dead_states():
    index = trie.build(np.array([[4, 2]]), vocab_size=5)
    assert index.num_nodes == 1
    walk(index, [(4, 2)], 5, 2, False)


def test_a_vocabulary_wider_than_the_logits_is_refused():
    index = trie.build(np.array([[4, 2]]), vocab_size=5)
    with pytest.raises(
        ValueError, match="scores of 4 tokens; the index was built for a vocabulary of 5"
    ):
        expand(index.constraint(), TrieState(*np.zeros((2, 1), np.int32)), jnp.zeros((1, 4)), 1)


def some_index(n, seed=0, **settings):
    rng = np.random.default_rng(seed)
    rows = [rng.integers(2, 30, k).tolist() for k in rng.integers(2, 6, n)]
    return rows, narrow_build(rows, 2, 4, eos_id=EOS, vocab_size=30, **settings)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_restrict_holds_what_a_rebuild_holds(data):
    rows, index = some_index(40)
    table = rows_of(index)
    size = len(table)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    kept = [row for row, allowed in zip(table, mask, strict=True) if allowed]
    if not kept:
        with pytest.raises(ValueError, match="leaves no identifier"):
            index.restrict(mask)
        return
    part = index.restrict(mask)
    assert rows_of(part) == kept
    assert [table[row] for row in np.sort(part.row_ids)] == kept
    for (name, padded), (_, whole) in zip(
        part.padded().items(), index.padded().items(), strict=True
    ):
        assert (padded.shape, padded.dtype) == (whole.shape, whole.dtype), name
    again = part.restrict(np.ones(size, bool))
    assert rows_of(again) == kept


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones(3, bool), r"bool of shape \[5\]; got bool of shape \(3,\)"),
        (np.ones(5), r"bool of shape \[5\]; got float64 of shape \(5,\)"),
        (np.zeros(5, bool), "leaves no identifier"),
    ],
)
def test_restrict_refuses(mask, message):
    index = trie.build(np.arange(10).reshape(5, 2), vocab_size=10)
    with pytest.raises(ValueError, match=message):
        index.restrict(mask)


def test_indexes_of_one_size_class_share_a_compilation():
    traces = []

    @compiled
    def first_tokens(constraint):
        traces.append(1)
        state = jax.tree.map(lambda leaf: leaf[:, None], constraint.init(1))
        found = constraint.expand(state, jnp.zeros((1, 1, 30)), jnp.zeros((1, 1)), width=30)
        return jnp.where(found.log_probs > -jnp.inf, found.token_ids, -1)

    def check(index, rows):
        found = np.unique(first_tokens(index.constraint()))[1:]
        assert found.tolist() == reference.legal_tokens(reference.unique_rows(rows), ())

    rows, index = some_index(300)
    check(index, rows)
    for seed in range(3):
        other, of_other = some_index(310 - seed, seed=seed + 1)
        check(of_other, other)
    table = rows_of(index)
    check(index.restrict(np.arange(len(table)) < 10), [row[:-1] for row in table[:10]])
    assert len(traces) == 1
    check(some_index(3000)[1], some_index(3000)[0])
    assert len(traces) == 2


def test_size_classes():
    assert [trie_build.size_class(n) for n in (0, 1, 5, 9, 11, 17, 100, 1025)] == [
        0, 1, 5, 10, 12, 20, 112, 1280,
    ]  # fmt: skip
    for n in range(4, 2000):
        assert n <= trie_build.size_class(n) <= 1.25 * n


def test_saved_and_loaded(tmp_path):
    _, index = some_index(200)
    part = index.restrict(np.arange(len(index)) % 7 < 5)
    for i, original in enumerate((index, part)):
        original.save(tmp_path / str(i))
        loaded = trie.load(tmp_path / str(i))
        assert isinstance(loaded.arrays.tails, np.ndarray)
        assert rows_of(loaded) == rows_of(original)
        assert loaded.layout == original.layout
        assert loaded.nbytes == original.nbytes
        np.testing.assert_array_equal(loaded.row_ids, original.row_ids)
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype), loaded.constraint())
        assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), original.constraint())


def test_large_arrays_are_memory_mapped(tmp_path):
    rows = np.random.default_rng(0).integers(0, 256, (5000, 8))
    trie.build(rows, vocab_size=256).save(tmp_path)
    assert isinstance(trie.load(tmp_path).arrays.tails, np.memmap)


def damaged(tmp_path, name, change):
    some_index(50)[1].save(tmp_path)
    path = tmp_path / name
    path.write_bytes(change(path.read_bytes()))
    return path


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b[:-1] + bytes([b[-1] ^ 1])])
def test_a_damaged_array_is_refused_by_name(tmp_path, change):
    path = damaged(tmp_path, "tails.npy", change)
    with pytest.raises(
        ValueError, match=r"tails\.npy: differs from its sha256.*: the index is dam"
    ):
        trie.load(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match=r"tails\.npy: is missing"):
        trie.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[: len(b) // 2], "header.json: is not a header of dgr_jax.trie; expected"),
        (lambda b: b"[1]", "header.json: is not a header of dgr_jax.trie; expected"),
        (lambda b: b'{"format": "other", "version": 1}', "got 'other' version 1; expected 'dgr_j"),
        (
            lambda b: json.dumps(json.loads(b) | {"version": 1}).encode(),
            "got 'dgr_jax.trie' version 1; expected 'dgr_jax.trie' version 2: build the index",
        ),
        (
            lambda b: json.dumps(json.loads(b) | {"layout": {"ends": "fixed"}}).encode(),
            "layout lacks bitmap_words, gathers, max_length, token_dtype; expected those of ver",
        ),
        (
            lambda b: json.dumps(json.loads(b) | {"sha256": {}}).encode(),
            "sha256 lacks base, bitmap_low, .*: build the index again",
        ),
    ],
)
def test_a_foreign_header_is_refused_by_name(tmp_path, change, message):
    damaged(tmp_path, "header.json", change)
    with pytest.raises(ValueError, match=message):
        trie.load(tmp_path)


def test_a_missing_header_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="header.json is missing: not a folder of dgr_jax.trie"):
        trie.load(tmp_path)


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (np.zeros((0, 3), int), {}, "no rows"),
        (np.zeros((2, 3)), {}, r"integers of shape \[U, T\]; got float64 of shape \(2, 3\)"),
        (np.zeros(3, int), {}, r"got int64 of shape \(3,\)"),
        (np.array([[1, 2], [1, 10]]), {}, "row 1 holds token 10 at depth 1; expected 0 to 9"),
        (np.array([[1 << 40]]), {}, "row 0 holds token 1099511627776 at depth 0"),
        (np.array([[1, -2]]), {}, "row 0 holds token -2 at depth 1; expected 0 to 9"),
        (np.array([[1], [2]]), {"lengths": np.array([1, 0])}, "row 1 has length 0; expected 1 to"),
        (np.array([[1], [2]]), {"lengths": np.array([1, 2])}, "row 1 has length 2; expected 1 to"),
        (np.array([[1], [2]]), {"lengths": np.array([1])}, r"lengths must have shape \(2,\)"),
        (np.zeros((1, 65), int), {}, "longest row has 65 tokens .* expected at most 64"),
        (np.zeros((1, 64), int), {"eos_id": 1}, "longest row has 65 tokens"),
        (np.array([[1]]), {"vocab_size": 1 << 31}, "vocab_size must be 1 to 1073741824; got 2147"),
        (np.array([[1]]), {"eos_id": 10}, "row 0 holds token 10 at depth 1"),
        (
            np.array([[5, 1], [5, 0], [4, 0]]),
            {"lengths": np.array([2, 1, 1])},
            "row 1 is a proper prefix of row 0",
        ),
    ],
)
def test_bad_input_is_refused(rows, settings, message):
    with pytest.raises(ValueError, match=message):
        trie.build(rows, **({"vocab_size": 10} | settings))
