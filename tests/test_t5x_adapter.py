"""The student as a model of t5x. Where t5x is not installed, two classes take its place, and tests
of its own training loop are skipped."""

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clu import metrics as clu_metrics
from flax import linen as nn
from gin import config_parser

from dgr_jax import partitioning
from dgr_jax.decoding import beam_search
from dgr_jax.losses import ranking
from dgr_jax.models import pretrained
from dgr_jax.models.t5 import Transformer
from dgr_jax.training import arrays
from dgr_jax.training.objectives import Distillation, Generation
from dgr_jax.training.plan_losses import CodeLoss, SetLoss
from tests import students
from tests.conftest import with_seqio

pytestmark = with_seqio
ROOT = Path(__file__).resolve().parent.parent
INSTALLED = importlib.util.find_spec("t5x") is not None
CONFIG = dataclasses.replace(students.CONFIG, vocab_size=0, dropout_rate=0.2)
RNG = jax.random.PRNGKey(3)
RANKNET = Distillation(ranking.bind("ranknet"), generation_weight=0.5)


class _Model:
    """What t5x's BaseTransformerModel gives to a model: its settings, and two methods."""

    def __init__(self, **settings):
        for name, value in settings.items():
            setattr(self, name if name in ("module", "optimizer_def") else f"_{name}", value)

    input_vocabulary = property(lambda self: self._input_vocabulary)
    output_vocabulary = property(lambda self: self._output_vocabulary)

    def eval_fn(self, params, batch):
        return self.loss_fn(params=params, batch=batch, dropout_rng=None)

    def predict_batch(self, params, batch, rng=None):
        return self.predict_batch_with_aux(params=params, batch=batch, rng=rng)[0]


class _Speed:
    @staticmethod
    def from_model_output(numerator=1.0):
        return clu_metrics.Average(total=jnp.float32(numerator), count=jnp.float32(1))


def _stand_ins() -> dict[str, ModuleType]:
    t5x, models, metrics = (ModuleType(name) for name in ("t5x", "t5x.models", "t5x.metrics"))
    models.BaseTransformerModel = _Model
    metrics.TimeRate = metrics.StepsPerTime = _Speed
    t5x.models, t5x.metrics = models, metrics
    return {module.__name__: module for module in (t5x, models, metrics)}


@pytest.fixture(scope="module")
def adapter():
    with pytest.MonkeyPatch.context() as patch:
        for name, module in ({} if INSTALLED else _stand_ins()).items():
            patch.setitem(sys.modules, name, module)
        yield importlib.import_module("dgr_jax.t5x_adapter")
        del sys.modules["dgr_jax.t5x_adapter"]


@pytest.fixture(scope="module")
def prepared(adapter, tiny_model_dir):
    return adapter.collection(str(tiny_model_dir))


@pytest.fixture(scope="module")
def generating(adapter, prepared):
    return adapter.Student(prepared, CONFIG, None, num_decodes=4, return_all_decodes=True)


@pytest.fixture(scope="module")
def params(generating):
    return students.parameters(generating.config)


def batch_of(folder: Path, size: int) -> dict[str, np.ndarray]:
    return {name: np.asarray(rows[:size]) for name, rows in arrays.read_arrays(folder).items()}


@pytest.fixture(scope="module")
def batch(tiny_model_dir):
    return batch_of(tiny_model_dir / "prepare" / "arrays" / "labelled", 3)


def test_a_plan_that_needs_sets_is_refused(adapter, prepared):
    message = "Student.objective: got Generation.plan=SetLoss, expected None: SeqIO tasks bring"
    with pytest.raises(ValueError, match=message):
        adapter.Student(prepared, CONFIG, None, objective=Generation(plan=SetLoss(4)))
    adapter.Student(prepared, CONFIG, None, objective=Generation(plan=CodeLoss()))


def test_without_t5x_it_says_where_it_is_had(monkeypatch):
    monkeypatch.setitem(sys.modules, "t5x", None)
    monkeypatch.delitem(sys.modules, "dgr_jax.t5x_adapter", raising=False)
    with pytest.raises(ImportError) as error:
        importlib.import_module("dgr_jax.t5x_adapter")
    assert str(error.value).startswith(
        "dgr_jax.t5x_adapter needs t5x, which is installed from its repository: "
        "pip install git+https://github.com/google-research/t5x ("
    )


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def check_loss(student, objective, params, batch, given, rngs):
    """The student's loss is the objective's mean, and so its metrics; rng None: no dropout."""
    without = dataclasses.replace(student.config, dropout_rate=0.0)
    for rng in rngs:
        config = without if rng is None else student.config
        expected = jax.jit(objective.loss_fn(Transformer(config)))(params, given, RNG)
        loss, metrics = jax.jit(student.loss_fn)(params, batch, rng)
        close(loss, expected[0] / expected[1])
        close(metrics["loss"].compute(), loss)
        for name, (total, weight) in expected[2].items():
            close(metrics[name].compute(), total / weight)
        assert {"timing/seqs_per_second", "timing/steps_per_second"} <= set(metrics)


