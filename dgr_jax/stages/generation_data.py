"""Generation examples on disk: TFDS records, and the token arrays that training reads.

Each source of the mixture is made part by part (`dgr_jax.data.examples.parts`), and each part is a
file of records: one after the other, or by as many workers as there are, to the same bytes.
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dgr_jax.corpora.store import PassageStore
from dgr_jax.corpora.types import Qrel, Query
from dgr_jax.data import direct, examples, loading
from dgr_jax.data.examples import Part
from dgr_jax.experiments.dense import DensePrepare
from dgr_jax.experiments.generative import Prepare
from dgr_jax.stages import identifiers, judged
from dgr_jax.stages.identifiers import Identified
from dgr_jax.training import arrays

logger = logging.getLogger(__name__)

_BLOCK = 4096
NAME = "examples"
COPIES = "copies_of_test_queries"
_held = threading.local()


@dataclass(frozen=True)
class Opened:
    """What examples are made of.

    test_queries: `normalised`; no pseudo-query may copy them. counts: how much is left out and
    cut; they are filled while examples are made, see `by_source`.
    """

    passages: PassageStore
    identified: Identified
    queries: Mapping[str, Query]
    qrels: Sequence[Qrel]
    test_queries: frozenset[str] = frozenset()
    counts: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Work:
    """The examples of the prepare stage in `folder`, and how they are made."""

    settings: Prepare
    folder: Path

    def parts(self, source: str, opened: Opened) -> list[Part]:
        return examples.parts(
            source,
            self.settings.sources,
            num_passages=len(opened.passages),
            num_qrels=len(opened.qrels),
        )

    def blocks(self, part: Part, opened: Opened, writer: Any) -> Iterator[arrays.Features]:
        """Token arrays of a part, [n <= 4096, ...] a block; its records go to `writer`."""
        settings, identified = self.settings, opened.identified
        pairs = source_pairs(
            settings, part.source, opened.passages, opened.queries, opened.qrels, part,
            test_queries=opened.test_queries, counts=opened.counts,
        )  # fmt: skip
        stream = identified.examples(pairs, part.place)
        while held := list(itertools.islice(stream, _BLOCK)):
            writer.add(held)
            counts: Counter[str] = Counter()
            features = examples.features(
                held, identified.vocabulary, settings.query_length, identified.length, counts
            )
            opened.counts.update({f"{part.source} {name}": n for name, n in counts.items()})
            yield features

    def write_part(self, part: Part) -> None:
        """Writes records and arrays of a part apart from all others, its record of work last.

        Opens what earlier parts of the stage wrote: where this runs, `folder` must be seen.
        """
        prepared = loading.prepared()
        opened = reopened(self)
        place = self._place(part)
        writer = prepared.ShardWriter(place.with_suffix(".tfrecord"))
        opened.identified.drawn.clear()
        opened.counts.clear()
        blocks = self.blocks(part, opened, writer)
        if (first := next(blocks, None)) is not None:
            arrays.write_arrays(place, itertools.chain([first], blocks))
        writer.close()
        done = {"shard": writer.shard, "drawn": opened.identified.drawn, "counts": opened.counts}
        place.with_suffix(".json").write_text(json.dumps(done), encoding="utf-8")

    def _place(self, part: Part) -> Path:
        return self.folder / "parts" / f"{part.source}-{part.place:05d}"

    def _shard(self, source: str, index: int) -> Path:
        return direct.shard_path(self.folder / "tfds", NAME, source, index)

    def stream(self, source: str, opened: Opened, shards: list) -> Iterator[arrays.Features]:
        """Token arrays of a source; its records are written on the way, and `shards` filled."""
        prepared = loading.prepared()
        for part in self.parts(source, opened):
            path = self._shard(source, len(shards))
            writer = prepared.ShardWriter(path)
            yield from self.blocks(part, opened, writer)
            writer.close()
            if writer.shard.examples:
                shards.append(writer.shard)
            else:
                path.unlink(missing_ok=True)

    def gather(self, source: str, opened: Opened, shards: list) -> Iterator[arrays.Features]:
        """The same from what `write_part` wrote of each part."""
        for part in self.parts(source, opened):
            place = self._place(part)
            done = json.loads(place.with_suffix(".json").read_text(encoding="utf-8"))
            opened.identified.drawn.update(done["drawn"])
            opened.counts.update(done["counts"])
            shard = direct.Shard(*done["shard"])
            if not shard.examples:
                continue
            path = self._shard(source, len(shards))
            if (records := place.with_suffix(".tfrecord")).exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                records.replace(path)
            shards.append(shard)
            columns = arrays.read_arrays(place)
            for start in range(0, shard.examples, _BLOCK):
                yield {name: rows[start : start + _BLOCK] for name, rows in columns.items()}
            shutil.rmtree(place)


def write(
    work: Work, opened: Opened, everywhere: Callable[[Work, Iterable[Part]], None] | None = None
) -> dict[str, int]:
    """Writes the TFDS dataset and token arrays of every source in use; -> examples of each.

    everywhere: calls Work.write_part on every part, on this machine or others.
    """
    prepared = loading.prepared()
    sources = list(work.settings.sources.rates())
    read = work.stream
    if everywhere is not None:
        (work.folder / "parts").mkdir(exist_ok=True)
        vars(_held).clear()  # left by an earlier run, where workers are threads
        everywhere(work, [part for source in sources for part in work.parts(source, opened)])
        read = work.gather
    shards: dict[str, list] = {}
    for source in sources:
        blocks = read(source, opened, shards.setdefault(source, []))
        first = list(itertools.islice(blocks, 1))
        require_examples({source: bool(first)})
        arrays.write_arrays(work.folder / "arrays" / source, itertools.chain(first, blocks))
    features = prepared.features(views=bool(opened.identified.vocabulary.views))
    prepared.describe(work.folder / "tfds", NAME, shards, features)
    shutil.rmtree(work.folder / "parts", ignore_errors=True)
    return {source: sum(shard.examples for shard in of) for source, of in shards.items()}


def by_source(counts: Counter[str], names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Turns counts by "source name" into source -> name -> count."""
    grouped: dict[str, dict[str, int]] = {}
    for key in counts:
        source, _, name = key.partition(" ")
        if name in names:
            grouped.setdefault(source, dict.fromkeys(names, 0))[name] = counts[key]
    return grouped


