"""Vocabulary, examples, SeqIO tasks and feature converters."""

import shutil
from collections import Counter
from functools import partial

import numpy as np
import pytest

from dgr_jax.corpora import store
from dgr_jax.corpora.types import Passage, Qrel, Query
from dgr_jax.data import examples, rank_lists
from dgr_jax.data.vocabulary import VIEWS, SentencePiece, Vocabulary
from dgr_jax.identifiers.table import IdentifierTable
from tests import view_collections
from tests.conftest import with_seqio

PASSAGES = [
    Passage("p0", "Bees make honey in the hive. They dance to show the way to flowers.", "Bees"),
    Passage("p1", "A glacier is a slow river of ice. It carves valleys as it moves.", "Glaciers"),
    Passage("p2", "Owls fly in silence. Their soft feathers break up the sound of wings.", "Owls"),
]
TEXTS = {"q0": "how do bees make honey", "q1": "what is a glacier", "q2": "why are owls quiet"}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    settings = SentencePiece(size=80)
    settings.write(folder, [p.contents for p in PASSAGES] + list(TEXTS.values()))
    made = Vocabulary.create(folder)
    made = Vocabulary(folder, made.text_size, num_code_tokens=12)
    made.save()
    return made


@pytest.fixture(scope="module")
def table(vocabulary):
    first = vocabulary.first_code_id
    rows = np.array([[0, 4, 8], [1, 4, 8], [1, 5, 9]], np.int32) + first
    return IdentifierTable.from_rows(rows, view="rq", num_code_tokens=12)


@pytest.fixture(scope="module")
def passages(tmp_path_factory):
    return store.write(PASSAGES, tmp_path_factory.mktemp("passages"))


def docid_examples(source, settings, *, store, table, **judged):
    pairs = examples.pairs(source, settings, store=store, **judged)
    return examples.of_docids(pairs, store, table)


def test_vocabulary_layout(vocabulary):
    assert vocabulary.first_code_id % 128 == 0 and vocabulary.first_code_id >= vocabulary.text_size
    assert vocabulary.size == vocabulary.first_code_id + 128
    assert Vocabulary.load(vocabulary.folder) == vocabulary
    ids = vocabulary.encode("Bees MAKE honey")
    assert ids == vocabulary.encode("bees make honey")
    assert vocabulary.decode(ids) == "bees make honey"
    assert vocabulary.decode([vocabulary.first_code_id + 3, 1]) == "<3>"


def test_encode_inputs_cuts_and_ends(vocabulary):
    rows = vocabulary.encode_inputs(["bees make honey in the hive", ""], 5)
    assert rows.dtype == np.int32 and rows.shape == (2, 5)
    assert rows[0, 4] == 1 and (rows[0, :4] > 1).all()
    assert rows[1].tolist() == [1, 0, 0, 0, 0]


def test_missing_sentencepiece_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="SentencePiece.path: no file at 'nowhere.model'"):
        SentencePiece(path="nowhere.model").write(tmp_path, [])
    (tmp_path / "text").write_text("no model")
    with pytest.raises(ValueError, match=r"SentencePiece.path: '.*/text' is no SentencePiece mod"):
        SentencePiece(path=str(tmp_path / "text")).write(tmp_path, [])
    with pytest.raises(ValueError, match="could not be trained"):
        SentencePiece().write(tmp_path, [" "])
    with pytest.raises(FileNotFoundError, match="run the prepare stage first"):
        Vocabulary.load(tmp_path)


