"""Settings as JSON, their fingerprints, and which stages a setting belongs to."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import pytest

from dgr_jax.capacity import programs
from dgr_jax.capacity.sizes import estimated_sizes
from dgr_jax.config import configurables
from dgr_jax.corpora.beir import BeirCollection
from dgr_jax.corpora.quickstart import QuickstartCollection
from dgr_jax.data.examples import Sources
from dgr_jax.data.vocabulary import SentencePiece
from dgr_jax.experiments.common import Evaluate, Teach, Training
from dgr_jax.experiments.generative import Candidates, Experiment, Prepare
from dgr_jax.identifiers.atomic import Atomic
from dgr_jax.identifiers.multiview import Multiview
from dgr_jax.identifiers.rq import ResidualQuantization
from dgr_jax.identifiers.scheme import CorpusSize
from dgr_jax.identifiers.semantic import KMeansTree
from dgr_jax.identifiers.string import NaiveString
from dgr_jax.identifiers.title import Title
from dgr_jax.losses.ranking import distilled_ranknet, listnet
from dgr_jax.models.t5 import T5Config
from dgr_jax.partitioning import Mesh, make_mesh
from dgr_jax.retrieval.bm25 import WORDS, Bm25
from dgr_jax.retrieval.generative import Search
from dgr_jax.retrieval.multiview.search import MultiviewSearch
from dgr_jax.retrieval.simultaneous import Lexical
from dgr_jax.retrieval.student_plans import Learned, OnePass
from dgr_jax.settings import describe, fingerprint, paths
from dgr_jax.stages.pipeline import stage_settings
from dgr_jax.teaching.list_recipes import TopM
from dgr_jax.teaching.teachers import Bm25Teacher, FusionTeacher, RunTeacher, VectorTeacher
from dgr_jax.training.objectives import Distillation, Generation
from dgr_jax.training.optimizers import Adafactor, Constant
from dgr_jax.training.plan_losses import CodeLoss, SetLoss

BASE = Experiment(
    model_dir="model",
    collection=QuickstartCollection(),
    prepare=Prepare(tasks="quickstart", identifiers=Atomic()),
    model=T5Config(),
    generate=Training(Generation(), Adafactor(), steps=10),
    candidates=Candidates(Search()),
    teach=Teach(Bm25Teacher(), TopM()),
    distill=Training(Distillation(functools.partial(listnet)), Adafactor(), steps=5),
    evaluate=Evaluate(Search()),
)
STAGES = tuple(BASE.stages)
ALL = set(STAGES)
LATER = ALL - {"prepare"}
AFTER_GENERATE = LATER - {"generate"}


def changed(path: str, value):
    """BASE with one setting, such as 'prepare.sources.labelled', replaced."""

    def replace(owner, names):
        first, *rest = names
        inner = replace(getattr(owner, first), rest) if rest else value
        return dataclasses.replace(owner, **{first: inner})

    return replace(BASE, path.split("."))


def marks(experiment: Experiment, files=None) -> dict[str, str]:
    stages = experiment.stages
    return {stage: fingerprint(stage_settings(experiment, stage, files)) for stage in stages}


@pytest.mark.parametrize(
    ("path", "value", "stages"),
    [
        ("collection", BeirCollection("data"), ALL),
        ("prepare.seed", 1, ALL),
        ("prepare.test_splits", ("dev",), ALL),
        ("prepare.identifiers", ResidualQuantization(), ALL),
        ("prepare.sources.labelled", 2.0, ALL),
        ("prepare.vocabulary", SentencePiece(size=9), ALL),
        ("model.emb_dim", 9, LATER),
        ("generate.steps", 11, LATER),
        ("generate.optimizer.learning_rate", Constant(0.5), LATER),
        ("generate.objective.label_smoothing", 0.1, LATER),
        ("candidates.search.num_beams", 9, {"candidates", "teach", "distill", "evaluate"}),
        ("candidates.max_queries", 9, {"candidates", "teach", "distill", "evaluate"}),
        ("teach.teacher.bm25.k1", 2.0, {"teach", "distill", "evaluate"}),
        ("teach.teacher.bm25.stemmer", "", {"teach", "distill", "evaluate"}),
        ("teach.lists.size", 9, {"teach", "distill", "evaluate"}),
        ("distill.steps", 9, {"distill", "control", "evaluate"}),
        ("distill.seed", 9, {"distill", "control", "evaluate"}),
        ("distill.objective.loss", distilled_ranknet, {"distill", "evaluate"}),
        ("distill.list_batch_size", 9, {"distill", "evaluate"}),
        ("evaluate.measures", ("RR@10",), {"evaluate"}),
        ("evaluate.search.num_beams", 9, {"evaluate"}),
        ("control", False, {"control", "evaluate"}),
        ("evaluate.bm25", False, {"evaluate"}),
        ("evaluate.baseline", WORDS, {"evaluate"}),
        ("evaluate.baseline.language", "german", {"evaluate"}),
        ("plan", Lexical(), {"evaluate"}),
        ("model.emb_dim", 8, LATER),
        ("model_dir", "elsewhere", set()),
        ("mesh", Mesh(model=2), set()),
        ("generate.log_every", 1, set()),
        ("generate.checkpoint_every", 1, set()),
        ("distill.keep_checkpoints", 1, set()),
    ],
)
def test_a_setting_belongs_to_the_stages_that_depend_on_it(path, value, stages):
    before, after = marks(BASE), marks(changed(path, value))
    assert {stage for stage in STAGES if before[stage] != after.get(stage)} == stages


PLAIN = dataclasses.replace(BASE, prepare=dataclasses.replace(BASE.prepare, query_length=16))


def with_plan(plan, base=PLAIN):
    return dataclasses.replace(base, plan=plan)


def test_a_plan_of_the_student_s_own_changes_what_is_trained():
    learned = with_plan(Learned(loss_weight=0.5, set_size=9))
    assert learned.model.decoder_query_tokens == 16
    assert learned.generate.objective.plan == learned.distill.objective.plan == SetLoss(9, 0.5)
    assert with_plan(Learned(flops=0.01)).distill.objective.plan == SetLoss(64, flops=0.01)
    assert Learned(flops=0.01).once_trained() == Learned()
    assert with_plan(Learned(query_tokens=4)).model.decoder_query_tokens == 4
    one_pass = with_plan(OnePass(loss=listnet))
    assert one_pass.model == PLAIN.model
    assert one_pass.distill.objective.plan == CodeLoss(1.0, listnet)
    assert with_plan(Lexical()).generate == PLAIN.generate
    assert with_plan(None, learned).generate == PLAIN.generate
    changed_stages = {s for s in STAGES if marks(learned)[s] != marks(PLAIN)[s]}
    assert changed_stages == LATER - {"start"}
    (system,) = one_pass.added
    assert (system.name, system.plan) == ("planned", OnePass())
    assert json.dumps(dataclasses.asdict(system))


@pytest.mark.parametrize(
    "settings",
    [dict(planned=50), dict(weight=2.0), dict(ranked_by="plan"), dict(num_beams=3)],
)
def test_a_search_with_a_plan_trains_nothing_again(settings):
    before, after = marks(with_plan(Learned())), marks(with_plan(Learned(**settings)))
    assert {stage for stage in STAGES if before[stage] != after[stage]} == {"evaluate"}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Learned(query_tokens=17), "Learned.query_tokens: got 17, expected at most 16, Prepare"),
        (Learned(set_size=9000), "Learned.set_size: got 9000, expected at most 8,000, the pieces"),
    ],
)
def test_plans_that_do_not_fit_are_refused(plan, message):
    with pytest.raises(ValueError, match=message):
        with_plan(plan)
    own = dataclasses.replace(PLAIN.generate, objective=object())
    with pytest.raises(ValueError, match="generate/Training.objective: got object with Experiment"):
        with_plan(OnePass(), dataclasses.replace(PLAIN, generate=own))
    model = dataclasses.replace(PLAIN.model, prefix_adaptive_layers=1)
    identifiers = dataclasses.replace(PLAIN.prepare, identifiers=ResidualQuantization())
    adaptive = dataclasses.replace(PLAIN, model=model, prepare=identifiers)
    with pytest.raises(ValueError, match="T5Config.decoder_query_tokens: got 16 with T5Config.pre"):
        with_plan(Learned(), adaptive)
    grouped = dataclasses.replace(PLAIN.generate, examples_per_query=2)
    with pytest.raises(ValueError, match="generate/Training.examples_per_query: got 2, expected 1"):
        dataclasses.replace(PLAIN, generate=grouped)
    packed = dataclasses.replace(PLAIN.distill.objective, pack_docids=True)
    with pytest.raises(ValueError, match="Distillation.pack_docids: got True with T5Config.prefix"):
        dataclasses.replace(adaptive, distill=dataclasses.replace(PLAIN.distill, objective=packed))


def test_batches_of_a_plan_in_shape():
    sizes = estimated_sizes(with_plan(Learned(set_size=9)), CorpusSize(100, 50.0, 20, 0.0))
    shapes = lambda name, plan: {  # noqa: E731
        part: batch.shape
        for part, batch in jax.tree.leaves_with_path(
            programs.abstract_batch(name, with_plan(plan), sizes, make_mesh())
        )
        if "members" in str(part[-1])
    }
    assert list(shapes("generate", Learned(set_size=9)).values()) == [(64, 9)]
    of_lists = shapes("distill", Learned(set_size=9)).values()
    assert sorted(of_lists) == [(16, 5, 9), (16, 9), (64, 9)]
    assert not shapes("distill", OnePass())


def test_generation_examples_of_the_lists_themselves():
    """With none of the mixture, the control has as many examples as there are lists."""
    shared = changed("distill.batch_size", 0)
    assert (shared.distill.examples, BASE.distill.examples) == (16, 64)
    assert shared.compared("distill")["examples"] == 10 * 64 + 5 * 16
    assert shared.compared("control") == shared.compared("distill")
    more = dataclasses.replace(shared.distill, list_batch_size=9)
    before, after = marks(shared), marks(dataclasses.replace(shared, distill=more))
    differ = {stage for stage in STAGES if before[stage] != after[stage]}
    assert differ == {"distill", "control", "evaluate"}
    with pytest.raises(
        ValueError, match=r"generate/Training.batch_size: got 0, expected at least 1"
    ):
        changed("generate.batch_size", 0)
    several = {"prepare": dataclasses.replace(shared.prepare, identifiers=Multiview())}
    several["candidates"] = Candidates(MultiviewSearch())
    several["evaluate"] = Evaluate(MultiviewSearch())
    with pytest.raises(
        ValueError, match=r"distill/Training.batch_size: got 0, expected at least 1;"
    ):
        dataclasses.replace(shared, **several)


def test_without_a_plan_evaluation_is_what_it_was():
    assert "plan" not in stage_settings(BASE, "evaluate")
    assert BASE.measured == ("bm25", *BASE.systems)
    assert changed("plan", Lexical()).measured == (*BASE.measured, "planned")


OF_VIEWS = dict(
    prepare=dataclasses.replace(BASE.prepare, identifiers=Multiview()),
    candidates=Candidates(MultiviewSearch()),
    evaluate=Evaluate(MultiviewSearch()),
)


@pytest.mark.parametrize(
    ("plan", "settings", "message"),
    [
        (
            Lexical(),
            dict(evaluate=Evaluate(Search(renormalise=True))),
            "Search.renormalise: got True with a",
        ),
        (
            OnePass(),
            OF_VIEWS,
            "Experiment.plan: got OnePass with identifiers of Multiview, expected None, "
            r"@Lexical\(\), or identifiers of which a passage has one \(Prepare.identifiers\)",
        ),
        (
            Lexical(ranked_by="identifiers"),
            OF_VIEWS,
            "Lexical.ranked_by: got 'identifiers' with identifiers of Multiview, expected 'beams' "
            "or 'plan': a passage has more identifiers than can be scored",
        ),
    ],
)
def test_plans_that_cannot_be_followed_are_refused(plan, settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, plan=plan, **settings)


def test_identifiers_of_several_views_have_a_plan_by_words():
    experiment = dataclasses.replace(BASE, plan=Lexical(), **OF_VIEWS)
    assert experiment.measured == (*BASE.measured, "planned")


def test_batches_that_cannot_be_cut_into_microbatches_are_refused():
    for path, message in (
        ("generate.microbatches", "generate/Training.microbatches: got 7, expected a number that "
         "divides generate/Training.batch_size, 64"),
        ("distill.microbatches", "distill/Training.microbatches: got 7, expected a number that "
         "divides distill/Training.batch_size, 64"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{message}$"):
            changed(path, 7)
    lists = dataclasses.replace(BASE.distill, microbatches=32)
    with pytest.raises(ValueError, match="divides distill/Training.list_batch_size, 16"):
        dataclasses.replace(BASE, distill=lists)
    assert changed("generate.microbatches", 8).generate.microbatches == 8


def test_files_belong_to_the_stage_that_reads_them_and_those_after_it():
    before = marks(BASE, {"teach": {"RunTeacher.path": {"bytes": 1}}})
    after = marks(BASE, {"teach": {"RunTeacher.path": {"bytes": 2}}})
    expected = {"teach", "distill", "evaluate"}
    assert {stage for stage in STAGES if before[stage] != after[stage]} == expected
    assert marks(BASE, {"teach": {}}) == marks(BASE)


def test_every_setting_of_an_experiment_is_read_by_a_stage():
    prepare = dataclasses.replace(BASE.prepare, vocabulary=SentencePiece(extra_ids=9))
    full = dataclasses.replace(BASE, pretrain=BASE.generate, prepare=prepare)
    read = {name for stage in full.stages.values() for name in stage.settings(full)}
    names = {field.name for field in dataclasses.fields(Experiment)}
    assert names - read == {"model_dir", "control", "mesh", "further", "plan"}


def test_stages_stand_after_those_that_they_read():
    for place, stage in enumerate(STAGES):
        assert set(BASE.stages[stage].upstream(BASE)) <= set(STAGES[:place])


def test_a_folder_may_be_moved_but_what_is_in_it_is_read_otherwise():
    here, there = BeirCollection("here"), BeirCollection("there")
    assert describe(here) == describe(there) == {"is": "BeirCollection"}


def test_descriptions_are_json_and_tell_everything_apart():
    values = [
        Sources(),
        Sources(labelled=2.0),
        Atomic(),
        ResidualQuantization(),
        distilled_ranknet,
        listnet,
        functools.partial(distilled_ranknet, margin=1.0),
        functools.partial(distilled_ranknet, margin=2.0),
        functools.partial(listnet, temperature=1.0),
        ("a",),
        "a",
        {1: ("a",)},
        None,
    ]
    described = [json.dumps(describe(value)) for value in values]
    assert len(set(described)) == len(values)
    assert [json.loads(text) for text in described] == [describe(value) for value in values]


def test_bm25_of_words_is_described_as_before_it_could_be_chosen():
    before = {"is": "Bm25", "k1": 0.9, "b": 0.4, "stop_words": "english", "stemmer": ""}
    assert describe(WORDS) == before
    assert describe(Bm25()) == {**before, "stemmer": "snowball"}
    assert describe(Bm25(language="german")) == {
        **before, "stemmer": "snowball", "language": "german",
    }  # fmt: skip


def test_a_baseline_is_described_where_it_is_measured_and_new():
    described = describe(Evaluate(Search()))
    assert described["baseline"] == describe(Bm25())
    for settings in ({"baseline": WORDS}, {"bm25": False}, {"bm25": False, "baseline": WORDS}):
        found = describe(Evaluate(Search(), **settings))
        assert found.keys() == described.keys() - {"baseline"}


def test_a_fingerprint_does_not_depend_on_order():
    assert fingerprint({"a": 1, "b": [2, 3]}) == fingerprint({"b": [2, 3], "a": 1})
    assert fingerprint({"a": 1, "b": [2, 3]}) != fingerprint({"a": 1, "b": [3, 2]})
    assert len(fingerprint({})) == 16


def test_paths_of_settings():
    settings = Prepare("t", Atomic(), SentencePiece(path="m"), Sources(pseudo_query_path="q"))
    assert paths(settings) == {"SentencePiece.path": "m", "Sources.pseudo_query_path": "q"}
    assert paths(Teach(RunTeacher("run.trec"), TopM())) == {"RunTeacher.path": "run.trec"}
    assert paths(VectorTeacher("p.npy", "q.npy", "ids")).keys() == {
        "VectorTeacher.passages_path",
        "VectorTeacher.queries_path",
        "VectorTeacher.query_ids_path",
    }
    of_a_fusion = FusionTeacher((Bm25Teacher(), RunTeacher("run.trec")))
    assert paths(of_a_fusion) == {"RunTeacher.path": "run.trec"}
    assert paths(BASE) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"test_splits": ()}, r"Prepare.test_splits: got \(\), expected a split or more"),
        ({"query_length": 1}, "Prepare.query_length: got 1, expected at least 2, EOS counted"),
    ],
)
def test_settings_of_prepare_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=message):
        Prepare("t", Atomic(), **settings)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ((), "Candidates.sources: got \\(\\), expected some of"),
        (("labeled",), "Candidates.sources: got \\('labeled',\\), expected some of \\('labelled'"),
    ],
)
def test_candidates_of_unknown_sources(sources, message):
    with pytest.raises(ValueError, match=message):
        Candidates(Search(), sources=sources)


def with_model(identifiers, layers):
    prepare = dataclasses.replace(BASE.prepare, identifiers=identifiers)
    model = T5Config(prefix_adaptive_layers=layers)
    return dataclasses.replace(BASE, prepare=prepare, model=model)


def test_a_prefix_adaptive_decoder_is_for_codes_of_one_position():
    for identifiers in (Title(), NaiveString(), Atomic()):
        name = type(identifiers).__name__
        with pytest.raises(ValueError, match=f"layers: got 4 with {name} identifiers, expected 0"):
            with_model(identifiers, 4)
    for identifiers in (ResidualQuantization(), KMeansTree(), NaiveString(by_position=True)):
        plain, adaptive = with_model(identifiers, 0), with_model(identifiers, 4)
        assert marks(adaptive)["generate"] != marks(plain)["generate"]
        assert marks(adaptive)["prepare"] == marks(plain)["prepare"]
        differs = {k for k, v in adaptive.compared("generate").items()
                   if v != plain.compared("generate")[k]}  # fmt: skip
        assert differs == {"decoder"}


def test_settings_that_came_later_leave_older_stages_as_they_were():
    assert "prefix_adaptive_layers" not in describe(T5Config())
    assert describe(T5Config(prefix_adaptive_layers=4))["prefix_adaptive_layers"] == 4
    assert describe(NaiveString()) == {"is": "NaiveString"}


def test_candidates_of_a_source_that_is_not_prepared():
    message = "Candidates.sources: got 'passages', expected 'labelled' or one of .*Sources.passages"
    unused = dataclasses.replace(BASE.prepare, sources=Sources(passages=0))
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(
            BASE, prepare=unused, candidates=Candidates(Search(), sources=("labelled", "passages"))
        )


def test_defaults_that_fingerprints_are_compared_with_are_plain_values():
    """What gin makes anew each time, such as a loss, equals nothing: it would always differ."""
    for component in configurables._components():
        for field in dataclasses.fields(component):
            if field.metadata.get("fingerprint") == "unless default":
                plain = isinstance(field.default, (bool, int, float, str, tuple))
                assert plain or field.default == type(field.default)(), field


def test_every_setting_says_of_what_type_it_is():
    untyped = [
        f"{component.__name__}.{field.name}"
        for component in configurables._components()
        for field in dataclasses.fields(component)
        if str(field.type) in ("Any", "Any | None")
    ]
    assert untyped == []
