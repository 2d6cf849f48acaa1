"""What an experiment reads, writes and holds, stage by stage, before anything starts.

Estimated from the settings and from the number of passages, of their words and of training queries,
which are counted where the corpus lies. This is about disk and index: what the programs need of a
chip is what `dgr_jax.plan` says.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from dgr_jax import display
from dgr_jax.capacity import counting
from dgr_jax.capacity import dense as dense_plans
from dgr_jax.capacity.planner import Line, planner_of
from dgr_jax.capacity.sizes import (
    PreparedSizes,
    estimated_sizes,
    model_config,
    state_bytes,
    text_size,
    training_stages,
    trie_bytes,
)
from dgr_jax.corpora.lines import place
from dgr_jax.data.examples import Sources
from dgr_jax.experiments.common import Teach, Training
from dgr_jax.experiments.dense import DenseExperiment, Negatives
from dgr_jax.experiments.generative import Experiment
from dgr_jax.identifiers.scheme import CorpusSize
from dgr_jax.models.t5 import Transformer
from dgr_jax.retrieval import exact_search
from dgr_jax.retrieval.plan_sizes import PlanSizes
from dgr_jax.retrieval.simultaneous import Plan
from dgr_jax.settings import paths

_CHARACTERS = 6.0  # of a word, its space counted
_SPAN = 4 + 2 + 0.4  # bytes a token of a suffix array: position, token, branches
_INT = 4
_MOST = 1e8  # of any number of a corpus but its passages


def given(text: str) -> CorpusSize:
    """'8.8e6,55,5e5,20': passages, words of each, training queries, pseudo-queries a passage.

    Raises ValueError for anything else.
    """
    try:
        passages, words, queries, pseudo = map(float, text.split(","))
        known = 1 <= words <= _MOST and 1 <= queries <= _MOST and 0 <= pseudo <= _MOST
        if not known or not counting.PASSAGES.holds(passages):
            raise ValueError
    except ValueError:
        raise ValueError(
            f"--corpus: got {text!r}, expected PASSAGES,WORDS,QUERIES,PSEUDO: 8.8e6,55,5e5,20, "
            f"with {counting.PASSAGES.words} passages"
        ) from None
    return CorpusSize(int(passages), words, int(queries), pseudo)


def lines(
    experiment: Experiment | DenseExperiment, corpus: CorpusSize, sample: Sequence[str] = ()
) -> Iterator[Line]:
    """Everything of some size that an experiment writes. sample: texts of some passages."""
    yield Line("prepare", "passages", corpus.passages * corpus.words * _CHARACTERS)
    yield from planner_of(experiment).lines(experiment, corpus)
    if experiment.plan is not None:
        sizes = experiment.plan.sizes(corpus.passages, corpus.words, sample)
        yield Line("evaluate", plan_in_words(experiment.plan, sizes), sizes.disk)


def plan_in_words(plan: Plan, sizes: PlanSizes) -> str:
    """What a plan needs beside its index on disk."""
    return (
        f"plan {type(plan).__name__} of {sizes.planned} passages a query: "
        f"{readable(sizes.memory)} in the memory of the host, {1e3 * sizes.seconds:.2g} ms a query"
    )


def generative(experiment: Experiment, corpus: CorpusSize) -> Iterator[Line]:
    """The lines of a student that writes identifiers."""
    sizes = estimated_sizes(experiment, corpus)
    prepare, search, length = experiment.prepare, experiment.candidates.search, sizes.length
    yield from _identifiers(sizes)
    views = prepare.identifiers.views
    of_each = sum(prepare.mixture.of(view) for view in views) if views else 1
    examples = sum(_pairs(experiment, corpus).values()) * of_each
    row = _INT * (prepare.query_length + 3 * length)
    yield Line("prepare", f"{examples:,.0f} examples, as a dataset", examples * row / 3)
    yield Line("prepare", "the same as token arrays", examples * row)
    yield from _start(experiment)
    # Scanned, it has the same bytes, and one layer to trace in place of all.
    config = dataclasses.replace(model_config(experiment, sizes), scan_layers=True)
    model, stages = Transformer(config), training_stages(experiment)
    weights = _checkpoints("generate", stages.pop("generate"), model)
    yield weights._replace(on_device=0.0)
    yield Line("generate", "parameters", 0.0, weights.on_device)
    depth, asked = search.depth, _asked(experiment, corpus)
    yield Line("candidates", f"{depth} passages of {asked:,} queries", asked * depth * 8.0)
    keys = experiment.candidates.keys if views else 1
    if views:
        written = search.num_beams * sum(
            prepare.identifiers.span_tokens if view == "body" else 1 for view in views
        )
        size = asked * (depth * keys * 2.0 + written * (_INT * length + 5.0))
        yield Line("candidates", f"their {keys} best identifiers each", size)
    yield _rank_lists(experiment.teach, asked, keys * _INT * (length + (7 if views else 1)))
    if experiment.pretrain is not None:
        stages = {"pretrain": experiment.pretrain} | stages
    for stage, settings in stages.items():
        yield _checkpoints(stage, settings, model)._replace(on_device=0.0)


def dense(experiment: DenseExperiment, corpus: CorpusSize) -> Iterator[Line]:
    """The lines of a dense retriever."""
    prepare, pairs = experiment.prepare, _pairs(experiment, corpus)
    queries = round(sum((pairs | {"labelled": corpus.queries})[name] for name in pairs))
    positives = -(-corpus.pairs // max(1, corpus.queries))
    tokens = corpus.passages * prepare.passage_length
    yield Line("prepare", "passages as token arrays", _INT * tokens)
    row = _INT * (prepare.query_length + 2 * positives + 1)
    yield Line("prepare", f"{queries:,} queries as token arrays", queries * row)
    if "negatives" in experiment.stages:
        yield _pools("negatives", experiment.negatives, queries)
    if experiment.teach is not None:
        yield _rank_lists(experiment.teach, queries, 2 * _INT, row)
    yield from _start(experiment)
    model, dim = dense_plans.encoder(experiment, scan_layers=True), experiment.model.dim
    for stage, settings in training_stages(experiment).items():
        if stage == "refresh":
            yield _pools("mine", experiment.mined, queries)
        weights = _checkpoints(stage, settings, model)
        yield weights._replace(on_device=0.0)
        yield Line(stage, f"vectors of {dim} float32", 4.0 * corpus.passages * dim)
    search = experiment.evaluate.search.index
    index = exact_search.BlockPlan.of(corpus.passages, dim, search, 1)
    parts = f", 2 of {index.blocks} parts at once" if index.blocks > 1 else ""
    yield Line("evaluate", "parameters", 0, weights.on_device)
    yield Line("evaluate", f"vectors in {search.storage}{parts}", 0, index.device_bytes)


def _identifiers(sizes: PreparedSizes) -> Iterator[Line]:
    identifiers = sizes.identifiers
    for table in identifiers.tables:
        view = f" of the view {table.view}" if table.view else ""
        size = table.rows * (_INT * table.length + 16.0)
        yield Line("prepare", f"{table.rows:,} identifiers{view}", size)
        held = trie_bytes(table, sizes.vocab_size)
        yield Line("prepare", "their trie", held + table.rows * float(_INT), held)
    if tokens := identifiers.text_tokens:
        held = tokens * _SPAN + sizes.corpus.passages * float(_INT)
        yield Line("prepare", f"suffix array of {tokens:,} tokens", held, held)


def _start(experiment: Experiment | DenseExperiment) -> Iterator[Line]:
    if "start" in experiment.stages:
        rows, width = text_size(experiment.prepare.vocabulary), experiment.width
        yield Line("start", f"embeddings of {rows:,} tokens", float(_INT) * rows * (width + 1))


def _checkpoints(stage: str, settings: Training, model: Any) -> Line:
    """Parameters and what the optimizer knows; a search holds the parameters alone."""
    parameters, optimizer = state_bytes(model, settings)
    kept = settings.checkpoints
    return Line(stage, f"{kept} checkpoints", kept * (parameters + optimizer), parameters)


def _pools(stage: str, negatives: Negatives, queries: int) -> Line:
    """Passages to draw the negatives of each query from."""
    depth = negatives.depth
    return Line(stage, f"{depth} passages of {queries:,} queries", queries * depth * _INT)


def _rank_lists(teach: Teach, asked: int, entry: int, query: int = 0) -> Line:
    """entry: bytes of each passage in a list; query: bytes of the query that the list is for."""
    lists = asked * teach.lists.lists_a_query
    width = teach.lists.length
    return Line("teach", f"{lists:,} rank lists of {width}", lists * (query + width * entry))


def _asked(experiment: Experiment, corpus: CorpusSize) -> int:
    """Texts that the student retrieves candidates for."""
    settings, texts = experiment.candidates, _texts(experiment.prepare.sources, corpus)
    texts["labelled"] = corpus.queries
    most = settings.max_queries or math.inf
    return round(sum(min(most, texts[source]) for source in settings.sources))


def _pairs(experiment: Experiment | DenseExperiment, corpus: CorpusSize) -> dict[str, float]:
    """Pairs of a text and a passage, of each source in use."""
    sources = experiment.prepare.sources
    texts = _texts(sources, corpus)
    return {name: texts[name] for name in sources.rates()}


def _texts(sources: Sources, corpus: CorpusSize) -> dict[str, float]:
    """Pairs of a text and a passage, by source."""
    step = max(1, sources.chunk_words // 2)
    last = max(0.0, corpus.words - sources.chunk_words)
    chunks = min(math.ceil(last / step) + 1, sources.max_chunks or math.inf)
    if sources.random_chunks:
        chunks = min(last + 1, sources.random_chunks)
    return {
        "labelled": corpus.pairs,
        "passages": corpus.passages * chunks,
        "pseudo_queries": corpus.passages
        * min(corpus.pseudo_queries, sources.max_pseudo_queries or math.inf),
    }


def show(experiment: Experiment | DenseExperiment, corpus: CorpusSize | None) -> None:
    """Prints the files that the collection lacks or has, and the lines, with their sums.

    corpus: None counts the one that lies there.
    """
    console = display.console(soft_wrap=True)
    splits = experiment.prepare.splits
    for name, path in experiment.collection.inputs(splits).items():
        console.print(f"reads {path}" if path else f"lacks {name}")
    for settings in (experiment.prepare, experiment.teach):
        for name, path in paths(settings).items():
            is_there = place(path).is_file()
            console.print(f"reads {path}" if is_there else f"lacks {name}")
    origin = "as given by --corpus"
    counts_here = corpus is None and experiment.plan is not None
    if corpus is None:
        corpus, origin = counting.corpus_of(experiment, "--corpus")
    console.print(
        f"estimated from {corpus.passages:,} passages of {corpus.words:g} words, "
        f"{corpus.queries:,} training queries, {corpus.pseudo_queries:g} pseudo-queries a "
        f"passage, {origin}"
    )
    table = Table("stage", "what", "on disk", "on the device")
    for column in table.columns[2:]:
        column.justify = "right"
    sample = counting.sample(experiment) if counts_here else []
    written = list(lines(experiment, corpus, sample))
    for line in written:
        table.add_row(line.stage, line.what, *map(readable, (line.size, line.on_device)))
    disk, device = sum(line.size for line in written), sum(line.on_device for line in written)
    table.add_row("", "together", readable(disk), readable(device))
    console.print(table)
    scheme, limit = getattr(experiment.prepare, "identifiers", None), (1 << 31) - 1
    if scheme is not None and scheme.sizes(corpus).text_tokens > limit:
        console.print(
            f"a suffix array holds {limit:,} tokens: take {type(scheme).__name__}.views without "
            "'body', or fewer passages"
        )


def readable(size: float) -> str:
    """Bytes in words; blank for none."""
    if not size:
        return ""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