@pytest.mark.slow
def test_the_generation_loss_is_that_of_the_objective(generating, params, batch):
    check_loss(generating, Generation(), params, batch, batch, (RNG, None))


@pytest.mark.slow
def test_the_distillation_loss_is_that_of_the_objective(
    adapter, prepared, generating, params, tiny_model_dir
):
    student = adapter.Student(prepared, CONFIG, None, objective=RANKNET)
    lists = batch_of(tiny_model_dir / "teach" / "rank_lists", 3)
    check_loss(student, RANKNET, params, lists, {"rank_list": lists}, (RNG,))
    message = "^MIXTURE_OR_TASK_NAME: got rank lists for Student.objective Generation; expected"
    with pytest.raises(ValueError, match=message):
        generating.loss_fn(params, lists, RNG)


@pytest.mark.slow
def test_a_loss_normalizing_factor_takes_the_place_of_the_weight(
    adapter, prepared, generating, params, batch
):
    mean = jax.jit(generating.eval_fn)(params, batch)[0]
    student = adapter.Student(prepared, CONFIG, None, loss_normalizing_factor=24.0)
    fixed = jax.jit(student.eval_fn)(params, batch)[0]
    close(fixed * 24, mean * batch["decoder_loss_weights"].sum())


@pytest.mark.slow
def test_it_writes_what_the_constrained_search_finds_and_scores_it_alike(
    generating, prepared, params, batch
):
    decodes, aux = jax.jit(generating.predict_batch_with_aux)(params, batch)
    tokens = jnp.asarray(batch["encoder_input_tokens"])

    def search(params):
        apply = functools.partial(generating.module.apply, {"params": params})
        encoded = apply(tokens, method="encode")
        cross = apply(encoded, tokens, method="cross")
        return beam_search.beam_search(
            lambda last, cache, at: apply(last, cache, at, cross, tokens, method="step"),
            prepared.index.constraint(),
            apply(encoded, 4, decodes.shape[-1], method="init_cache"),
            batch_size=3,
            num_beams=4,
        )

    expected = jax.jit(search)(params)
    np.testing.assert_array_equal(decodes[:, ::-1], expected.tokens)
    np.testing.assert_allclose(aux["scores"][:, ::-1], expected.log_probs, rtol=1e-5)
    assert (prepared.collection.table.lookup(np.asarray(decodes)) >= 0).all()

    best, aux = generating.predict_batch_with_aux(params, batch, return_all_decodes=False)
    np.testing.assert_array_equal(best, expected.tokens[:, 0])
    answered = {
        **batch,
        "decoder_target_tokens": best,
        "decoder_input_tokens": np.pad(best[:, :-1], ((0, 0), (1, 0))),
        "decoder_loss_weights": np.ones(best.shape, np.float32),
    }
    score = jax.jit(functools.partial(generating.score_batch, return_intermediates=True))
    scores, more = score(params, answered)
    np.testing.assert_allclose(scores, aux["scores"], rtol=1e-4)
    np.testing.assert_allclose(more["decoder"]["token_scores"][0].sum(-1), scores, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
def test_every_parameter_has_its_logical_axes(adapter, generating, scan):
    model = Transformer(dataclasses.replace(generating.config, scan_layers=scan))
    found = jax.eval_shape(lambda: adapter.variables(model, RNG))
    boxed = jax.eval_shape(lambda: partitioning.boxed_params(model, RNG))
    is_box = lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    for path, box in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box):
        *parents, name = (key.key for key in path)
        arrays_, axes = found["params"], found["params_axes"]
        for parent in parents:
            arrays_, axes = arrays_[parent], axes[parent]
        assert arrays_[name].shape == box.value.shape
        assert axes[f"{name}_axes"].names == box.names
    same = generating.get_initial_variables(RNG, {"encoder_input_tokens": (3, 12)})
    assert set(same) == {"params", "params_axes"}


