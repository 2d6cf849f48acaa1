"""What an experiment reads, writes and holds, stage by stage, before anything starts.

Estimated from the settings and from the number of passages, of their words and of training queries,
which are counted where the corpus lies. This is about disk and index: what the programs need of a
chip is what `dgr_jax.plan` says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
from rich.table import Table

from dgr_jax import display, partitioning
from dgr_jax.capacity.counting import TAKEN, Corpus, counted
from dgr_jax.capacity.sizes import text_size
from dgr_jax.corpora.lines import place
from dgr_jax.experiments.generative import Experiment
from dgr_jax.identifiers.multiview import Multiview
from dgr_jax.identifiers.rq import ResidualQuantization
from dgr_jax.models.t5 import T5Config, Transformer
from dgr_jax.settings import paths

TOKENS_A_WORD = 1.35  # of T5's vocabulary on English text
_CHARACTERS = 6.0  # of a word, its space counted
_SPAN = 4 + 2 + 0.4  # bytes a token of a suffix array: position, token, branches
_INT = 4


class Line(NamedTuple):
    """What a stage leaves: bytes on disk, and whether every device that searches holds it."""

    stage: str
    what: str
    size: float
    on_device: bool = False


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


def lines(experiment: Experiment, corpus: Corpus) -> Iterator[Line]:
    """Everything of some size that an experiment writes."""
    prepare, length = experiment.prepare, _length(experiment, corpus)
    yield Line("prepare", "passages", corpus.passages * corpus.words * _CHARACTERS)
    yield from _identifiers(experiment, corpus)
    examples = _examples(experiment, corpus)
    row = _INT * (prepare.query_length + 3 * length)
    yield Line("prepare", f"{examples:,.0f} examples, as a dataset", examples * row / 3)
    yield Line("prepare", "the same as token arrays", examples * row)
    weights = _parameters(experiment, corpus) * 4.0
    kept = experiment.generate.keep_checkpoints
    yield Line("generate", f"{kept} checkpoints", kept * weights * 1.01)
    yield Line("generate", "parameters", weights, on_device=True)
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
    width = getattr(experiment.teach.lists, "size", 0) or experiment.teach.lists.negatives + 1
    names = experiment.candidates.keys if many else 1
    size = lists * width * names * _INT * (length + (7 if many else 1))
    yield Line("teach", f"{lists:,} rank lists of {width}", size)
    kept = experiment.distill.keep_checkpoints
    yield Line("distill", f"{kept} checkpoints", kept * weights * 1.01)


def _identifiers(experiment: Experiment, corpus: Corpus) -> Iterator[Line]:
    scheme = experiment.prepare.identifiers
    if not _is_multiview(experiment):
        length = _length(experiment, corpus)
        table = corpus.passages * (_INT * length + 16.0)
        yield Line("prepare", "identifiers", table)
        yield Line("prepare", "their trie", corpus.passages * length * 1.2, on_device=True)
        return
    if "title" in scheme.views:
        rows = corpus.passages
        yield Line("prepare", "titles", rows * (_INT * (scheme.title_tokens + 2) + 16.0))
        yield Line("prepare", "their trie", rows * 8.0 * 1.6, on_device=True)
    if "query" in scheme.views:
        rows = corpus.passages * corpus.pseudo_queries
        table = rows * (_INT * (scheme.query_tokens + 2) + 16.0)
        yield Line("prepare", f"{rows:,.0f} pseudo-queries", table)
        yield Line("prepare", "their trie", rows * 12.0 * 1.6, on_device=True)
    if "body" in scheme.views:
        text = _tokens(corpus) * _SPAN + corpus.passages * 4.0
        yield Line(
            "prepare", f"suffix array of {_tokens(corpus):,.0f} tokens", text, on_device=True
        )


def _tokens(corpus: Corpus) -> float:
    """Tokens of the text of all passages."""
    return corpus.passages * corpus.words * TOKENS_A_WORD


def _is_multiview(experiment: Experiment) -> bool:
    return isinstance(experiment.prepare.identifiers, Multiview)


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


def _texts(experiment: Experiment, corpus: Corpus) -> dict[str, float]:
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
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    leaves = jax.tree.leaves(partitioning.abstract_params(Transformer(config), mesh))
    return sum(leaf.size for leaf in leaves)


def show(experiment: Experiment, corpus: Corpus | None) -> None:
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
        size = _readable(line.size)
        table.add_row(line.stage, line.what, size, size if line.on_device else "")
    device = sum(line.size for line in found if line.on_device)
    table.add_row("", "together", _readable(sum(x.size for x in found)), _readable(device))
    console.print(table)
    limit = (1 << 31) - 1
    scheme = experiment.prepare.identifiers
    if _is_multiview(experiment) and "body" in scheme.views and _tokens(corpus) > limit:
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
