"""An experiment from Python, without gin: its settings as the flags of `python -m dgr_jax.train`.

So it makes the same stages, with the same fingerprints, and leaves the same config.gin.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dgr_jax.config import cli, configurables, gin_files
from dgr_jax.corpora import records
from dgr_jax.corpora.beir import BeirCollection
from dgr_jax.corpora.irds import IrDatasetsCollection
from dgr_jax.corpora.types import Collection
from dgr_jax.display import LogFormatter
from dgr_jax.identifiers.scheme import Scheme
from dgr_jax.model_dir import writer_lock
from dgr_jax.models.initial import Initial
from dgr_jax.models.t5_config import T5Config
from dgr_jax.retrieval.simultaneous import Plan
from dgr_jax.shipped import resources
from dgr_jax.teaching.list_recipes import ListRecipe
from dgr_jax.teaching.teacher import Teacher

if TYPE_CHECKING:
    from dgr_jax.experiments.generative import Experiment
    from dgr_jax.retrieval.retriever import Retriever

Recipe = Literal["laptop", "beir", "dgr", "ltrgr", "quickstart"]
Size = Literal["tiny", "mini", "small", "base", "large", "xl", "xxl"]
AsRecipe = Literal["recipe"]

_IRDS = "irds:"
_OWN = ("collection", "queries", "qrels", "recipe", "size", "bindings")  # fields that are no macros


@dataclass(frozen=True, eq=False)
class GenerativeRetriever:
    """What is to be trained; `fit` trains it.

    collection: a folder in BEIR layout; passages, an iterable of dictionaries or a data frame with
      pid, text and, if they have one, title; 'irds:ID' for an id of ir_datasets; a collection of
      `dgr_jax.corpora`; or None where the recipe has one.
    queries, qrels: where the collection is passages: dictionaries or a frame with qid and text, and
      split -> dictionaries or a frame with qid, pid and, if it is not 1, relevance. The split
      'train' is learned from, 'test' is measured on. Without them the student learns from the
      passages. `fit` writes all three to MODEL_DIR/collection.
    recipe: a shipped experiment, which gives all that is not set here, or a gin file of one's own.
    size: of the student.
    bindings: anything else that gin files can set: 'Search.constrained' -> value.

    Every other setting is the macro of its name in capitals; None leaves it as in the recipe, and
    so does 'recipe' where None is a choice. `python -m dgr_jax.train --gin_file=laptop.gin
    --explain` says what each of them means. A loss is given by its name, or with settings bound, as
    `dgr_jax.losses.ranking.bind` does. Raises ValueError where a setting is wrong.
    """

    collection: Any = None
    _: KW_ONLY
    queries: Any = None
    qrels: Mapping[str, Any] | None = None
    recipe: Recipe | str = "laptop"
    size: Size | T5Config | None = None
    identifiers: Scheme | None = None
    teacher: Teacher | None = None
    loss: str | functools.partial | None = None
    lists: ListRecipe | None = None
    plan: Plan | AsRecipe | None = "recipe"
    initial: Initial | AsRecipe | None = "recipe"
    generate_steps: int | None = None
    distill_steps: int | None = None
    batch_size: int | None = None
    list_batch_size: int | None = None
    learning_rate: float | None = None
    distill_learning_rate: float | None = None
    warmup_steps: int | None = None
    query_length: int | None = None
    num_beams: int | None = None
    depth: int | None = None
    seed: int | None = None
    bindings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_collection()
        known = sorted(file.stem for file in resources("gin_configs").glob("models/*.gin"))
        if isinstance(self.size, str) and self.size not in known:
            raise ValueError(f"size: got {self.size!r}, expected one of {', '.join(known)}")
        self._load(self.flags("NOT_GIVEN"), keep=False)

    def _check_collection(self) -> None:
        given = self.collection
        if isinstance(given, str) and given.startswith(_IRDS) or _is_collection(given):
            pass
        elif isinstance(given, (str, os.PathLike)):
            if not Path(given).is_dir():
                raise ValueError(
                    f"collection: no folder at {os.fspath(given)!r}, expected one in BEIR layout; "
                    f"an id of ir_datasets is written '{_IRDS}ID'"
                )
        elif given is None and (self.recipe == "quickstart" or self.recipe.endswith(".gin")):
            pass
        elif not records.are_records(given):
            raise ValueError(
                f"collection: got {given!r:.80}, expected a folder in BEIR layout, passages (an "
                f"iterable of dictionaries, a data frame), '{_IRDS}ID' or a collection"
            )
        if not self._has_records and (self.queries is not None or self.qrels is not None):
            raise ValueError(
                "queries, qrels: got some beside a collection that has its own, expected None"
            )
        if (self.queries is None) != (not self.qrels):
            lacks, there = ("queries", "qrels") if self.qrels else ("qrels", "queries")
            raise ValueError(f"{lacks}: got none with {there}, expected both or neither")

    @property
    def _has_records(self) -> bool:
        return not _is_collection(self.collection) and records.are_records(self.collection)

    def flags(self, model_dir: str | Path) -> list[str]:
        """The flags of `python -m dgr_jax.train` that do the same in a MODEL_DIR; those of passages
        that were given as records work once `fit` has written them there."""
        files = [self.recipe if self.recipe.endswith(".gin") else f"{self.recipe}.gin"]
        if isinstance(self.size, str):
            files.append(f"models/{self.size}.gin")
        flags = [f"--gin_file={file}" for file in files] + [f"--model_dir={os.fspath(model_dir)}"]
        flags += self._collection_flags(model_dir)
        if isinstance(self.size, T5Config):
            for size in dataclasses.fields(self.size):
                flags += _flags(f"T5Config.{size.name}", getattr(self.size, size.name), "size")
        for setting in dataclasses.fields(self):
            value = getattr(self, setting.name)
            as_recipe = "recipe" if setting.default == "recipe" else None
            if setting.name not in _OWN and value != as_recipe:
                flags += _flags(setting.name.upper(), value, setting.name)
        for name, value in self.bindings.items():
            flags += _flags(name, value, name.replace(".", "_").replace("/", "_"))
        return flags

    def _collection_flags(self, model_dir: str | Path) -> list[str]:
        given = self.collection
        if given is None:
            return []
        if isinstance(given, str) and given.startswith(_IRDS):
            given = IrDatasetsCollection(given.removeprefix(_IRDS))
        if isinstance(given, BeirCollection):
            given = given.folder
        if self._has_records:
            given = Path(model_dir) / "collection"
        if isinstance(given, (str, os.PathLike)):
            return [f"--data_dir={os.fspath(given)}"]
        return list(_flags("COLLECTION", given, "collection"))

    def command(self, model_dir: str | Path) -> str:
        """The command that does the same, for a shell."""
        return shlex.join(["python", "-m", "dgr_jax.train", *self.flags(model_dir)])

    def fit(self, model_dir: str | Path, *, progress: bool = True) -> Retriever:
        """Trains in a MODEL_DIR, and opens what was trained; stages that are done are skipped, and
        what was cut off goes on.

        progress: whether a line tells of each step of the work; a program that has set up logging
        says that there.
        Raises FileNotFoundError or ValueError before any stage starts, where one could only fail.
        """
        from dgr_jax.retrieval.retriever import Retriever
        from dgr_jax.stages import pipeline

        flags = self.flags(model_dir)
        with _told(progress), writer_lock.held(model_dir):
            if self._has_records:
                folder = Path(model_dir) / "collection"
                records.write(folder, self.collection, self.queries or (), self.qrels or {})
            experiment, bindings = self._load(flags, keep=True)
            pipeline.run(experiment, named=cli.named(bindings))
        return Retriever.load(model_dir)

    @staticmethod
    def _load(flags: list[str], keep: bool) -> tuple[Experiment, list[str]]:
        args, bindings = cli.flags(cli.parser("train", ""), flags)
        kinds = ("Experiment",)
        experiment = gin_files.load_experiment(args, bindings, kinds, keep=keep, fill=False)
        return experiment, bindings


def _is_collection(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and all(
        hasattr(value, name) for name in vars(Collection) if not name.startswith("_")
    )


def _flags(name: str, value: Any, scope: str) -> Iterator[str]:
    """--gin.NAME=VALUE of a setting, and of everything that its components are made of. A component
    is made in a scope of its own, so that it is what was given, whatever else is of its kind."""
    inner: list[str] = []
    yield f"--gin.{name}={_written(value, scope, inner)}"
    yield from inner


def _written(value: Any, scope: str, inner: list[str]) -> str:
    """A value as gin reads it; the flags of its settings are added to `inner`."""
    if isinstance(value, functools.partial):
        kind, settings = value.func.__name__, value.keywords
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value).__name__
        settings = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    elif isinstance(value, (tuple, list)):
        parts = [_written(v, f"{scope}_{place}", inner) for place, v in enumerate(value)]
        return f"({', '.join(parts)}{',' * (len(parts) == 1)})"
    elif scope == "loss" and isinstance(value, str):
        return f"@{value}()"
    else:
        return repr(os.fspath(value) if isinstance(value, os.PathLike) else value)
    if kind not in configurables.configurables():
        raise ValueError(
            f"{scope}: got {kind}, expected a component that gin files can name (one of "
            "dgr_jax.config.configurables)"
        )
    for name, setting in settings.items():
        inner += _flags(f"{scope}/{kind}.{name}", setting, f"{scope}_{name}")
    return f"@{scope}/{kind}()"


@contextlib.contextmanager
def _told(progress: bool) -> Iterator[None]:
    """Log lines go to stderr, where nobody has said where they go."""
    logger = logging.getLogger("dgr_jax")
    if not progress or logger.hasHandlers():
        yield
        return
    handler, level = logging.StreamHandler(), logger.level
    handler.setFormatter(LogFormatter("%(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