@pytest.mark.slow
def test_tasks_and_converter(adapter, prepared, tiny_model_dir):
    import seqio

    lengths = prepared.lengths(rank_lists=True)
    taught = arrays.read_arrays(tiny_model_dir / "teach" / "rank_lists")
    assert lengths["identifiers"] == taught["identifier_tokens"].shape[1:]
    converter = adapter.TaskConverter(pack=False, use_custom_packing_ops=False)

    def examples(task, split, lengths):
        task = seqio.get_mixture_or_task(task)
        ds = task.get_dataset(lengths, split=split, shuffle=False, num_epochs=1)
        return list(converter(ds, lengths).as_numpy_iterator())

    lists = examples("quickstart_rank_lists", "train", lengths)
    assert len(lists) == len(taught["teacher_scores"])
    for name, rows in taught.items():
        np.testing.assert_array_equal(np.stack([e[name] for e in lists]), rows)

    task = seqio.get_mixture_or_task("quickstart_test")
    queries = prepared.collection.queries("test")
    answered = examples("quickstart_test", "test", prepared.lengths())
    assert len(answered) == len(queries) == 240
    assert "identifier_tokens" not in answered[0]
    expected = prepared.collection.vocabulary.encode_inputs(
        [next(iter(queries.values())).text], lengths["inputs"]
    )
    np.testing.assert_array_equal(answered[0]["encoder_input_tokens"], expected[0])
    targets = np.stack([e["decoder_target_tokens"] for e in answered])
    assert (prepared.collection.table.lookup(targets) >= 0).all()
    assert adapter.tasks.vocabularies(prepared.collection.vocabulary) == (
        task.output_features["inputs"].vocabulary,
        task.output_features["targets"].vocabulary,
    )
    with pytest.raises(ValueError, match="^DatasetConfig.pack: got True, expected False: an exam"):
        adapter.TaskConverter(pack=True)


def test_answers_are_measured(adapter):
    known = lambda tokens: tokens[..., 0] > 4
    output = [[[9, 9], [7, 1], [5, 6]], [4, 4], [[0, 0], [8, 8]]]  # of t5x: the best stands last
    answers = [adapter.tasks._answers(rows, 2) for rows in output]
    targets = [np.array([[7, 1], [2, 2]]), np.array([[5, 5]]), np.array([[8, 8]])]
    assert adapter.tasks.answer_measures(targets, answers, known) == {
        "Success@1": 1 / 3,
        "Success@10": 2 / 3,
        "RR@10": 0.5,
        "legal": 4 / 5,
    }
    np.testing.assert_array_equal(adapter.tasks._answers([[6, 1]], 3), [[6, 1, 0]])


def test_published_weights_get_rows_for_the_codes(adapter, tiny_model_dir, prepared, tmp_path):
    small = dataclasses.replace(CONFIG, vocab_size=128, dropout_rate=0.1)
    published = students.parameters(small)
    pretrained.write_t5x(tmp_path / "published", small, published, step=9)
    written = adapter.initial_checkpoint(
        str(tiny_model_dir), str(tmp_path / "published"), str(tmp_path / "start"), config=CONFIG
    )
    assert written == str(tmp_path / "start" / "checkpoint_0")
    config, found = pretrained.read_t5x(written)
    assert config.vocab_size == prepared.collection.vocabulary.size
    table = found["token_embedder"]["embedding"]
    np.testing.assert_array_equal(table[:128], published["token_embedder"]["embedding"])


