"""A small prepared collection with identifiers of several views, and what a student found in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dgr_jax.corpora import store
from dgr_jax.corpora.types import Passage
from dgr_jax.data import rank_lists
from dgr_jax.data.vocabulary import VIEWS, SentencePiece, Vocabulary
from dgr_jax.decoding.passage_scoring import Scoring
from dgr_jax.experiments.generative import Prepare
from dgr_jax.identifiers.multiview import Multiview
from dgr_jax.retrieval.multiview.index import MultiviewIndex, Written
from dgr_jax.retrieval.multiview.keys import Keyed, keys
from dgr_jax.retrieval.multiview.view_indexes import ViewIndexes
from dgr_jax.stages import identifiers

PASSAGES = [
    Passage("p0", "Bees make honey in the hive. They dance to show the way to flowers.", "Bees"),
    Passage("p1", "A glacier is a slow river of ice. It carves valleys as it moves.", "Glaciers"),
    Passage("p2", "Owls fly in silence. Their soft feathers break up the sound of wings.", "Owls"),
    Passage("p3", "", "Empty"),
    Passage("p4", "Honey.", ""),
]
TEXTS = ["how do bees make honey", "what is a glacier", "why are owls quiet"]
SCORING = Scoring(smoothing=1e-3, common=50, max_passages=8)
SPAN = 4


def prepare(folder: Path, views: tuple[str, ...] = VIEWS):
    """(vocabulary, indexes, store) of a prepared collection of several views."""
    passages = store.write(PASSAGES, folder / "passages")
    SentencePiece(size=90).write(folder, [p.contents for p in PASSAGES] + TEXTS)
    settings = Prepare(
        tasks="beir", identifiers=Multiview(views, span_tokens=SPAN, query_tokens=12)
    )
    found = identifiers.build(settings, folder, passages, ())
    vocabulary = Vocabulary.load(folder)
    assert found.vocabulary == vocabulary
    return vocabulary, ViewIndexes.load(folder, vocabulary), passages, found


def spans_of(text, random):
    """Spans of the text, none twice for a query."""
    starts, tokens = text.starts, text.tokens
    spans = np.zeros((len(TEXTS), 6, SPAN), np.int32)
    for query, span in np.ndindex(len(TEXTS), 6):
        at, length = starts[query] + random.integers(8), random.integers(1, SPAN + 1)
        spans[query, span, :length] = tokens[at : at + length]
    for query in range(len(TEXTS)):  # none of a view twice
        _, first = np.unique(spans[query], axis=0, return_index=True)
        spans[query, np.setdiff1d(np.arange(6), first)] = 0
    lengths = (spans > 0).sum(-1)
    lo, hi = text.find(spans, lengths)
    hi = np.where(lengths > 0, hi, lo)
    log_probs = np.where(lengths > 0, -random.uniform(0.5, 9, lengths.shape), -np.inf)
    return Written("body", spans, log_probs.astype(np.float32), lo, hi)


def found_by(vocabulary, indexes, scoring=SCORING):
    """Scored passages of TEXTS, written with made-up log-probabilities."""
    random = np.random.default_rng(0)
    parts = [] if indexes.text is None else [spans_of(indexes.text, random)]
    for view, table in indexes.tables.items():
        rows = np.stack([random.permutation(len(table))[:2] for _ in TEXTS])
        known = -random.uniform(0.5, 9, rows.shape).astype(np.float32)
        bounds = table.offsets[rows], table.offsets[rows + 1]
        parts.append(Written(view, np.asarray(table.tokens)[rows], known, *bounds))
    special = (1, *indexes.markers.values())
    index = MultiviewIndex(
        indexes.text, indexes.tables, scoring, special, num_tokens=indexes.num_tokens
    )
    return index.rank(parts)


def keyed(found, indexes, limit=24, depth=4):
    held = keys(found, depth=depth, limit=limit, identifiers=12, length=indexes.length)
    passages = np.full((len(found), depth), -1, np.int32)
    for query, one in enumerate(found):
        passages[query, : len(one.passages)] = one.passages[:depth]
    views = indexes.views
    return Keyed(held, passages, indexes.text, indexes.tables, views, seed=3)


def log_probs_of(named, found, rows):
    """f32 [n, L, K, T]: what the student gave each identifier, at its first token."""
    values = np.zeros(named.tokens.shape, np.float32)
    for i, row in enumerate(rows):
        query = found[row].query
        known = {
            (view, tuple(tokens[tokens > 0])): value
            for view, tokens, value in zip(query.views, query.tokens, query.log_probs, strict=True)
        }
        for place in np.argwhere(named.tokens[i].any(-1)):
            tokens = named.tokens[(i, *place)]
            values[(i, *place, 0)] = known[named.views[(i, *place)], tuple(tokens[tokens > 0])]
    return values


def lists_of(vocabulary, indexes, named, **more):
    scores = np.arange(named.tokens.shape[1], 0, -1, dtype=np.float32)
    return rank_lists.view_features(
        TEXTS,
        named,
        np.tile(scores, (len(TEXTS), 1)),
        np.zeros(len(TEXTS), np.int32),
        indexes.num_tokens,
        vocabulary=vocabulary,
        query_length=16,
        **more,
    )