def test_examples_of_each_source(passages, table):
    settings = examples.Sources(chunk_words=6)
    qrels = [Qrel("q0", "p0", 2), Qrel("q0", "p1", 1), Qrel("q1", "p1", 2)]
    labelled = list(
        docid_examples(
            "labelled", settings, store=passages, table=table, query_texts=TEXTS,
            qrels=qrels, min_relevance=2,
        )
    )  # fmt: skip
    assert [(e["inputs"], e["pid"]) for e in labelled] == [
        ("how do bees make honey", "p0"),
        ("what is a glacier", "p1"),
    ]
    first = table.tokens.min()
    assert (labelled[1]["targets"] - first).tolist() == [1, 4, 8]
    chunks = [
        e["inputs"] for e in docid_examples("passages", settings, store=passages, table=table)
    ]
    assert chunks[0] == "Bees Bees make honey in the hive."
    assert chunks[1] == "Bees in the hive. They dance to"
    assert all(len(chunk.split()) <= 7 for chunk in chunks)
    sentences = [
        e["inputs"] for e in docid_examples("pseudo_queries", settings, store=passages, table=table)
    ]
    assert sentences[:2] == [
        "Bees make honey in the hive.",
        "They dance to show the way to flowers.",
    ]


def test_pseudo_queries_of_a_file(tmp_path, passages, table, caplog):
    path = tmp_path / "pseudo.tsv"
    path.write_text("p2\twhich bird hunts at night\np0\twho makes honey\n", encoding="utf-8")
    settings = examples.Sources(pseudo_query_path=str(path))
    made = list(docid_examples("pseudo_queries", settings, store=passages, table=table))
    assert [(e["pid"], e["inputs"]) for e in made] == [
        ("p2", "which bird hunts at night"),
        ("p0", "who makes honey"),
    ]
    assert not caplog.text
    path.write_text("pid\tquery\np8\twhat\np2\twhich bird\np9\twhich bee\n", encoding="utf-8")
    made = list(docid_examples("pseudo_queries", settings, store=passages, table=table))
    assert [(e["pid"], e["inputs"]) for e in made] == [("p2", "which bird")]
    assert "left out 2 of 3 pseudo-queries: their passages, such as 'p8', are not" in caplog.text
    assert "is passed over as a header, and is no pseudo-query" in caplog.text
    path.write_text("p2 which bird\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"pseudo.tsv:1: got 'p2 which bird', expected two tab"):
        list(docid_examples("pseudo_queries", settings, store=passages, table=table))


def test_random_chunks_and_the_first_words(passages):
    text = " ".join(map(str, range(40)))
    long, short = (Passage(f"p{i}", text[:end], "Title") for i, end in enumerate((None, 9)))
    settings = examples.Sources(chunk_words=8, random_chunks=5)
    chunks = list(settings.chunks(long))
    assert chunks == list(settings.chunks(long))
    starts = [int(chunk.split()[1]) for chunk in chunks]
    assert len(set(starts)) == 5 and starts == sorted(starts) and max(starts) <= 32
    assert all(
        chunk == " ".join(["Title", *map(str, range(start, start + 8))])
        for chunk, start in zip(chunks, starts, strict=True)
    )
    drawn = Counter()
    for i in range(300):
        other = Passage(f"q{i}", text, "")
        drawn.update(int(chunk.split()[0]) for chunk in settings.chunks(other))
    assert set(drawn) == set(range(33)) and max(drawn.values()) < 3 * min(drawn.values())
    assert list(settings.chunks(short)) == ["Title 0 1 2 3 4"]
    first = examples.Sources(chunk_words=8, max_chunks=1)
    assert list(first.chunks(long)) == ["Title 0 1 2 3 4 5 6 7"]


def test_so_many_pseudo_queries_of_each_passage(tmp_path, passages, table, monkeypatch):
    monkeypatch.setattr(examples, "LINES_A_PART", 2)
    path = tmp_path / "pseudo.tsv"
    path.write_text("p2\ta\np0\tb\np2\tc\np2\td\np0\te\n", encoding="utf-8")
    read = lambda settings: [
        (e["pid"], e["inputs"])
        for part in examples.parts("pseudo_queries", settings, num_passages=len(passages))
        for e in docid_examples("pseudo_queries", settings, store=passages, table=table, part=part)
    ]
    of_file = partial(examples.Sources, pseudo_query_path=str(path))
    assert read(of_file(max_pseudo_queries=1)) == [("p2", "a"), ("p0", "b")]
    assert read(of_file(max_pseudo_queries=2)) == [
        ("p2", "a"), ("p0", "b"), ("p2", "c"), ("p0", "e"),
    ]  # fmt: skip
    assert len(read(of_file())) == 5
    sentences = read(examples.Sources(max_pseudo_queries=1))
    assert [pid for pid, _ in sentences] == passages.pids
    assert sentences[0] == ("p0", "Bees make honey in the hive.")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"random_chunks": -1}, "Sources.random_chunks: got -1, expected at least 0"),
        ({"max_pseudo_queries": -2}, "Sources.max_pseudo_queries: got -2, expected at least 0"),
        (
            {"random_chunks": 3, "max_chunks": 1},
            "Sources.random_chunks: got 3 with Sources.max_chunks=1, expected one of them",
        ),
    ],
)
def test_chunks_that_cannot_be_made_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        examples.Sources(**settings)


