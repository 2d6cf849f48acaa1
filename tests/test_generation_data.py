"""Generation examples of a large collection: parts, records, arrays, and Beam's workers."""

import builtins
import gzip
import importlib.util
import logging
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dgr_jax.corpora import lines, store
from dgr_jax.corpora.types import Passage, Qrel, Query
from dgr_jax.data import examples
from dgr_jax.data.vocabulary import SentencePiece, Vocabulary, evenly
from dgr_jax.experiments.generative import Prepare
from dgr_jax.identifiers import embeddings
from dgr_jax.identifiers.atomic import Atomic
from dgr_jax.stages import generation_data
from dgr_jax.stages.prepare import prepare
from dgr_jax.training.arrays import read_arrays
from tests.conftest import one_at_a_time, with_seqio

WORDS = "bees make honey and owls fly over slow rivers of ice in the silent valley".split()


def passages(count):
    rng = np.random.default_rng(0)
    for number in range(count):
        words = rng.choice(WORDS, 14).tolist()
        text = f"{' '.join(words[:6])}. {' '.join(words[6:])}." if number % 7 else ""
        yield Passage(f"p{number}", text, WORDS[number % len(WORDS)] if number % 7 else "")


class Collection:
    """23 passages, some blank; 9 judged queries, one of them only partly relevant."""

    def check(self, splits=()):
        pass

    def passages(self):
        return passages(23)

    def queries(self, split):
        return (Query(f"{split}{i}", f"{WORDS[i]} and é") for i in range(9))

    def qrels(self, split):
        return (Qrel(f"{split}{i}", f"p{2 * i}", i % 4) for i in range(9))


