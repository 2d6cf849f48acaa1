"""What an experiment reads, writes and holds, stage by stage, before anything starts.

Estimated from the settings and from the number of passages, of their words and of training queries,
which are counted where the corpus lies. This is about disk and index: what the programs need of a
chip is what `dgr_jax.plan` says.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
from rich.table import Table

from dgr_jax import display, partitioning
from dgr_jax.capacity.counting import TAKEN, Corpus, counted
from dgr_jax.capacity.dense import vocabulary_size
from dgr_jax.capacity.programs import list_size
from dgr_jax.capacity.sizes import text_size
from dgr_jax.corpora.lines import place
from dgr_jax.experiments.dense import DenseExperiment, Negatives
from dgr_jax.experiments.generative import Experiment
from dgr_jax.identifiers.multiview import Multiview
from dgr_jax.identifiers.rq import ResidualQuantization
from dgr_jax.models.dual_encoder import DualEncoder
from dgr_jax.models.t5 import T5Config, Transformer
from dgr_jax.retrieval import exact_search
from dgr_jax.settings import paths

TOKENS_A_WORD = 1.35  # of T5's vocabulary on English text
_CHARACTERS = 6.0  # of a word, its space counted
_SPAN = 4 + 2 + 0.4  # bytes a token of a suffix array: position, token, branches
_INT = 4


class Line(NamedTuple):
    """What a stage leaves: bytes on disk, and those that a device that searches holds of it."""

    stage: str
    what: str
    size: float
    on_device: float = 0.0


def given(text: str) -> Corpus:
    """'8.8e6,55,5e5,20': passages, words of each, training queries, pseudo-queries a passage.

    Raises ValueError for anything else.
    """
    try:
        passages, words, queries, pseudo = map(float, text.split(","))
        if min(passages, words, queries) < 1 or pseudo < 0:
            raise ValueError
    except ValueError:
        raise ValueError(
            f"--corpus: got {text!r}, expected PASSAGES,WORDS,QUERIES,PSEUDO: 8.8e6,55,5e5,20"
        ) from None
    return Corpus(int(passages), words, int(queries), pseudo)


def lines(experiment: Experiment | DenseExperiment, corpus: Corpus) -> Iterator[Line]:
    """Everything of some size that an experiment writes."""
    if isinstance(experiment, DenseExperiment):
        return _of_vectors(experiment, corpus)
    return _of_identifiers(experiment, corpus)


def _of_vectors(experiment: DenseExperiment, corpus: Corpus) -> Iterator[Line]:
    """Those of a dense retriever."""
    prepare, texts = experiment.prepare, _texts(experiment, corpus)
    texts["labelled"] = corpus.queries
    queries = round(sum(texts[name] for name in prepare.sources.rates()))
    positives = -(-corpus.pairs // max(1, corpus.queries))
    yield Line("prepare", "passages", corpus.passages * corpus.words * _CHARACTERS)
    tokens = corpus.passages * prepare.passage_length
    yield Line("prepare", "passages as token arrays", _INT * tokens)
    row = _INT * (prepare.query_length + 2 * positives + 1)
    yield Line("prepare", f"{queries:,} queries as token arrays", queries * row)
    if "negatives" in experiment.stages:
        yield _pools("negatives", experiment.negatives, queries)
    if experiment.teach is not None:
        width = list_size(experiment.teach.lists)
        size = queries * (row + 2 * _INT * width)
        yield Line("teach", f"{queries:,} rank lists of {width}", size)
    t5 = dataclasses.replace(experiment.model.t5, vocab_size=vocabulary_size(experiment))
    weights = 4.0 * _size(DualEncoder(dataclasses.replace(experiment.model, t5=t5)))
    search, dim = experiment.evaluate.search.index, experiment.model.dim
    for stage, training in experiment.training(experiment.systems[-1]).items():
        if stage == "refresh":
            yield _pools("mine", experiment.mined, queries)
        kept = training.keep_checkpoints
        yield Line(stage, f"{kept} checkpoints", kept * weights * 1.01)
        yield Line(stage, f"vectors of {dim} float32", 4.0 * corpus.passages * dim)
    index = exact_search.Plan.of(corpus.passages, dim, search, 1)
    parts = f", 2 of {index.blocks} parts at once" if index.blocks > 1 else ""
    yield Line("evaluate", "parameters", 0, weights)
    yield Line("evaluate", f"vectors in {search.storage}{parts}", 0, index.device_bytes)


def _pools(stage: str, negatives: Negatives, queries: int) -> Line:
    """Passages to draw the negatives of each query from."""
    depth = negatives.depth
    return Line(stage, f"{depth} passages of {queries:,} queries", queries * depth * _INT)


def _of_identifiers(experiment: Experiment, corpus: Corpus) -> Iterator[Line]:
    """Those of a student that writes identifiers."""
    prepare, length = experiment.prepare, _length(experiment, corpus)
    yield Line("prepare", "passages", corpus.passages * corpus.words * _CHARACTERS)
    yield from _identifiers(experiment, corpus)
    examples = _examples(experiment, corpus)
    row = _INT * (prepare.query_length + 3 * length)
    yield Line("prepare", f"{examples:,.0f} examples, as a dataset", examples * row / 3)
    yield Line("prepare", "the same as token arrays", examples * row)
    weights = _parameters(experiment, corpus) * 4.0
    kept = experiment.generate.checkpoints
    yield Line("generate", f"{kept} checkpoints", kept * weights * 1.01)
    yield Line("generate", "parameters", weights, weights)
    depth, many = experiment.candidates.search.depth, _is_multiview(experiment)
    asked = _asked(experiment, corpus)
    yield Line("candidates", f"{depth} passages of {asked:,} queries", asked * depth * 8.0)
    if many:
        keys = experiment.candidates.keys
        beams = experiment.candidates.search.num_beams
        scheme = prepare.identifiers
        written = beams * sum(scheme.span_tokens if v == "body" else 1 for v in scheme.views)
        size = asked * (depth * keys * 2.0 + written * (_INT * length + 5.0))
        yield Line("candidates", f"their {keys} best identifiers each", size)
    lists = asked * (2 if hasattr(experiment.teach.lists, "negatives") else 1)
    width = list_size(experiment.teach.lists)
    names = experiment.candidates.keys if many else 1
    size = lists * width * names * _INT * (length + (7 if many else 1))
    yield Line("teach", f"{lists:,} rank lists of {width}", size)
    kept = experiment.distill.checkpoints
    yield Line("distill", f"{kept} checkpoints", kept * weights * 1.01)


def _identifiers(experiment: Experiment, corpus: Corpus) -> Iterator[Line]:
    scheme = experiment.prepare.identifiers
    if not _is_multiview(experiment):
        length = _length(experiment, corpus)
        table = corpus.passages * (_INT * length + 16.0)
        yield Line("prepare", "identifiers", table)
        trie = corpus.passages * length * 1.2
        yield Line("prepare", "their trie", trie, trie)
        return
    if "title" in scheme.views:
        rows = corpus.passages
        yield Line("prepare", "titles", rows * (_INT * (scheme.title_tokens + 2) + 16.0))
        yield Line("prepare", "their trie", rows * 8.0 * 1.6, rows * 8.0 * 1.6)
    if "query" in scheme.views:
        rows = corpus.passages * corpus.pseudo_queries
        table = rows * (_INT * (scheme.query_tokens + 2) + 16.0)
        yield Line("prepare", f"{rows:,.0f} pseudo-queries", table)
        yield Line("prepare", "their trie", rows * 12.0 * 1.6, rows * 12.0 * 1.6)
    if "body" in scheme.views:
        text = _tokens(corpus) * _SPAN + corpus.passages * 4.0
        yield Line("prepare", f"suffix array of {_tokens(corpus):,.0f} tokens", text, text)


def _tokens(corpus: Corpus) -> float:
    """Tokens of the text of all passages."""
    return corpus.passages * corpus.words * TOKENS_A_WORD


def _is_multiview(experiment: Experiment | DenseExperiment) -> bool:
    return isinstance(getattr(experiment.prepare, "identifiers", None), Multiview)


def _length(experiment: Experiment, corpus: Corpus) -> int:
    """Tokens of the longest identifier."""
    scheme = experiment.prepare.identifiers
    if _is_multiview(experiment):
        sizes = {
            "title": scheme.title_tokens + 2,
            "body": scheme.span_tokens,
            "query": scheme.query_tokens + 2,
        }
        return max(sizes[view] for view in scheme.views)
    if isinstance(scheme, ResidualQuantization):
        return scheme.sized(corpus.passages).num_codes + 1
    return max(2, math.ceil(math.log10(corpus.passages)) + 1)


def _asked(experiment: Experiment, corpus: Corpus) -> int:
    """Texts that the student retrieves candidates for."""
    settings, texts = experiment.candidates, _texts(experiment, corpus)
    texts["labelled"] = corpus.queries
    most = settings.max_queries or math.inf
    return round(sum(min(most, texts[source]) for source in settings.sources))


def _examples(experiment: Experiment, corpus: Corpus) -> float:
    """Examples of all sources."""
    texts, of_each = _texts(experiment, corpus), 1
    if _is_multiview(experiment):
        mixture = experiment.prepare.mixture
        of_each = sum(mixture.of(view) for view in experiment.prepare.identifiers.views)
    return sum(texts[name] for name in experiment.prepare.sources.rates()) * of_each


def _texts(experiment: Experiment | DenseExperiment, corpus: Corpus) -> dict[str, float]:
    """Pairs of a text and a passage, by source."""
    sources = experiment.prepare.sources
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


def _parameters(experiment: Experiment, corpus: Corpus) -> int:
    config = experiment.model
    if not config.vocab_size:
        text = text_size(experiment.prepare.vocabulary)
        scheme, codes = experiment.prepare.identifiers, 0
        if isinstance(scheme, ResidualQuantization):
            scheme = scheme.sized(corpus.passages)
            codes = scheme.num_codes * scheme.codebook_size
        size = text + -(-max(codes, 128) // 128) * 128
        config = T5Config(**{**vars(config), "vocab_size": size})
    return _size(Transformer(config))


def _size(model: Transformer | DualEncoder) -> int:
    """Numbers in the parameters of a model."""
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    return sum(leaf.size for leaf in jax.tree.leaves(partitioning.abstract_params(model, mesh)))


def show(experiment: Experiment | DenseExperiment, corpus: Corpus | None) -> None:
    """Prints the files that the collection lacks or has, and the lines, with their sums.

    corpus: None: the one that lies there is counted.
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
    if corpus is None:
        corpus, where = counted(experiment)
        origin = f"as counted in {where}"
        if corpus is None:
            corpus = TAKEN
            origin = f"those of MS MARCO, as {where}: give the collection, or --corpus"
    console.print(
        f"estimated from {corpus.passages:,} passages of {corpus.words:g} words, "
        f"{corpus.queries:,} training queries, {corpus.pseudo_queries:g} pseudo-queries a "
        f"passage, {origin}"
    )
    table = Table("stage", "what", "on disk", "on the device")
    for column in table.columns[2:]:
        column.justify = "right"
    found = list(lines(experiment, corpus))
    for line in found:
        held = _readable(line.on_device) if line.on_device else ""
        table.add_row(line.stage, line.what, _readable(line.size) if line.size else "", held)
    device = sum(line.on_device for line in found)
    table.add_row("", "together", _readable(sum(x.size for x in found)), _readable(device))
    console.print(table)
    limit = (1 << 31) - 1
    has_body = _is_multiview(experiment) and "body" in experiment.prepare.identifiers.views
    if has_body and _tokens(corpus) > limit:
        console.print(
            f"a suffix array holds {limit:,} tokens: take Multiview.views=('title', 'query'), or "
            "fewer passages"
        )


def _readable(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
