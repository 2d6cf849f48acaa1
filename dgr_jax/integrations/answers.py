"""What the retrievers of all toolkits share: how one is opened, asked, and refuses a corpus."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dgr_jax.corpora import words
from dgr_jax.corpora.types import ScoredPassage
from dgr_jax.retrieval.retriever import Hit, Retriever


def missing(package: str, extra: str) -> ImportError:
    """The error of a toolkit that is not installed."""
    install = f"pip install 'dgr_jax[{extra}]'"
    return ImportError(f"dgr_jax.integrations.{extra} needs {package}: {install}")


def opened(source: Retriever | str | Path, settings: Mapping[str, Any]) -> Retriever:
    """A retriever, or that of a MODEL_DIR with settings of `Retriever.load`."""
    if not isinstance(source, (str, Path)):
        if settings:
            raise ValueError(
                f"{', '.join(settings)}: got settings with a retriever, expected them where it was "
                "loaded"
            )
        return source
    return Retriever.load(source, **settings)


def check_k(setting: str, k: int | None) -> None:
    """Raises ValueError for a number of passages that is no whole number of at least 1."""
    if k is not None and (isinstance(k, bool) or not isinstance(k, int) or k < 1):
        raise ValueError(f"{setting}: got {k!r}, expected a whole number of at least 1, or None")


def run(
    retriever: Retriever, queries: Mapping[str, str], k: int | None
) -> dict[str, list[ScoredPassage]]:
    """qid -> its best k passages, at most as many as the depth of the retriever; scores fall
    strictly, so that a tool which sorts by them keeps the order."""
    if not queries:
        return {}
    return {qid: passages[:k] for qid, passages in retriever.run(dict(queries)).items()}


def reranked(
    retriever: Retriever, queries: Mapping[str, str], pids: Mapping[str, Iterable[str]]
) -> dict[str, list[ScoredPassage]]:
    """qid -> its given pids, best first by the student; a query without pids has none."""
    listed = {qid: [ScoredPassage(pid, 0.0) for pid in dict.fromkeys(pids[qid])] for qid in pids}
    asked = {qid: text for qid, text in queries.items() if listed.get(qid)}
    return retriever.rerank(asked, listed) if asked else {}


def hits(retriever: Retriever, query: str, k: int) -> list[Hit]:
    """The best k passages of a question with their texts, or as many as can be found; none for a
    blank one."""
    k = min(k, retriever.decoder.most_passages)
    return retriever.search([query], k=k)[0] if words.visible(query) else []


def check_corpus(retriever: Retriever, pids: Iterable[str], tool: str) -> None:
    """Raises ValueError where a tool gives another corpus than that of the index."""
    given, store = set(pids), retriever.store
    unknown = [pid for pid in given if pid not in store]
    lacking = len(store) - len(given) + len(unknown)
    if unknown or lacking:
        example = f", such as {min(unknown)!r}," if unknown else ""
        raise ValueError(
            f"{tool}: got a corpus of {len(given):,} passages, of which {len(unknown):,}{example} "
            f"are not in the index, and {lacking:,} of the index's {len(store):,} are missing; "
            "expected the corpus that the retriever was trained on"
        )
