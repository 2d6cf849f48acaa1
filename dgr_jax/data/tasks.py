"""Registers the SeqIO tasks of a prepared collection; the files in tasks/ call it by name.

For a collection `squad`: squad_labelled, squad_passages and squad_pseudo_queries (query or text ->
identifier), the mixture `squad_generation` of those in use, and `squad_rank_lists` (query ->
teacher's rank list), which reads what the teach stage wrote.

Where the vocabulary has view markers, each example has a view, whose marker stands before the
query, and a rank list holds the query three times, with the marker of each view.

For a dense retriever: squad_dense_labelled_<split>, squad_dense_passages and
squad_dense_pseudo_queries (query or text -> its positives), and squad_dense_corpus (the text of
every passage).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import seqio
import tensorflow as tf

from dgr_jax.data import prepared
from dgr_jax.data.rank_lists import VIEW_FEATURES
from dgr_jax.data.vocabulary import VIEWS, Vocabulary
from dgr_jax.special_tokens import EOS_ID

RankListSource = Callable[[], Iterator[Mapping[str, object]]]


@dataclass(frozen=True)
class PreparedExamples:
    """The generation examples of a prepared collection, and the rank lists of a teacher.

    tfds_dir: the folder of the TFDS dataset `examples`. rates: source -> rate; each source is a
    TFDS split. rank_lists: a function that yields {inputs: str, targets, identifiers [L, K, T],
    identifier_weights [L, K], teacher_scores [L]}, and with views what rank_lists.view_examples
    adds; None before the teach stage.
    """

    tfds_dir: Path
    vocabulary: Vocabulary
    rates: Mapping[str, float]
    rank_lists: RankListSource | None = None


# Task files call it so: what they hold is among the settings of a stage, which would run again.
Prepared = PreparedExamples


@dataclass(frozen=True)
class PreparedPositives:
    """The examples of a collection that was prepared for a dense retriever.

    tfds_dir: the folder of the TFDS dataset `positives`; each of `sources` is one of its splits.
    passages: a function that yields {inputs: text} for every passage in corpus order.
    """

    tfds_dir: Path
    vocabulary: Vocabulary
    sources: Sequence[str]
    passages: Callable[[], Iterator[Mapping[str, str]]]


def register(name: str, collection: PreparedExamples | PreparedPositives) -> None:
    """Adds (or replaces) the tasks and the mixture of the collection `name`."""
    _forget(collection.tfds_dir)
    if isinstance(collection, PreparedPositives):
        _register_dense(name, collection)
        return
    text, identifier = _features(collection.vocabulary)
    marked = [_mark_view(collection.vocabulary)] if collection.vocabulary.views else []
    for source in collection.rates:
        _replace(seqio.TaskRegistry, f"{name}_{source}")
        seqio.TaskRegistry.add(
            f"{name}_{source}",
            source=seqio.TfdsDataSource(
                tfds_name=f"examples:{prepared.VERSION}",
                tfds_data_dir=str(collection.tfds_dir),
                splits={"train": source},
            ),
            preprocessors=[
                seqio.preprocessors.tokenize,
                *marked,
                seqio.preprocessors.append_eos_after_trim,
            ],
            output_features={"inputs": text, "targets": identifier},
        )
    _replace(seqio.MixtureRegistry, f"{name}_generation")
    seqio.MixtureRegistry.add(
        f"{name}_generation",
        [(f"{name}_{source}", rate) for source, rate in collection.rates.items()],
    )
    if collection.rank_lists is not None:
        _register_rank_lists(name, collection, text, identifier)


def _forget(tfds_dir: Path) -> None:
    """SeqIO keeps what it has read of a folder as long as the process lives; by now another
    experiment may have written it."""
    kept = getattr(seqio.LazyTfdsLoader, "_MEMOIZED_BUILDERS", {})
    for key in [key for key in kept if key[-1] == str(tfds_dir)]:
        del kept[key]


def _register_dense(name: str, collection: PreparedPositives) -> None:
    text, _ = _features(collection.vocabulary)
    numbers = seqio.Feature(seqio.PassThroughVocabulary(1), add_eos=False)
    plain = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim]
    for source in collection.sources:
        _replace(seqio.TaskRegistry, f"{name}_dense_{source}")
        seqio.TaskRegistry.add(
            f"{name}_dense_{source}",
            source=seqio.TfdsDataSource(
                tfds_name=f"positives:{prepared.VERSION}",
                tfds_data_dir=str(collection.tfds_dir),
                splits={"train": source},
            ),
            preprocessors=plain,
            output_features={"inputs": text}
            | dict.fromkeys(("positives", "grades", "query"), numbers),
        )
    signature = {"inputs": tf.TensorSpec((), tf.string)}

    def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del split, shuffle_files, seed
        return tf.data.Dataset.from_generator(collection.passages, output_signature=signature)

    _replace(seqio.TaskRegistry, f"{name}_dense_corpus")
    seqio.TaskRegistry.add(
        f"{name}_dense_corpus",
        source=seqio.FunctionDataSource(dataset, splits=["train"]),
        preprocessors=plain,
        output_features={"inputs": text},
    )


def _register_rank_lists(name, collection, text, identifier) -> None:
    views = collection.vocabulary.views
    numbers, scores = (
        seqio.Feature(seqio.PassThroughVocabulary(1), add_eos=False, dtype=dtype)
        for dtype in (tf.int32, tf.float32)
    )
    features = {
        "inputs": _ranked(text, 2) if views else text,
        "targets": identifier,
        "identifiers": _ranked(identifier, 3),
        "identifier_weights": _ranked(scores, 2),
        "teacher_scores": scores,
    }
    if views:
        features |= {key: _ranked(numbers, 2) for key in VIEW_FEATURES} | {"corpus_tokens": scores}
        preprocessors = [_tokenize_inputs(text), _each_view(collection.vocabulary)]
    else:
        preprocessors = [_tokenize_inputs(text), seqio.preprocessors.append_eos_after_trim]
    _replace(seqio.TaskRegistry, f"{name}_rank_lists")
    seqio.TaskRegistry.add(
        f"{name}_rank_lists",
        source=seqio.FunctionDataSource(
            _from_generator(collection.rank_lists, bool(views)), splits=["train"]
        ),
        preprocessors=preprocessors,
        output_features=features,
    )


def register_token_lists(
    name: str, vocabulary: Vocabulary, lists: Mapping[str, np.ndarray]
) -> None:
    """Adds (or replaces) the task `<name>_rank_lists` from the token arrays of the teach stage.

    RankListConverter turns its examples back into the same arrays, in the same order.

    lists: model features [n, ...] of `rank_lists.features`, memory mapped or not.
    """
    text, identifier = _features(vocabulary)
    scores = seqio.Feature(seqio.PassThroughVocabulary(1), add_eos=False, dtype=tf.float32)
    features = {
        "inputs": seqio.Feature(text.vocabulary, add_eos=False),
        "targets": identifier,
        "identifiers": _ranked(identifier, 3),
        "identifier_weights": _ranked(scores, 2),
        "teacher_scores": scores,
    }
    places = {
        "inputs": "encoder_input_tokens",
        "targets": "decoder_target_tokens",
        "identifiers": "identifier_tokens",
        "identifier_weights": "identifier_weights",
        "teacher_scores": "teacher_scores",
    }
    columns = {feature: lists[place] for feature, place in places.items()}
    signature = {
        feature: tf.TensorSpec(rows.shape[1:], features[feature].dtype)
        for feature, rows in columns.items()
    }

    def rows() -> Iterator[dict[str, np.ndarray]]:
        for row in range(len(columns["inputs"])):
            yield {feature: column[row] for feature, column in columns.items()}

    _register_function(f"{name}_rank_lists", rows, signature, features, split="train")


def register_questions(
    name: str,
    vocabulary: Vocabulary,
    questions: Sequence[tuple[str, np.ndarray]],
    known: Callable[[np.ndarray], np.ndarray],
) -> None:
    """Adds (or replaces) the task `name` with a split `test` of queries to be answered.

    Predictions are measured by `answer_measures`.

    questions: (text, identifiers of its positives int32 [n, T], the best first); the first one is
    the target. known: int32 [..., T] -> bool [...], whether these are identifiers.
    """
    text, identifier = _features(vocabulary)
    signature = {
        "inputs": tf.TensorSpec((), tf.string),
        "targets": tf.TensorSpec((None,), tf.int32),
        "positives": tf.TensorSpec((None, None), tf.int32),
    }

    def rows() -> Iterator[dict[str, object]]:
        for query, positives in questions:
            yield {"inputs": query, "targets": positives[0], "positives": positives}

    def postprocess(output: Sequence, *, example: Mapping[str, np.ndarray], is_target: bool):
        positives = example["positives"]
        return positives if is_target else _answers(output, positives.shape[-1])

    def measures(targets: Sequence[np.ndarray], predictions: Sequence[np.ndarray]):
        return answer_measures(targets, predictions, known)

    _register_function(
        name,
        rows,
        signature,
        {"inputs": text, "targets": identifier},
        split="test",
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim],
        postprocess_fn=postprocess,
        metric_fns=[measures],
    )


def _answers(output: Sequence, length: int) -> np.ndarray:
    """One sequence of tokens, or several with the best as the last -> int32 [M, length], the best
    first. The sequences end with EOS, and are padded here."""
    several = output if len(output) and np.ndim(output[0]) else [output]
    rows = np.zeros((len(several), length), np.int32)
    for row, tokens in zip(rows, reversed(several), strict=True):
        row[: len(tokens)] = tokens[:length]
    return rows


def answer_measures(
    targets: Sequence[np.ndarray],
    predictions: Sequence[np.ndarray],
    known: Callable[[np.ndarray], np.ndarray],
) -> dict[str, float]:
    """Success@1, Success@10, RR@10 and the share of legal identifiers among all that were written.

    targets: for each query int32 [n, T], its positives. predictions: for each query int32 [M, T],
    the best first, with rows of 0 where fewer were written. known: int32 [..., T] -> bool [...].
    """
    places, legal, written = [], 0, 0
    for positives, answers in zip(targets, predictions, strict=True):
        same = (answers[:, None] == positives[None]).all(-1).any(-1)
        places.append(int(same.argmax()) if same.any() else 10)
        there = answers.any(-1)
        written += int(there.sum())
        legal += int(known(answers[there]).sum())
    ranks = np.array(places)
    return {
        "Success@1": float((ranks < 1).mean()),
        "Success@10": float((ranks < 10).mean()),
        "RR@10": float(np.where(ranks < 10, 1 / (ranks + 1), 0.0).mean()),
        "legal": legal / max(1, written),
    }


def _register_function(name, rows, signature, features, split, preprocessors=(), **more) -> None:
    """A task over a generator of examples."""

    def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del split, shuffle_files, seed
        return tf.data.Dataset.from_generator(rows, output_signature=signature)

    _replace(seqio.TaskRegistry, name)
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(dataset, splits=[split]),
        preprocessors=list(preprocessors),
        output_features=features,
        **more,
    )


def vocabularies(vocabulary: Vocabulary) -> tuple[seqio.Vocabulary, seqio.Vocabulary]:
    """SeqIO's vocabularies of the texts and of the identifiers in all tasks."""
    pieces = seqio.SentencePieceVocabulary(str(vocabulary.folder / "spiece.model"))
    return pieces, seqio.PassThroughVocabulary(vocabulary.size, eos_id=EOS_ID)


