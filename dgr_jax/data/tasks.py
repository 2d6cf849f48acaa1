"""Registers the SeqIO tasks of a prepared collection; the files in tasks/ call it by name.

For a collection `squad`: squad_labelled, squad_passages and squad_pseudo_queries (query or text ->
identifier), the mixture `squad_generation` of those in use, and `squad_rank_lists` (query ->
teacher's rank list), which reads what the teach stage wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import seqio
import tensorflow as tf

from dgr_jax.data import prepared
from dgr_jax.data.vocabulary import EOS_ID, Vocabulary

RankListSource = Callable[[], "Iterator[Mapping[str, object]]"]  # noqa: F821


@dataclass(frozen=True)
class Prepared:
    """Where a prepared collection lies, and what is in it.

    tfds_dir: holds the TFDS dataset `examples`; rates: source -> rate, each a TFDS split;
    rank_lists: called, yields {inputs: str, targets, identifiers [L, K, T], identifier_weights
    [L, K], teacher_scores [L]}; None before the teach stage.
    """

    tfds_dir: Path
    vocabulary: Vocabulary
    rates: Mapping[str, float]
    rank_lists: RankListSource | None = None


def register(name: str, made: Prepared) -> None:
    """Add (or replace) the tasks and the mixture of collection `name`."""
    text, identifier = _features(made.vocabulary)
    for source in made.rates:
        _replace(seqio.TaskRegistry, f"{name}_{source}")
        seqio.TaskRegistry.add(
            f"{name}_{source}",
            source=seqio.TfdsDataSource(
                tfds_name=f"examples:{prepared.VERSION}",
                tfds_data_dir=str(made.tfds_dir),
                splits={"train": source},
            ),
            preprocessors=[
                seqio.preprocessors.tokenize,
                seqio.preprocessors.append_eos_after_trim,
            ],
            output_features={"inputs": text, "targets": identifier},
        )
    _replace(seqio.MixtureRegistry, f"{name}_generation")
    seqio.MixtureRegistry.add(
        f"{name}_generation", [(f"{name}_{source}", rate) for source, rate in made.rates.items()]
    )
    if made.rank_lists is not None:
        _register_rank_lists(name, made, text, identifier)


def _register_rank_lists(name, made, text, identifier) -> None:
    scores = seqio.Feature(
        seqio.PassThroughVocabulary(1), add_eos=False, dtype=tf.float32, required=True
    )
    _replace(seqio.TaskRegistry, f"{name}_rank_lists")
    seqio.TaskRegistry.add(
        f"{name}_rank_lists",
        source=seqio.FunctionDataSource(_from_generator(made.rank_lists), splits=["train"]),
        preprocessors=[
            _tokenize_inputs(text),
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features={
            "inputs": text,
            "targets": identifier,
            "identifiers": _ranked(identifier, 3),
            "identifier_weights": _ranked(scores, 2),
            "teacher_scores": scores,
        },
    )


def _features(vocabulary: Vocabulary) -> tuple[seqio.Feature, seqio.Feature]:
    pieces = seqio.SentencePieceVocabulary(str(vocabulary.folder / "spiece.model"))
    codes = seqio.PassThroughVocabulary(vocabulary.size, eos_id=EOS_ID)
    return seqio.Feature(pieces, add_eos=True), seqio.Feature(codes, add_eos=False)


def _ranked(feature: seqio.Feature, rank: int) -> seqio.Feature:
    return seqio.Feature(feature.vocabulary, add_eos=False, dtype=feature.dtype, rank=rank)


def _tokenize_inputs(text: seqio.Feature):
    """Only `inputs` is text here; the other features are tokens and scores already."""

    def tokenize(ds: tf.data.Dataset) -> tf.data.Dataset:
        return ds.map(lambda e: e | {"inputs": text.vocabulary.encode_tf(e["inputs"])})

    return tokenize


def _from_generator(rank_lists: RankListSource):
    signature = {
        "inputs": tf.TensorSpec((), tf.string),
        "targets": tf.TensorSpec((None,), tf.int32),
        "identifiers": tf.TensorSpec((None, None, None), tf.int32),
        "identifier_weights": tf.TensorSpec((None, None), tf.float32),
        "teacher_scores": tf.TensorSpec((None,), tf.float32),
    }

    def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del split, shuffle_files, seed
        return tf.data.Dataset.from_generator(rank_lists, output_signature=signature)

    return dataset


def _replace(registry, name: str) -> None:
    if name in registry.names():
        registry.remove(name)