def test_sources_without_a_rate_are_refused():
    with pytest.raises(ValueError, match="every rate is 0"):
        examples.Sources(labelled=0, passages=0, pseudo_queries=0)
    with pytest.raises(ValueError, match="^Sources.labelled: got -1.0, expected at least 0$"):
        examples.Sources(labelled=-1.0)


@pytest.fixture(scope="module")
def registered(tmp_path_factory, vocabulary, table, passages):
    """The tasks of a small collection, with three rank lists, one of them short."""
    pytest.importorskip("seqio")
    from dgr_jax.data import prepared, tasks

    folder = tmp_path_factory.mktemp("tfds")
    qrels = [Qrel(f"q{i}", f"p{i}", 1) for i in range(3)]
    settings = examples.Sources(chunk_words=6, pseudo_queries=0)
    streams = {
        name: docid_examples(
            name, settings, store=passages, table=table, query_texts=TEXTS, qrels=qrels
        )
        for name in settings.rates()
    }
    counts = prepared.write(folder, "examples", streams)
    lists = {
        "texts": list(TEXTS.values()),
        "passages": np.array([[0, 2], [1, 0], [2, -1]], np.int32),
        "teacher_scores": np.array([[2.0, 1.0], [5.0, -1.0], [3.0, -np.inf]], np.float32),
        "positives": np.arange(3, dtype=np.int32),
    }
    tasks.register(
        "tiny",
        tasks.PreparedExamples(
            folder, vocabulary, settings.rates(), lambda: rank_lists.examples(**lists, table=table)
        ),
    )
    return counts, lists


def arrays(task, lengths, converter):
    from dgr_jax.data import datasets

    blocks = list(datasets.arrays(task, lengths, converter))
    return {k: np.concatenate([b[k] for b in blocks]) for k in blocks[0]}


def test_generation_task(registered, vocabulary, table):
    from dgr_jax.data.feature_converters import GenerationConverter

    counts, _ = registered
    made = arrays("tiny_labelled", {"inputs": 12, "targets": 4}, GenerationConverter())
    assert counts["labelled"] == 3
    np.testing.assert_array_equal(
        made["encoder_input_tokens"], vocabulary.encode_inputs(list(TEXTS.values()), 12)
    )
    identifiers = rank_lists.identifiers_of(table, np.arange(3))
    np.testing.assert_array_equal(
        made["decoder_target_tokens"], np.pad(identifiers, [(0, 0), (0, 1)])
    )
    np.testing.assert_array_equal(
        made["decoder_input_tokens"], np.pad(identifiers, [(0, 0), (1, 0)])
    )
    np.testing.assert_array_equal(made["decoder_loss_weights"], [[1, 1, 1, 0]] * 3)
    assert {k: v.dtype.name for k, v in made.items()} == {
        "encoder_input_tokens": "int32",
        "decoder_input_tokens": "int32",
        "decoder_target_tokens": "int32",
        "decoder_loss_weights": "float32",
    }


def test_the_mixture_holds_its_sources(registered):
    import seqio

    mixture = seqio.get_mixture_or_task("tiny_generation")
    assert {task.name for task in mixture.tasks} == {"tiny_labelled", "tiny_passages"}
    seen = mixture.get_dataset({"inputs": 12, "targets": 4}, split="train", num_epochs=1)
    assert sum(1 for _ in seen) >= 3