class Experiment:
    collection = Collection()
    plan = None

    def __init__(self, **sources):
        self.prepare = Prepare(
            tasks="quickstart",
            identifiers=Atomic(),
            vocabulary=SentencePiece(size=60),
            sources=examples.Sources(chunk_words=6, **sources),
            query_length=9,
        )


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of 5 passages or 4 lines."""
    monkeypatch.setattr(examples, "PASSAGES_A_PART", 5)
    monkeypatch.setattr(examples, "LINES_A_PART", 4)


def one_after_the_other(work, parts):
    """Takes the place of workers, and finishes in another order."""
    for part in list(parts)[::-1]:
        work.write_part(part)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_parts_are_the_whole(tmp_path, small_parts):
    made = store.write(passages(23), tmp_path / "passages")
    path = tmp_path / "pseudo.tsv"
    path.write_text(
        "\ufeff" + "".join(f"p{i % 23}\tabout é {i}\n" for i in range(10)), encoding="utf-8"
    )
    qrels = [Qrel(f"q{i}", f"p{i}", i % 3) for i in range(9)]
    judged = {"qrels": qrels, "query_texts": {f"q{i}": f"text {i}" for i in range(9)}}
    read = Counter()
    for settings in (examples.Sources(), examples.Sources(pseudo_query_path=str(path))):
        for source in settings.rates():
            whole = list(examples.pairs(source, settings, store=made, **judged))
            cut = examples.parts(source, settings, num_passages=23, num_qrels=9)
            read[len(cut)] += 1
            assert [part.place for part in cut] == list(range(len(cut)))
            found = [
                pair
                for part in cut
                for pair in examples.pairs(source, settings, store=made, part=part, **judged)
            ]
            assert found == whole and len(whole) > 5
    assert read == {3: 3, 5: 3}


def test_places_of_lines(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes("one\r\nzwei é\nthree\nfour\nfive".encode())
    found = lines.places(path, 2)
    assert found == [(0, 0, 2), (2, 13, 2), (4, 24, 1)]
    for after, offset, count in found:
        here = list(lines.read(path, after=after, offset=offset))[:count]
        assert here == list(lines.read(path))[after : after + count]
    assert lines.places(path, 5) == [(0, 0, 5)]
    packed = tmp_path / "lines.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert lines.places(packed, 2) == [(0, 0, 5)]
    (tmp_path / "none").write_bytes(b"")
    assert lines.places(tmp_path / "none", 2) == []


def test_an_error_in_a_part_names_its_line(tmp_path, small_parts):
    made = store.write(passages(3), tmp_path / "passages")
    path = tmp_path / "pseudo.tsv"
    path.write_text("p1\tabout bees\n" * 6 + "p2 about owls\n")
    settings = examples.Sources(pseudo_query_path=str(path))
    last = examples.parts("pseudo_queries", settings, num_passages=3)[-1]
    with pytest.raises(ValueError, match=r"pseudo.tsv:7: got 'p2 about owls', expected two"):
        list(examples.pairs("pseudo_queries", settings, store=made, part=last))


@with_seqio
def test_records_are_what_tfds_writes():
    import tensorflow as tf
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    from dgr_jax.data import prepared

    features = prepared.features(views=True)
    serializer = ExampleSerializer(features.get_serialized_info())
    rng = np.random.default_rng(0)
    for number in range(30):
        targets = rng.integers(0, 2 ** rng.integers(1, 31, 5), dtype=np.int32)
        text = "é" * int(rng.integers(0, 200))
        example = {"inputs": text, "targets": targets, "qid": "", "pid": f"p{number}", "view": "t"}
        expected = serializer.serialize_example(features.encode_example(example))
        expected = tf.train.Example.FromString(expected)
        assert prepared.encoded(example) == expected.SerializeToString(deterministic=True)


@pytest.fixture(scope="session")
def by_one(together):
    """The stage with small parts, all in one process, once for all workers; beside it its log."""
    folder, log = together / "by_one", together / "by_one.log"
    with one_at_a_time(together / "by_one.lock"), pytest.MonkeyPatch.context() as patch:
        if log.exists():
            return folder
        patch.setattr(examples, "PASSAGES_A_PART", 5)
        patch.setattr(examples, "LINES_A_PART", 4)
        folder.mkdir()
        handler = logging.FileHandler(partial := log.with_suffix(".partial"))
        logger = logging.getLogger("dgr_jax")
        patch.setattr(logger, "level", logging.INFO)
        logger.addHandler(handler)
        try:
            prepare(Experiment(), folder)
        finally:
            logger.removeHandler(handler)
            handler.close()
        partial.rename(log)
    return folder


@with_seqio
def test_arrays_and_records_are_those_of_the_seqio_tasks(by_one):
    from dgr_jax.data import datasets, tasks
    from dgr_jax.data.feature_converters import GenerationConverter

    settings, vocabulary = Experiment().prepare, Vocabulary.load(by_one)
    rates = settings.sources.rates()
    tasks.register("cut", tasks.PreparedExamples(by_one / "tfds", vocabulary, rates))
    # The third part of the judgements holds only one of relevance 0, which gives no example.
    shards = Counter(p.name.split(".")[0] for p in by_one.glob("tfds/**/*.tfrecord*"))
    assert shards == {f"examples-{s}": n for s, n in zip(rates, (2, 5, 5), strict=True)}
    for source in rates:
        lengths = {"inputs": settings.query_length, "targets": 1}
        blocks = list(datasets.arrays(f"cut_{source}", lengths, GenerationConverter()))
        through_seqio = {name: np.concatenate([b[name] for b in blocks]) for name in blocks[0]}
        direct = read_arrays(by_one / "arrays" / source, verify=True)
        assert {n: a.dtype for n, a in direct.items()} == {
            n: a.dtype for n, a in through_seqio.items()
        }
        # TFDS reads the files of a split by turns.
        np.testing.assert_array_equal(sorted_rows(direct), sorted_rows(through_seqio))


def sorted_rows(features):
    rows = np.concatenate([features[name] for name in sorted(features)], axis=1)
    return rows[np.lexsort(rows.T)]


@with_seqio
def test_a_task_with_features_of_its_own_is_followed(tmp_path, monkeypatch, caplog):
    """A collection's file in tasks/ may register other tasks: here one that adds a word."""
    import seqio
    import tensorflow as tf

    from dgr_jax.data import tasks

    @seqio.map_over_dataset
    def longer(example):
        return example | {"inputs": tf.strings.join([example["inputs"], " honey"])}

    def register(made):
        tasks.register("quickstart", made)
        usual = seqio.TaskRegistry.get("quickstart_labelled")
        seqio.TaskRegistry.remove("quickstart_labelled")
        steps = [longer, *usual.preprocessors]
        seqio.TaskRegistry.add("quickstart_labelled", usual.source, usual.output_features, steps)

    module = sys.modules["dgr_jax.stages.prepare"]
    monkeypatch.setattr(module, "task_file", lambda _: SimpleNamespace(register=register))
    caplog.set_level("INFO")
    prepare(Experiment(), tmp_path)
    assert [r.message for r in caplog.records if "of its own" in r.message] == [
        "prepare: quickstart_labelled makes features of its own"
    ]
    found = read_arrays(tmp_path / "arrays" / "labelled", verify=True)["encoder_input_tokens"]
    texts = [f"{WORDS[i]} and é honey" for i in range(9) if i % 4]
    np.testing.assert_array_equal(found, Vocabulary.load(tmp_path).encode_inputs(texts, 9))


