"""SeqIO feature converters: task features -> the Batch contract."""

from __future__ import annotations

from collections.abc import Mapping

import seqio
import tensorflow as tf

from dgr_jax.data.rank_lists import VIEW_FEATURES

_Spec = seqio.FeatureConverter.FeatureSpec


def _ranked(dtype: tf.DType, rank: int) -> _Spec:
    """A feature whose whole shape is checked.

    SeqIO compares tf.shape(value)[sequence_dim] with the length, and a single axis would never
    equal a tuple of lengths.
    """
    return _Spec(dtype, rank=rank, sequence_dim=slice(0, rank))


def _check_targets(lengths: Mapping[str, int]) -> None:
    for name, length in lengths.items():
        if min(length if isinstance(length, tuple) else (length,)) < 1:
            raise ValueError(f"length of feature {name!r}: got {length}, expected at least 1")


def _generation_features(inputs: tf.Tensor, targets: tf.Tensor) -> dict[str, tf.Tensor]:
    """inputs [Q] and targets [T], both padded by 0 -> the four generation features."""
    return {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": seqio.utils.make_autoregressive_inputs(targets),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": tf.cast(targets > 0, tf.float32),
    }


class GenerationConverter(seqio.FeatureConverter):
    """query and identifier -> an encoder-decoder example.

    Lengths {"inputs": 5, "targets": 4}; the example
      {"inputs": [7, 8, 1], "targets": [40, 41, 42]}
    becomes
      encoder_input_tokens  [7, 8, 1, 0, 0]
      decoder_input_tokens  [0, 40, 41, 42]
      decoder_target_tokens [40, 41, 42, 0]
      decoder_loss_weights  [1., 1., 1., 0.]
    """

    TASK_FEATURES = {"inputs": _Spec(tf.int32), "targets": _Spec(tf.int32)}
    MODEL_FEATURES = {
        "encoder_input_tokens": _Spec(tf.int32),
        "decoder_input_tokens": _Spec(tf.int32),
        "decoder_target_tokens": _Spec(tf.int32),
        "decoder_loss_weights": _Spec(tf.float32),
    }
    PACKING_FEATURE_DTYPES = {}

    def __init__(self) -> None:
        super().__init__(pack=False)

    def _convert_features(self, ds, task_feature_lengths):
        ds = seqio.utils.trim_and_pad_dataset(ds, task_feature_lengths)
        return ds.map(
            lambda e: _generation_features(e["inputs"], e["targets"]), tf.data.experimental.AUTOTUNE
        )

    def get_model_feature_lengths(self, task_feature_lengths):
        _check_targets(task_feature_lengths)
        lengths = {k: task_feature_lengths["targets"] for k in self.MODEL_FEATURES}
        return lengths | {"encoder_input_tokens": task_feature_lengths["inputs"]}


class PositivesConverter(seqio.FeatureConverter):
    """query and its positives -> the features from which a dual encoder's lists are drawn.

    Lengths {"inputs": 4, "positives": 3, "grades": 3, "query": 1}; the example
      {"inputs": [7, 8, 1], "positives": [5, 1], "grades": [2, 1], "query": [9]}
    becomes
      encoder_input_tokens [7, 8, 1, 0]
      positives            [4, 0, -1]     passage indices, -1 where there is none
      grades               [2, 1, 0]
      query                [8]            place of the query in the order in which they were written
    """

    TASK_FEATURES = dict.fromkeys(("inputs", "positives", "grades", "query"), _Spec(tf.int32))
    MODEL_FEATURES = dict.fromkeys(
        ("encoder_input_tokens", "positives", "grades", "query"), _Spec(tf.int32)
    )
    PACKING_FEATURE_DTYPES = {}

    def __init__(self) -> None:
        super().__init__(pack=False)

    def _convert_features(self, ds, task_feature_lengths):
        ds = seqio.utils.trim_and_pad_dataset(ds, task_feature_lengths)

        def convert(e):
            return {
                "encoder_input_tokens": e["inputs"],
                "positives": e["positives"] - 1,
                "grades": e["grades"],
                "query": e["query"] - 1,
            }

        return ds.map(convert, tf.data.experimental.AUTOTUNE)

    def get_model_feature_lengths(self, task_feature_lengths):
        lengths = dict(task_feature_lengths)
        return {"encoder_input_tokens": lengths.pop("inputs"), **lengths}


class PassageConverter(seqio.FeatureConverter):
    """a passage's text -> passage_tokens: {"inputs": [7, 1]} becomes [7, 1, 0] of length 3."""

    TASK_FEATURES = {"inputs": _Spec(tf.int32)}
    MODEL_FEATURES = {"passage_tokens": _Spec(tf.int32)}
    PACKING_FEATURE_DTYPES = {}

    def __init__(self) -> None:
        super().__init__(pack=False)

    def _convert_features(self, ds, task_feature_lengths):
        ds = seqio.utils.trim_and_pad_dataset(ds, task_feature_lengths)
        return ds.map(lambda e: {"passage_tokens": e["inputs"]}, tf.data.experimental.AUTOTUNE)

    def get_model_feature_lengths(self, task_feature_lengths):
        return {"passage_tokens": task_feature_lengths["inputs"]}