def test_rank_list_task_equals_the_arrays_training_reads(registered, vocabulary, table):
    from dgr_jax.data.feature_converters import RankListConverter

    _, lists = registered
    lengths = {
        "inputs": 12, "targets": 3, "identifiers": (2, 1, 3), "identifier_weights": (2, 1),
        "teacher_scores": 2,
    }  # fmt: skip
    through_seqio = arrays("tiny_rank_lists", lengths, RankListConverter())
    direct = rank_lists.features(**lists, table=table, vocabulary=vocabulary, query_length=12)
    assert through_seqio.keys() == direct.keys()
    for name in direct:
        np.testing.assert_array_equal(through_seqio[name], direct[name], err_msg=name)
        assert through_seqio[name].dtype == direct[name].dtype, name
    assert direct["passage_mask"].tolist() == [[True, True], [True, True], [True, False]]
    assert np.isfinite(direct["teacher_scores"]).all()


@with_seqio
def test_dense_tasks(tmp_path, vocabulary, passages):
    """Queries with their positives, the highest grades first, and the text of every passage."""
    from dgr_jax.data import prepared, tasks
    from dgr_jax.data.feature_converters import PassageConverter, PositivesConverter

    queries = {qid: Query(qid, text) for qid, text in TEXTS.items()}
    qrels = [Qrel("q1", "p1", 1), Qrel("q0", "p1", 1), Qrel("q1", "p0", 2), Qrel("q2", "p2", 0)]
    streams = {
        "labelled_train": examples.of_judged(queries, qrels, passages, 1),
        "passages": examples.of_positives([("of owls", 2, "")]),
    }
    counts = prepared.write(tmp_path, "positives", streams, prepared.positives())
    assert counts == {"labelled_train": 2, "passages": 1}
    texts = lambda: ({"inputs": passage.contents} for passage in passages)
    tasks.register("tiny", tasks.PreparedPositives(tmp_path, vocabulary, tuple(streams), texts))
    lengths = {"inputs": 12, "positives": 3, "grades": 3, "query": 1}
    made = arrays("tiny_dense_labelled_train", lengths, PositivesConverter())
    assert made["positives"].tolist() == [[0, 1, -1], [1, -1, -1]]
    assert made["grades"].tolist() == [[2, 1, 0], [1, 0, 0]]
    assert made["query"].tolist() == [[0], [1]]
    asked = vocabulary.encode_inputs([TEXTS["q1"], TEXTS["q0"]], 12)
    np.testing.assert_array_equal(made["encoder_input_tokens"], asked)
    made = arrays("tiny_dense_passages", lengths, PositivesConverter())
    assert made["positives"].tolist() == [[2, -1, -1]]
    made = arrays("tiny_dense_corpus", {"inputs": 9}, PassageConverter())
    read = vocabulary.encode_inputs([passage.contents for passage in PASSAGES], 9)
    np.testing.assert_array_equal(made["passage_tokens"], read)


@with_seqio
def test_a_folder_that_was_written_again(tmp_path, vocabulary, passages):
    """Another experiment in the same folder and process: other splits, other numbers."""
    from dgr_jax.data import prepared, tasks
    from dgr_jax.data.feature_converters import PositivesConverter

    lengths = {"inputs": 12, "positives": 1, "grades": 1, "query": 1}
    texts = lambda: iter(())
    for source, count in (("passages", 1), ("sentences", 2), ("passages", 3)):
        shutil.rmtree(tmp_path / "tfds", ignore_errors=True)
        (tmp_path / "tfds").mkdir()
        streams = {source: examples.of_positives([("of owls", n, "") for n in range(count)])}
        prepared.write(tmp_path / "tfds", "positives", streams, prepared.positives())
        collection = tasks.PreparedPositives(tmp_path / "tfds", vocabulary, (source,), texts)
        tasks.register("tiny", collection)
        made = arrays(f"tiny_dense_{source}", lengths, PositivesConverter())
        assert sorted(made["positives"].tolist()) == [[n] for n in range(count)]