def require_examples(counts: Mapping[str, int]) -> None:
    """Raises ValueError for a source without any example."""
    empty = [name for name, count in counts.items() if not count]
    if empty:
        raise ValueError(
            f"source {empty[0]!r} gives no example on this collection; set Sources.{empty[0]} to 0"
        )


def reopened(work: Work) -> Opened:
    """What a worker opens, once for all its parts; each thread for itself."""
    if getattr(_held, "work", None) != work:
        _held.opened, _held.work = _open(work), work
    return _held.opened


def _open(work: Work) -> Opened:
    settings, folder = work.settings, work.folder
    passages = PassageStore(folder / "passages")
    queries: dict[str, Query] = {}
    qrels: list[Qrel] = []
    for split in settings.train_splits:
        queries, qrels = judged.queries(folder, split), judged.qrels(folder, split)
    return Opened(
        passages,
        identifiers.reopened(settings, folder, passages),
        queries,
        qrels,
        judged.test_texts(settings, folder),
    )


def source_pairs(
    settings: Prepare | DensePrepare,
    source: str,
    passages: PassageStore,
    queries: Mapping[str, Query],
    qrels: Sequence[Qrel],
    part: Part | None = None,
    *,
    test_queries: frozenset[str] = frozenset(),
    counts: Counter | None = None,
) -> Iterator[tuple[str, int, str]]:
    """(text, passage index, qid) of a source of the mixture: what examples are made of.

    test_queries, counts: see `examples.pseudo_queries`.
    """
    texts = {query.qid: query.text for query in queries.values()} if source == "labelled" else {}
    return examples.pairs(
        source,
        settings.sources,
        store=passages,
        query_texts=texts,
        qrels=qrels,
        min_relevance=settings.min_relevance,
        part=part,
        test_queries=test_queries,
        counts=counts,
    )