def test_what_is_no_prepared_collection_is_refused(adapter, prepared, tiny_model_dir, tmp_path):
    with pytest.raises(FileNotFoundError, match="^PREPARED: no prepared collection in .*; make on"):
        adapter.PreparedCollection(tmp_path)
    shutil.copytree(tiny_model_dir / "prepare", tmp_path / "prepare")
    with pytest.raises(FileNotFoundError, match="^PREPARED: no rank lists in .*dgr_jax.teach$"):
        adapter.PreparedCollection(tmp_path).lengths(rank_lists=True)
    several = dataclasses.replace(prepared.collection, vocabulary=SimpleNamespace(views=("title",)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapter.Prepared, "load", lambda _: several)
        with pytest.raises(ValueError, match="^PREPARED: .* has identifiers of several views; exp"):
            adapter.PreparedCollection(tmp_path)


class _Names(config_parser.ParserDelegate):
    """Values of gin files, taken as names."""

    def __init__(self):
        self.used = []

    def configurable_reference(self, scoped_configurable_name, evaluate):
        self.used.append(scoped_configurable_name)
        return scoped_configurable_name

    def macro(self, macro_name):
        return macro_name


@pytest.mark.parametrize(
    "file", sorted((ROOT / "gin_configs" / "t5x").glob("*.gin")), ids=lambda path: path.name
)
def test_gin_files_name_what_there_is(adapter, file):
    """Every component and setting; those of t5x only where it is installed."""
    names = _Names()
    modules, settings, included = {"t5x_adapter": adapter}, [], []
    for statement in config_parser.ConfigParser(file.read_text(), names):
        if isinstance(statement, config_parser.ImportStatement):
            ours = statement.module.startswith("dgr_jax")
            if statement.module.startswith(("__gin__", "__main__")) or not (ours or INSTALLED):
                continue
            modules[statement.bound_name()] = importlib.import_module(statement.module)
        elif isinstance(statement, config_parser.IncludeStatement):
            included.append(statement.filename)
        elif isinstance(statement, config_parser.BindingStatement) and statement.arg_name:
            settings.append((statement.selector, statement.arg_name))
    checked = 0
    for name, setting in [*settings, *((name, None) for name in names.used)]:
        module, _, component = name.rpartition("/")[2].partition(".")
        if module in modules:
            found = getattr(modules[module], component)
            parameters = inspect.signature(found).parameters
            free = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
            assert setting is None or setting in parameters or free, (name, setting)
            checked += 1
    assert checked or included
    for path in included:
        assert (file.parent.parent / path).is_file() or path.startswith("t5x/configs/runs/")


@pytest.fixture(scope="module")
def t5x(command):
    """t5x(module, model_dir, *bindings): `python -m t5x.module` with a gin file of ours."""
    pytest.importorskip(
        "t5x.train",
        reason="t5x is not installed: pip install git+https://github.com/google-research/t5x",
    )

    def run(module, file, **bindings):
        values = {
            "T5Config.emb_dim": 16,
            "T5Config.num_heads": 2,
            "T5Config.head_dim": 8,
            "T5Config.mlp_dim": 32,
            "T5Config.num_encoder_layers": 1,
            "T5Config.num_decoder_layers": 1,
            "NUM_BEAMS": 4,
            **bindings,
        }
        return command(
            f"t5x.{module}",
            f"--gin_search_paths={ROOT / 'gin_configs'}",
            f"--gin_file=t5x/{file}.gin",
            *(f"--gin.{name}={value!r}" for name, value in values.items()),
        )

    return run


@pytest.mark.slow
def test_t5x_trains_distills_and_answers_with_identifiers_alone(
    t5x, prepared, tiny_model_dir, tmp_path
):
    known = prepared.collection.table.lookup
    where = {"PREPARED": str(tiny_model_dir)}
    trained, taught, found = (str(tmp_path / name) for name in ("train", "distill", "found"))
    t5x(
        "train", "generate", **where, MODEL_DIR=trained, TRAIN_STEPS=4, BATCH_SIZE=8,
        MIXTURE_OR_TASK_NAME="quickstart_generation", EVAL_TASK_NAME="quickstart_test",
        EVAL_PERIOD=4, CHECKPOINT_PERIOD=4, RANDOM_SEED=0,
    )  # fmt: skip
    measured = Path(trained) / "inference_eval" / "quickstart_test-metrics.jsonl"
    assert json.loads(measured.read_text().splitlines()[-1])["legal"] == 1.0

    first = f"{trained}/checkpoint_4"
    config, before = pretrained.read_t5x(first)
    assert config.vocab_size == prepared.collection.vocabulary.size
    t5x(
        "train", "distill", **where, MODEL_DIR=taught, TRAIN_STEPS=6, BATCH_SIZE=4,
        MIXTURE_OR_TASK_NAME="quickstart_rank_lists", INITIAL_CHECKPOINT_PATH=first,
        EVAL_PERIOD=2, CHECKPOINT_PERIOD=2, RANDOM_SEED=0,
    )  # fmt: skip
    after = pretrained.read_t5x(f"{taught}/checkpoint_6")[1]
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), before, after)
    assert all(0 < move < 0.5 for move in jax.tree.leaves(moved))

    t5x(
        "infer", "infer", **where, CHECKPOINT_PATH=f"{taught}/checkpoint_6",
        INFER_OUTPUT_DIR=found, MIXTURE_OR_TASK_NAME="quickstart_test",
    )  # fmt: skip
    lines = (Path(found) / "quickstart_test-predict_with_aux.jsonl-00000-of-00001").read_text()
    answers = [json.loads(line) for line in lines.splitlines()]
    assert len(answers) == 240
    written = np.array([answer["prediction"] for answer in answers])
    assert written.shape[:2] == (240, 4) and (known(written) >= 0).all()
    scores = np.array([answer["aux"]["scores"] for answer in answers])
    assert (np.diff(scores) >= 0).all() and (scores < 0).all()
