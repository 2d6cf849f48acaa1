"""The student as a model of t5x (Roberts et al. 2022), for `python -m t5x.train`; see docs/t5x.md.

t5x has the loop, the mesh, the optimizer and the checkpoints; this module adds the student, the
objectives, and a decoder that writes only existing identifiers. Parameters have t5x's names, so
that either side can read the checkpoints of the other: `dgr_jax.models.pretrained` reads t5x's, and
`initial_checkpoint` makes one from published weights for a collection's vocabulary.

Axis letters: B queries, Q query length, M beams, T target length.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.core
import flax.traverse_util
import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics
from flax import linen as nn
from flax.linen import partitioning as flax_partitioning

from dgr_jax import partitioning
from dgr_jax.data.task_files import task_file
from dgr_jax.decoding import trie
from dgr_jax.experiments.common import with_vocabulary
from dgr_jax.losses import generation
from dgr_jax.model_dir.records import read_record
from dgr_jax.models import pretrained
from dgr_jax.models.initial import Pretrained
from dgr_jax.models.t5 import T5Config, Transformer
from dgr_jax.retrieval import search_programs
from dgr_jax.stages.prepared import Prepared
from dgr_jax.training import arrays
from dgr_jax.training.objectives import Distillation, Generation

try:
    from t5x import metrics as t5x_metrics
    from t5x import models as t5x_models
except ImportError as error:
    raise ImportError(
        "dgr_jax.t5x_adapter needs t5x, which is installed from its repository: "
        f"pip install git+https://github.com/google-research/t5x ({error})"
    ) from error

from dgr_jax.data import tasks
from dgr_jax.data.feature_converters import TaskConverter

Batch = Mapping[str, jax.Array]


class PreparedCollection:
    """A MODEL_DIR whose prepare stage is done; its SeqIO tasks are registered when it is opened.

    The tasks are those of its file in tasks/ (`squad_generation` and its parts), `squad_rank_lists`
    where the teach stage is done as well, and one for each test split, such as `squad_test`. The
    metrics of the queries of a test split are Success@k, RR@10 and the share of legal identifiers.
    """

    def __init__(self, model_dir: str | Path) -> None:
        self.folder = Path(model_dir)
        settings = read_record(self.folder / "prepare").get("settings", {}).get("prepare")
        if settings is None:
            raise FileNotFoundError(
                f"PREPARED: no prepared collection in {self.folder}; make one with "
                "python -m dgr_jax.prepare --model_dir=DIR"
            )
        self.settings: dict[str, Any] = settings
        self.collection = Prepared.load(self.folder)
        try:
            self.table = self.collection.table
        except ValueError as error:
            raise ValueError(f"PREPARED: {error}") from error
        self.index = trie.load(self.collection.folder / "trie")
        self._register()

    def _register(self) -> None:
        prepared, settings = self.collection, self.settings
        name = settings["tasks"]
        rates = {part: settings["sources"][part] for part in self._parts()}
        task_file(name).register(
            tasks.PreparedExamples(prepared.folder / "tfds", prepared.vocabulary, rates)
        )
        if (lists := self._rank_lists()) is not None:
            tasks.register_token_lists(name, prepared.vocabulary, lists)
        for split in settings["test_splits"]:
            tasks.register_questions(
                f"{name}_{split}",
                prepared.vocabulary,
                list(self._questions(split)),
                known=lambda tokens: self.table.lookup(tokens) >= 0,
            )

    def _parts(self) -> list[str]:
        return sorted(path.name for path in (self.collection.folder / "arrays").iterdir())

    def _rank_lists(self) -> Mapping[str, Any] | None:
        folder = self.folder / "teach"
        done = read_record(folder).get("status") == "done"
        return arrays.read_arrays(folder / "rank_lists") if done else None

    def _questions(self, split: str) -> Any:
        """(text, identifiers of its positives int32 [n, T], best first) of each judged query."""
        table, store = self.table, self.collection.store
        rows, qrels = table.rows_of_passages(), self.collection.qrels(split)
        for qid, query in self.collection.queries(split).items():
            judged = sorted(qrels.get(qid, {}).items(), key=lambda item: -item[1])
            good = [pid for pid, grade in judged if grade >= self.settings["min_relevance"]]
            positives = [row for pid in good if (row := rows[store.index_of(pid)]) >= 0]
            if positives:
                yield query.text, table.tokens[positives]

    def lengths(self, *, rank_lists: bool = False) -> dict[str, int | tuple[int, ...]]:
        """Task feature lengths of the generation tasks, or of the rank lists."""
        target = self.table.tokens.shape[1]
        lengths = {"inputs": self.settings["query_length"], "targets": target}
        if not rank_lists:
            return lengths
        if (lists := self._rank_lists()) is None:
            raise FileNotFoundError(
                f"PREPARED: no rank lists in {self.folder}; make them with python -m dgr_jax.teach"
            )
        names = {"identifiers": "identifier_tokens", "identifier_weights": "identifier_weights"}
        names["teacher_scores"] = "teacher_scores"
        return lengths | {feature: lists[name].shape[1:] for feature, name in names.items()}


@functools.lru_cache(maxsize=4)
def _opened(model_dir: Path) -> PreparedCollection:
    return PreparedCollection(model_dir)


def collection(model_dir: str) -> PreparedCollection:
    """The collection in a MODEL_DIR, opened once, for gin files to refer to."""
    return _opened(Path(model_dir).resolve())


def task_feature_lengths(
    prepared: PreparedCollection, rank_lists: bool = False
) -> dict[str, int | tuple[int, ...]]:
    """TASK_FEATURE_LENGTHS of gin files."""
    return prepared.lengths(rank_lists=rank_lists)


def variables(model: Transformer, rng: jax.Array) -> flax.core.FrozenDict:
    """New parameters in t5x's form: arrays, and their logical axes in `params_axes`."""
    boxed = partitioning.boxed_params(model, rng)
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    named = flax.traverse_util.flatten_dict(
        jax.tree.map(lambda box: flax_partitioning.AxisMetadata(box.names), boxed, is_leaf=is_box),
        is_leaf=lambda _, leaf: isinstance(leaf, flax_partitioning.AxisMetadata),
    )
    axes = {(*path[:-1], f"{path[-1]}_axes"): names for path, names in named.items()}
    return flax.core.freeze(
        {"params": nn.unbox(boxed), "params_axes": flax.traverse_util.unflatten_dict(axes)}
    )