def _features(vocabulary: Vocabulary) -> tuple[seqio.Feature, seqio.Feature]:
    pieces, codes = vocabularies(vocabulary)
    return seqio.Feature(pieces, add_eos=True), seqio.Feature(codes, add_eos=False)


def _ranked(feature: seqio.Feature, rank: int) -> seqio.Feature:
    return seqio.Feature(feature.vocabulary, add_eos=False, dtype=feature.dtype, rank=rank)


def _markers(vocabulary: Vocabulary) -> list[int]:
    """The marker of each of VIEWS, 0 where a view has none."""
    return [vocabulary.marker(v) if v in vocabulary.views else 0 for v in VIEWS]


def _mark_view(vocabulary: Vocabulary):
    """A preprocessor that puts the marker of an example's view before its query."""
    known, marker = tf.constant(VIEWS), tf.constant(_markers(vocabulary))

    def mark(e):
        first = tf.boolean_mask(marker, known == e["view"])
        return e | {"inputs": tf.concat([first, e["inputs"]], 0)}

    return lambda ds: ds.map(mark)


def _each_view(vocabulary: Vocabulary):
    """A preprocessor that repeats a query with the marker of each of VIEWS: [3, n], cut, with
    EOS."""
    marker = tf.constant(_markers(vocabulary))[:, None]

    def each(ds: tf.data.Dataset, sequence_length) -> tf.data.Dataset:
        length = sequence_length["inputs"][1]

        def inputs(e):
            text = tf.tile(e["inputs"][None, : length - 2], [len(VIEWS), 1])
            return tf.concat([marker, text, tf.fill([len(VIEWS), 1], EOS_ID)], 1)

        return ds.map(lambda e: e | {"inputs": inputs(e)})

    return each


def _tokenize_inputs(text: seqio.Feature):
    """A preprocessor that tokenizes `inputs` alone; other features are tokens or scores already."""

    def tokenize(ds: tf.data.Dataset) -> tf.data.Dataset:
        return ds.map(lambda e: e | {"inputs": text.vocabulary.encode_tf(e["inputs"])})

    return tokenize


def _from_generator(rank_lists: RankListSource, views: bool):
    signature = {
        "inputs": tf.TensorSpec((), tf.string),
        "targets": tf.TensorSpec((None,), tf.int32),
        "identifiers": tf.TensorSpec((None, None, None), tf.int32),
        "identifier_weights": tf.TensorSpec((None, None), tf.float32),
        "teacher_scores": tf.TensorSpec((None,), tf.float32),
    }
    if views:
        pairs = tf.TensorSpec((None, None), tf.int32)
        signature |= dict.fromkeys(VIEW_FEATURES, pairs)
        signature["corpus_tokens"] = tf.TensorSpec((1,), tf.float32)

    def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del split, shuffle_files, seed
        return tf.data.Dataset.from_generator(rank_lists, output_signature=signature)

    return dataset


def _replace(registry, name: str) -> None:
    if name in registry.names():
        registry.remove(name)