@with_seqio
def test_what_is_compared_with_the_seqio_tasks_is_equal(by_one):
    """Files of few examples, which TFDS reads by turns: the arrays are still the direct ones."""
    assert len(list(by_one.glob("tfds/**/*.tfrecord*"))) == 12
    said = by_one.with_name("by_one.log").read_text()
    assert "prepare: examples in " in said
    assert "of its own" not in said


@pytest.mark.slow
def test_workers_write_the_same_bytes(by_one, tmp_path, small_parts):
    prepare(Experiment(), tmp_path, one_after_the_other)
    assert files(tmp_path) == files(by_one)


@pytest.mark.slow
@with_seqio
def test_parts_without_examples_leave_no_file(tmp_path, small_parts, monkeypatch):
    class Blank(Collection):
        def passages(self):
            for number, passage in enumerate(passages(23)):
                yield replace(passage, text="", title="") if 5 <= number < 10 else passage

    monkeypatch.setattr(Experiment, "collection", Blank())
    for name, everywhere in (("one", None), ("many", one_after_the_other)):
        (tmp_path / name).mkdir()
        prepare(Experiment(pseudo_queries=0.0), tmp_path / name, everywhere)
    assert files(tmp_path / "one") == files(tmp_path / "many")
    shards = sorted(p.name for p in (tmp_path / "one").glob("tfds/**/*-passages.*"))
    assert [name[-5:] for name in shards] == ["00000", "00001", "00002", "00003"]


def test_a_source_without_examples_is_named(tmp_path):
    experiment = Experiment(min_sentence_words=50)
    with pytest.raises(ValueError, match="'pseudo_queries' gives no example on this collection"):
        prepare(experiment, tmp_path)


def test_views_are_drawn_part_by_part(tmp_path, small_parts):
    from tests import view_collections

    made = view_collections.prepare(tmp_path)[3]
    pairs = [("bees", 0, "q0"), ("owls", 1, "q1")] * 20
    first, second = ([e["targets"].tolist() for e in made.examples(pairs, n)] for n in (0, 1))
    assert first == [e["targets"].tolist() for e in made.examples(pairs)]
    assert first != second


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("apache_beam") is None, reason="needs dgr_jax[beam]")
@pytest.mark.parametrize("mode", ["in_memory", "multi_processing"])
def test_beam_with_two_workers_writes_the_same_bytes(by_one, tmp_path, small_parts, mode):
    from functools import partial

    from dgr_jax.stages import beam

    flags = f"--runner=DirectRunner --direct_num_workers=2 --direct_running_mode={mode}"
    prepare(Experiment(), tmp_path, partial(beam.write_parts, options=flags))
    assert files(tmp_path) == files(by_one)


def test_beam_is_asked_for_by_name(monkeypatch):
    from dgr_jax.stages import beam

    real = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == "apache_beam":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"--beam_options needs the extra 'dgr_jax\[beam\]': pip"):
        beam.check()


def test_a_vocabulary_is_trained_on_texts_evenly_spread():
    texts = [f"{number:03d}" for number in range(100)]
    assert evenly(texts, 100, 1000) == texts
    assert evenly(texts, 99, 1000) == texts[::2]
    assert evenly(iter(texts), 1000, 80) == texts[::4]
    assert evenly(["a" * 50], 1, 10) == ["a" * 50]


def test_vectors_in_a_file_are_the_same(tmp_path, monkeypatch):
    made = store.write(passages(23), tmp_path)
    settings = embeddings.TfidfSvd(dim=4, fit_passages=12)
    in_memory = settings.embed(made, 0)
    monkeypatch.setattr(embeddings, "_IN_MEMORY", 0)
    mapped = settings.embed(made, 0)
    assert isinstance(mapped, np.memmap)
    np.testing.assert_array_equal(mapped, in_memory)


def test_a_worker_opens_what_the_stage_wrote(by_one):
    opened = generation_data.reopened(generation_data.Work(Experiment().prepare, by_one))
    assert len(opened.passages) == 23 and len(opened.queries) == len(opened.qrels) == 9


def test_beam_makes_the_examples_of_a_student_alone(monkeypatch):
    from dgr_jax.stages import beam, dense_prepare
    from dgr_jax.stages.prepare import STAGE

    monkeypatch.setattr(beam, "check", lambda: None)
    changed = beam.everywhere("--runner=DirectRunner")
    made = changed(STAGE)
    assert made.name == STAGE.name and "everywhere" in made.make.keywords
    with pytest.raises(ValueError, match="--beam_options: got a dense retriever, expected an"):
        changed(dense_prepare.STAGE)