class Student(t5x_models.BaseTransformerModel):
    """The student, its objective, and search over the identifiers of a collection.

    config: the student's sizes; vocab_size 0 takes that of the collection.
    objective: Generation or Distillation; with rank lists, the generation target is the best
      positive of each list.
    num_decodes: number M of beams, and of answers to a query. return_all_decodes: True returns all
      of them, False the best alone.
    renormalise: see Search.
    loss_normalizing_factor: divides the objective's sum; None takes its weight in the batch, so
      that the loss is a mean. t5x adds up the gradients of microbatches, so n of them make the
      gradient n times larger; Adafactor's steps do not depend on that.
    """

    FEATURE_CONVERTER_CLS = TaskConverter

    def __init__(
        self,
        prepared: PreparedCollection,
        config: T5Config,
        optimizer_def: Any,
        objective: Generation | Distillation = Generation(),
        num_decodes: int = 10,
        return_all_decodes: bool = False,
        renormalise: bool = False,
        loss_normalizing_factor: float | None = None,
    ) -> None:
        if objective.plan is not None and objective.plan.members:
            raise ValueError(
                f"Student.objective: got {type(objective).__name__}.plan="
                f"{type(objective.plan).__name__}, expected None: SeqIO tasks bring along no sets "
                "of passages; train with python -m dgr_jax.train, Experiment.plan=@Learned()"
            )
        self.config = with_vocabulary(config, prepared.collection.vocabulary.size)
        inputs, targets = tasks.vocabularies(prepared.collection.vocabulary)
        self._objective = objective
        self._num_decodes, self._return_all = num_decodes, return_all_decodes
        self._constraint = prepared.index.constraint(renormalise=renormalise)
        super().__init__(
            module=Transformer(self.config),
            input_vocabulary=inputs,
            output_vocabulary=targets,
            optimizer_def=optimizer_def,
            decode_fn=self._search,
            loss_normalizing_factor=loss_normalizing_factor,
        )

    def get_initial_variables(
        self,
        rng: jax.Array,
        input_shapes: Mapping[str, Any],
        input_types: Mapping[str, Any] | None = None,
    ) -> flax.core.FrozenDict:
        """{"params", "params_axes"}; the shapes of the inputs do not matter."""
        return variables(self.module, rng)

    def loss_fn(
        self, params: Any, batch: Batch, dropout_rng: jax.Array | None
    ) -> tuple[jax.Array, dict[str, Any]]:
        """The objective on generation examples or rank lists, without dropout if dropout_rng is
        None."""
        lists = "identifier_tokens" in batch
        if lists != isinstance(self._objective, Distillation):
            raise ValueError(
                f"MIXTURE_OR_TASK_NAME: got {'rank lists' if lists else 'no rank lists'} for "
                f"Student.objective {type(self._objective).__name__}; expected rank lists for "
                "Distillation and generation examples for Generation"
            )
        model, rng = self.module, dropout_rng
        if rng is None:
            model, rng = _without_dropout(self.config), jax.random.PRNGKey(0)
        loss_fn = self._objective.loss_fn(model)
        loss_sum, weight_sum, parts = loss_fn(params, {"rank_list": batch} if lists else batch, rng)
        loss = loss_sum / (self._loss_normalizing_factor or jnp.maximum(weight_sum, 1.0))
        return loss, _metrics(parts | {"loss": (loss_sum, weight_sum)}, batch)

    def _compute_logits(
        self, params: Any, batch: Batch, dropout_rng: jax.Array | None = None
    ) -> jax.Array:
        """f32 [B, T, V] of the generation targets."""
        return self.module.apply(
            {"params": params},
            batch["encoder_input_tokens"],
            batch["decoder_input_tokens"],
            deterministic=dropout_rng is None,
            rngs={} if dropout_rng is None else {"dropout": dropout_rng},
        )

    def predict_batch_with_aux(
        self,
        params: Any,
        batch: Batch,
        rng: jax.Array | None = None,
        decoder_params: Mapping[str, Any] | None = None,
        return_all_decodes: bool | None = None,
        num_decodes: int | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The most likely identifiers: int32 [B, M, T] with {"scores": f32 [B, M]}; or the best
        alone, [B, T] and [B].

        As in t5x, the best comes last; where fewer identifiers exist, tokens are 0 and scores -inf.
        rng, decoder_params: not used, as search draws nothing and has no parameters.
        """
        every = self._return_all if return_all_decodes is None else return_all_decodes
        result = self._decode_fn(
            params, batch["encoder_input_tokens"], num_decodes or self._num_decodes
        )
        decodes, scores = result.tokens[:, ::-1], result.log_probs[:, ::-1]
        if every:
            return decodes, {"scores": scores}
        return decodes[:, -1], {"scores": scores[:, -1]}

    def _search(self, params: Any, encoder_input_tokens: jax.Array, num_decodes: int) -> Any:
        """int32 [B, Q] -> BeamResult, best first."""
        decode = search_programs.decode_fn(self.config, num_decodes, self._constraint.max_length)
        return decode(params, self._constraint, encoder_input_tokens)

    def score_batch(
        self, params: Any, batch: Batch, return_intermediates: bool = False
    ) -> jax.Array | tuple[jax.Array, dict[str, Any]]:
        """The log-probability of each target, f32 [B]."""
        logits = self._compute_logits(params, batch)
        tokens = generation.token_log_probs(logits, batch["decoder_target_tokens"])
        tokens = tokens * batch["decoder_loss_weights"]
        scores = jnp.sum(tokens, axis=-1)
        if return_intermediates:
            return scores, {"decoder": {"token_scores": (tokens,)}}
        return scores


def _without_dropout(config: T5Config) -> Transformer:
    return Transformer(dataclasses.replace(config, dropout_rate=0.0))


def _metrics(pairs: Mapping[str, Any], batch: Batch) -> dict[str, Any]:
    """(sum, weight) pairs as t5x's metrics, and its speeds."""
    queries = jnp.float32(batch["encoder_input_tokens"].shape[0])
    means = {name: clu_metrics.Average(total=s, count=w) for name, (s, w) in pairs.items()}
    return means | {
        "timing/seqs_per_second": t5x_metrics.TimeRate.from_model_output(numerator=queries),
        "timing/steps_per_second": t5x_metrics.StepsPerTime.from_model_output(),
    }


def initial_checkpoint(
    prepared: str, source: str, target: str, *, config: T5Config, seed: int = 0
) -> str:
    """Writes INITIAL_CHECKPOINT_PATH: published weights with rows for a collection's docid codes.

    It is needed because t5x restores only arrays with the shapes of the model.
    prepared: MODEL_DIR of the collection. source: a t5x checkpoint, also in a bucket, or a Hugging
    Face folder or id. target: the folder in which checkpoint_0 is written. config: the student's
    sizes.

    Returns target/checkpoint_0. Raises ValueError for weights of another size.
    """
    vocabulary = collection(prepared).collection.vocabulary
    config = with_vocabulary(config, vocabulary.size)
    params = Pretrained(source, seed).params(
        config, pieces=vocabulary.pieces, text_tokens=vocabulary.first_view_id
    )
    pretrained.write_t5x(target, config, params)
    return str(Path(target) / "checkpoint_0")