class RankListConverter(seqio.FeatureConverter):
    """query and a teacher's rank list -> a distillation example.

    Lengths {"inputs": Q, "targets": T, "identifiers": (L, K, T), "identifier_weights": (L, K),
    "teacher_scores": (L,)}. They are tuples because SeqIO checks only the first axis otherwise.
    With Q 3, T 2, L 2, K 1, the example
      {"inputs": [7, 1], "targets": [40, 41], "identifiers": [[[40, 41]]],
       "identifier_weights": [[1.]], "teacher_scores": [2.5]}
    becomes the four generation features of `targets` (the best positive) and
      identifier_tokens  [[[40, 41]], [[0, 0]]]
      identifier_weights [[1.], [0.]]
      teacher_scores     [2.5, 0.]
      passage_mask       [True, False]
    """

    TASK_FEATURES = {
        "inputs": _Spec(tf.int32),
        "targets": _Spec(tf.int32),
        "identifiers": _ranked(tf.int32, 3),
        "identifier_weights": _ranked(tf.float32, 2),
        "teacher_scores": _Spec(tf.float32),
    }
    MODEL_FEATURES = GenerationConverter.MODEL_FEATURES | {
        "identifier_tokens": _ranked(tf.int32, 3),
        "identifier_weights": _ranked(tf.float32, 2),
        "teacher_scores": _Spec(tf.float32),
        "passage_mask": _Spec(tf.bool),
    }
    PACKING_FEATURE_DTYPES = {}

    def __init__(self) -> None:
        super().__init__(pack=False)

    def _convert_features(self, ds, task_feature_lengths):
        ds = seqio.utils.trim_and_pad_dataset(ds, task_feature_lengths)
        return ds.map(self._convert, tf.data.experimental.AUTOTUNE)

    def _convert(self, e):
        """One example, padded."""
        identifiers = e["identifiers"]
        return _generation_features(e["inputs"], e["targets"]) | {
            "identifier_tokens": identifiers,
            "identifier_weights": e["identifier_weights"],
            "teacher_scores": e["teacher_scores"],
            "passage_mask": tf.reduce_any(identifiers > 0, axis=[1, 2]),
        }

    def get_model_feature_lengths(self, task_feature_lengths):
        _check_targets(task_feature_lengths)
        for name, rank in (("identifiers", 3), ("identifier_weights", 2)):
            length = task_feature_lengths[name]
            if not isinstance(length, tuple) or len(length) != rank:
                raise ValueError(
                    f"length of feature {name!r}: got {length}, expected a tuple of {rank} lengths"
                )
        lengths = {
            k: task_feature_lengths["targets"] for k in GenerationConverter.MODEL_FEATURES
        } | {"encoder_input_tokens": task_feature_lengths["inputs"]}
        scores = task_feature_lengths["teacher_scores"]
        return lengths | {
            "identifier_tokens": task_feature_lengths["identifiers"],
            "identifier_weights": task_feature_lengths["identifier_weights"],
            "teacher_scores": scores,
            "passage_mask": scores,
        }


class ViewListConverter(RankListConverter):
    """query and a teacher's rank list of identifiers of several views -> a distillation example.

    As RankListConverter, but with the length "inputs": (3, Q) and with further features that stay
    as they are (see `rank_lists.view_features`): "identifier_views" and "identifier_counts":
    (L, K), "spans" and "span_starts": (L, E), "corpus_tokens": (1,).
    encoder_input_tokens is int32 [3, Q], the query with the marker of each view.
    """

    TASK_FEATURES = RankListConverter.TASK_FEATURES | {
        "inputs": _ranked(tf.int32, 2),
        **{name: _ranked(tf.int32, 2) for name in VIEW_FEATURES},
        "corpus_tokens": _Spec(tf.float32),
    }
    MODEL_FEATURES = RankListConverter.MODEL_FEATURES | {
        "encoder_input_tokens": _ranked(tf.int32, 2),
        **{name: _ranked(tf.int32, 2) for name in VIEW_FEATURES},
        "corpus_tokens": _Spec(tf.float32),
    }

    def _convert(self, e):
        passed = (*VIEW_FEATURES, "corpus_tokens")
        return super()._convert(e) | {name: e[name] for name in passed}

    def get_model_feature_lengths(self, task_feature_lengths):
        lengths = super().get_model_feature_lengths(task_feature_lengths)
        passed = (*VIEW_FEATURES, "corpus_tokens")
        return lengths | {name: task_feature_lengths[name] for name in passed}


class TaskConverter(seqio.FeatureConverter):
    """Converts rank lists or generation examples, whichever a task holds.

    It is for programs that have one converter for all tasks of a model; its arguments are those
    that t5x gives. Raises ValueError for pack=True, as no two examples may share a row.
    """

    TASK_FEATURES = GenerationConverter.TASK_FEATURES
    MODEL_FEATURES = GenerationConverter.MODEL_FEATURES
    PACKING_FEATURE_DTYPES = {}

    def __init__(self, pack: bool = False, use_custom_packing_ops: bool = False) -> None:
        if pack or use_custom_packing_ops:
            raise ValueError(
                "DatasetConfig.pack: got True, expected False: an example is one query and its "
                "identifiers"
            )
        super().__init__(pack=False)

    def __call__(self, ds, task_feature_lengths):
        return self._of(ds.element_spec)(ds, task_feature_lengths)

    def _convert_features(self, ds, task_feature_lengths):
        return self._of(ds.element_spec)._convert_features(ds, task_feature_lengths)

    def get_model_feature_lengths(self, task_feature_lengths):
        return self._of(task_feature_lengths).get_model_feature_lengths(task_feature_lengths)

    def _of(self, features: Mapping[str, object]) -> seqio.FeatureConverter:
        return RankListConverter() if "identifiers" in features else GenerationConverter()
