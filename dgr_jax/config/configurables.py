"""Everything that gin files can name: name -> what makes it from settings. Knows nothing of gin."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dgr_jax import ranges


class Missing(ValueError):
    """A setting that must be given was not."""


@functools.cache
def configurables() -> Mapping[str, Callable[..., Any]]:
    """Components and losses by name; each checks the types of its settings when it is called."""
    from dgr_jax.losses import contrastive, ranking

    components = {c.__name__: _checked(c) for c in _components()}
    losses = ranking.LOSSES | contrastive.LOSSES
    limits = ranking.SETTINGS | contrastive.SETTINGS
    return components | {name: _loss_factory(name, loss, limits) for name, loss in losses.items()}


@functools.cache
def _components() -> tuple[type, ...]:
    from dgr_jax import partitioning
    from dgr_jax.corpora import beir, dpr, irds, msmarco, quickstart, subset, variations
    from dgr_jax.data import examples, span_corruption, views, vocabulary
    from dgr_jax.decoding import passage_scoring
    from dgr_jax.experiments.common import Evaluate, Teach, Training
    from dgr_jax.experiments.dense import DenseExperiment, DensePrepare, Lists, Negatives
    from dgr_jax.experiments.generative import Candidates, Experiment, Prepare
    from dgr_jax.experiments.living_study import LivingStudy
    from dgr_jax.experiments.pseudo_queries import Pairs, PseudoQueries
    from dgr_jax.experiments.refresh import Refresh
    from dgr_jax.experiments.study import Study
    from dgr_jax.identifiers import atomic, embeddings, multiview, rq, semantic, string, title
    from dgr_jax.models import dual_encoder, t5
    from dgr_jax.models.initial import Corpus, Pretrained
    from dgr_jax.retrieval import (
        bm25,
        dense,
        exact_search,
        generative,
        sampling,
        simultaneous,
        student_plans,
    )
    from dgr_jax.retrieval.multiview import search as multiview_search
    from dgr_jax.teaching.list_recipes import TopM, TwoLists
    from dgr_jax.teaching.listwise import ListwiseTeacher
    from dgr_jax.teaching.sparse_teacher import SparseEncoderTeacher
    from dgr_jax.teaching.teachers import (
        BiEncoderTeacher,
        Bm25Teacher,
        CrossEncoderTeacher,
        FusionTeacher,
        RunTeacher,
        VectorTeacher,
    )
    from dgr_jax.training import dense as dense_objective
    from dgr_jax.training import objectives, optimizers, refreshing

    return (
        Experiment, Prepare, Training, Candidates,
        Teach, Evaluate, partitioning.Mesh, t5.T5Config, Corpus, Pretrained,
        beir.BeirCollection, dpr.DprCollection, irds.IrDatasetsCollection,
        msmarco.MsmarcoCollection, quickstart.QuickstartCollection, subset.Subset,
        variations.Variation,
        examples.Sources, span_corruption.SpanCorruption, views.ViewMixture,
        vocabulary.SentencePiece, generative.Search,
        multiview_search.MultiviewSearch, passage_scoring.Scoring, bm25.Bm25, bm25.Bm25Baseline,
        simultaneous.Lexical, student_plans.Learned, student_plans.OnePass,
        atomic.Atomic, rq.ResidualQuantization, semantic.KMeansTree, string.NaiveString,
        title.Title, multiview.Multiview, embeddings.TfidfSvd, embeddings.SentenceEncoder,
        embeddings.FromFile, objectives.Generation, objectives.Distillation,
        optimizers.Adafactor, optimizers.AdamW, optimizers.Constant, optimizers.ReciprocalSqrt,
        optimizers.Linear, optimizers.Cosine,
        RunTeacher, Bm25Teacher, CrossEncoderTeacher,
        BiEncoderTeacher, SparseEncoderTeacher, VectorTeacher, ListwiseTeacher, FusionTeacher,
        TopM, TwoLists,
        DenseExperiment, DensePrepare, Lists,
        Negatives, dual_encoder.DualEncoderConfig, dense_objective.Dense,
        dense.DenseSearch, exact_search.ExactSearch,
        PseudoQueries, Pairs, sampling.Sampling, Study,
        Refresh, refreshing.LevelGeneration, LivingStudy,
    )  # fmt: skip


def plans() -> set[str]:
    """The components that are plans, see `retrieval.simultaneous.Plan`."""
    return {component.__name__ for component in _components() if hasattr(component, "planner")}


def nested_defaults() -> Iterator[tuple[str, str, str]]:
    """(component, setting, component that the setting is by default).

    They are bound in gin, so that `TfidfSvd.dim` also holds for embeddings that are a default.
    """
    known = _components()
    for component in known:
        for field in dataclasses.fields(component):
            default: Any = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            if type(default) in known and default == type(default)():
                yield component.__name__, field.name, type(default).__name__


def defaults(name: str) -> dict[str, Any]:
    """Setting -> default of a component or loss, for those that have one."""
    parameters = inspect.signature(configurables()[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def choices(name: str, setting: str) -> tuple[str, ...]:
    """What a setting of a component or loss may be: '@NAME()' of components, words for others."""
    for component in _components():
        if component.__name__ == name:
            return tuple(dict.fromkeys(_choices(typing.get_type_hints(component)[setting])))
    annotation = str(inspect.signature(configurables()[name]).parameters[setting].annotation)
    kinds = [kind.strip() for kind in annotation.split("|")]
    return tuple(_WORDS.get(kind, kind) for kind in kinds)


def _choices(hint: Any) -> Iterator[str]:
    inner, outer = typing.get_args(hint), typing.get_origin(hint) or hint
    if outer in (typing.Union, types.UnionType):
        for kind in inner:
            yield from _choices(kind)
    elif isinstance(hint, typing.TypeVar):
        yield from _choices(hint.__bound__)
    elif outer is tuple:
        yield f"a tuple, each {' or '.join(_choices(inner[0]))}"
    elif outer is Callable:
        from dgr_jax.losses import contrastive, ranking

        of_all = inner[0] is Ellipsis
        yield from (f"@{name}()" for name in (contrastive if of_all else ranking).LOSSES)
    elif outer is types.NoneType:
        yield "None"
    elif outer.__name__ in _WORDS:
        yield _WORDS[outer.__name__]
    else:
        yield from (f"@{c.__name__}()" for c in _components() if _fits(c, outer))


def _fits(component: type, kind: type) -> bool:
    """Whether it is of a kind, or has all that a protocol asks for."""
    if not getattr(kind, "_is_protocol", False):
        return issubclass(component, kind)
    there = {*dir(component), *(field.name for field in dataclasses.fields(component))}
    return there >= {name for name in vars(kind) if not name.startswith("_")}


def _checked(component: type) -> Callable[..., Any]:
    """The component. It names settings that are missing, or of a wrong type, as gin knows them."""
    name, signature = component.__name__, inspect.signature(component)
    kinds = {f.name: _written(f.type) for f in dataclasses.fields(component)}

    def make(**settings: Any) -> Any:
        for parameter in signature.parameters.values():
            if parameter.default is parameter.empty and parameter.name not in settings:
                given = f"{name}.{parameter.name}"
                raise ValueError(f"{given} is not set; give --gin.{given}=VALUE")
        return component(**{k: _as(kinds[k], v, f"{name}.{k}") for k, v in settings.items()})

    return _known_as(name, make, component.__doc__, signature)


def _written(annotation: Any) -> str:
    """An annotation as text, whether or not its module evaluates annotations."""
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


_WORDS = {"int": "a whole number", "float": "a number", "bool": "True or False", "str": "a string"}


def _as(kind: str, value: Any, setting: str) -> Any:
    """The value in the type that an annotation asks for. 1e5 is taken for an int, 1 for a float
    and a list for a tuple; a component may be of any class.

    Raises ValueError for a value of another type, and Missing for gin's REQUIRED, which stands for
    a value that must still be given.
    """
    if type(value) is object:
        raise Missing(f"{setting} is required")
    if kind.endswith("| None"):
        return None if value is None else _as(kind.removesuffix("| None").strip(), value, setting)
    if kind.startswith("tuple["):
        return _as_tuple(kind.removeprefix("tuple[").removesuffix(", ...]"), value, setting)
    if kind not in _WORDS:
        return _as_component(value, setting)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if kind == "float":
            return float(value)
        if kind == "int" and math.isfinite(value) and int(value) == value:
            return int(value)
    elif type(value).__name__ == kind:
        return value
    raise ValueError(f"{setting}: got {value!r}, expected {_WORDS[kind]}")


def _as_tuple(inner: str, value: Any, setting: str) -> Any:
    if inner not in _WORDS:
        return value
    if not isinstance(value, (tuple, list)):
        raise ValueError(f"{setting}: got {value!r}, expected a tuple such as ({value!r},)")
    return tuple(_as(inner, v, setting) for v in value)


def _as_component(value: Any, setting: str) -> Any:
    """The value, where it is a component. Raises ValueError for a plain value, which lacks the @,
    and for a function or class that was not called, which lacks the ()."""
    given = value.__name__ if inspect.isfunction(value) or inspect.isclass(value) else value
    if given is value and not isinstance(value, (str, int, float)):
        return value
    known = str(given).removeprefix("@").removesuffix("()")
    example = known if known in configurables() else "NAME"
    raise ValueError(f"{setting}: got {given!r}, expected a component, written @{example}()")


def _loss_factory(
    name: str, loss: Callable[..., Any], limits: Mapping[str, ranges.Range]
) -> Callable[..., Any]:
    """`@distilled_ranknet()` in gin: the loss with all its settings bound, so that a default that
    is written down makes no other loss. limits: what a setting may be, by name."""
    parameters = inspect.signature(loss).parameters.items()
    known = {k: p for k, p in parameters if p.kind is p.KEYWORD_ONLY}
    usual = {k: p.default for k, p in known.items()}

    def make(**settings: Any) -> functools.partial:
        kinds = {k: str(known[k].annotation) for k in settings}
        checked = {k: _as(kinds[k], v, f"{name}.{k}") for k, v in settings.items()}
        for setting in checked.keys() & limits.keys():
            ranges.require(f"{name}.{setting}", checked[setting], limits[setting])
        return functools.partial(loss, **usual | checked)

    return _known_as(name, make, loss.__doc__, inspect.Signature(list(known.values())))


def _known_as(name: str, make: Any, doc: str | None, signature: inspect.Signature) -> Any:
    """The function, with the name, the text and the parameters that gin shows for it."""
    make.__name__ = make.__qualname__ = name
    make.__doc__, make.__signature__ = doc, signature
    return make
