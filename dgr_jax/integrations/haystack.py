"""A retriever in Haystack: `pipeline.add_component("retriever", DgrRetriever("MODEL_DIR"))` (extra
`haystack`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dgr_jax.corpora.types import Passage
from dgr_jax.integrations import answers
from dgr_jax.retrieval.retriever import Retriever

try:
    from haystack import Document, component, default_from_dict, default_to_dict
    from haystack.utils.filters import document_matches_filter
except ImportError:
    raise answers.missing("haystack-ai", "haystack") from None


@component
class DgrRetriever:
    """Documents of a question, best first. source: a MODEL_DIR, or a Retriever; filters: of
    Haystack, over id, content and meta.title; settings: of `Retriever.load`."""

    def __init__(
        self,
        source: Retriever | str | Path,
        top_k: int = 10,
        filters: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        answers.check_k("top_k", top_k)
        self.retriever = answers.opened(source, settings)
        self.source, self.top_k, self.filters, self.settings = source, top_k, filters, settings

    @component.output_types(documents=list[Document])
    def run(
        self, query: str, filters: dict[str, Any] | None = None, top_k: int | None = None
    ) -> dict[str, Any]:
        """{"documents": the best passages}; filters and top_k stand in place of the usual ones."""
        answers.check_k("top_k", top_k)
        retriever, filters = self.retriever, filters or self.filters
        if filters:
            fits = [
                p.pid for p in retriever.store if document_matches_filter(filters, _document(p))
            ]
            if not fits:
                return {"documents": []}
            retriever = retriever.restrict(fits)
        hits = answers.hits(retriever, query, top_k or self.top_k)
        found = [_document(Passage(hit.pid, hit.text, hit.title), hit.score) for hit in hits]
        return {"documents": found}

    def to_dict(self) -> dict[str, Any]:
        """For a pipeline in a file: where the MODEL_DIR lies, and the settings."""
        if not isinstance(self.source, (str, Path)):
            raise ValueError("DgrRetriever: got a Retriever to save, expected one of a MODEL_DIR")
        given = {"source": str(self.source), "top_k": self.top_k, "filters": self.filters}
        return default_to_dict(self, **given, **self.settings)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> DgrRetriever:
        """Of what `to_dict` made."""
        return default_from_dict(cls, data)


def _document(passage: Passage, score: float | None = None) -> Document:
    meta = {"title": passage.title}
    return Document(id=passage.pid, content=passage.text, meta=meta, score=score)