def test_converters_refuse_wrong_lengths(registered):
    from dgr_jax.data.feature_converters import GenerationConverter, RankListConverter

    lengths = {
        "inputs": 12, "targets": 3, "identifiers": 2, "identifier_weights": (2, 1),
        "teacher_scores": 2,
    }  # fmt: skip
    with pytest.raises(
        ValueError, match=r"length of feature 'identifiers': got 2, expected a tuple"
    ):
        RankListConverter().get_model_feature_lengths(lengths)
    with pytest.raises(ValueError, match=r"length of feature 'inputs': got 0, expected at least 1"):
        GenerationConverter().get_model_feature_lengths({"inputs": 0, "targets": 3})
    with pytest.raises(ValueError, match="task_feature_lengths"):
        arrays("tiny_labelled", {"inputs": 12}, GenerationConverter())


@pytest.mark.slow
@with_seqio
def test_tasks_of_several_views_equal_the_arrays_training_reads(tmp_path):
    from dgr_jax.data import tasks
    from dgr_jax.data.feature_converters import GenerationConverter, ViewListConverter
    from dgr_jax.data.prepared import features, write

    vocabulary, indexes, _, prepared = view_collections.prepare(tmp_path)
    texts = view_collections.TEXTS
    lists = view_collections.keyed(view_collections.found_by(vocabulary, indexes), indexes)
    named = lists.of(np.arange(3), texts, lists.passages, Counter())
    scores = np.tile(np.arange(4, 0, -1, dtype=np.float32), (3, 1))
    positives = np.zeros(3, np.int32)
    pairs = [(texts[i], i, f"q{i}") for i in range(3)]
    made = list(prepared.examples(pairs))
    write(tmp_path / "tfds", "examples", {"labelled": made}, features(views=True))
    many = partial(rank_lists.view_examples, texts, named, scores, positives, len(indexes.text))
    tasks.register(
        "views", tasks.PreparedExamples(tmp_path / "tfds", vocabulary, {"labelled": 1.0}, many)
    )
    passages_, limit, length = named.tokens.shape[1:]
    pair, event = (passages_, limit), (passages_, named.spans.shape[2])
    lengths = {
        "inputs": (3, 16), "targets": length, "identifiers": (*pair, length),
        "identifier_weights": pair, "teacher_scores": passages_, "identifier_views": pair,
        "identifier_counts": pair, "spans": event, "span_starts": event, "corpus_tokens": 1,
    }  # fmt: skip
    through_seqio = arrays("views_rank_lists", lengths, ViewListConverter())
    direct = view_collections.lists_of(vocabulary, indexes, named)
    assert through_seqio.keys() == direct.keys()
    for name in direct:
        np.testing.assert_array_equal(through_seqio[name], direct[name], err_msg=name)
        assert through_seqio[name].dtype == direct[name].dtype, name
    assert direct["encoder_input_tokens"].shape == (3, 3, 16)

    lengths = {"inputs": 16, "targets": indexes.length}
    generation = arrays("views_labelled", lengths, GenerationConverter())
    direct = examples.features(made, vocabulary, 16, indexes.length)
    assert generation.keys() == direct.keys()
    for name in direct:
        np.testing.assert_array_equal(generation[name], direct[name], err_msg=name)
    inputs, targets = generation["encoder_input_tokens"], generation["decoder_target_tokens"]
    asked = [VIEWS[vocabulary.views.index(v)] for v in vocabulary.views]
    for row, target in zip(inputs, targets, strict=True):
        view = asked[row[0] - vocabulary.first_view_id]
        (text,) = {t for t in texts if vocabulary.encode(t) == row[1:][row[1:] > 1].tolist()}
        expected = vocabulary.encode_inputs([text], 16, view=view)[0]
        np.testing.assert_array_equal(row, expected)
        assert (target[0] == vocabulary.marker(view)) == (view != "body")
    assert {row[0] - vocabulary.first_view_id for row in inputs} == {0, 1, 2}
