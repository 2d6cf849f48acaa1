"""A retriever in LlamaIndex: `DgrRetriever("MODEL_DIR", k=5)` (extra `llamaindex`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dgr_jax.integrations import answers
from dgr_jax.retrieval.retriever import Retriever

try:
    from llama_index.core.retrievers import BaseRetriever
    from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
except ImportError:
    raise answers.missing("llama-index-core", "llamaindex") from None


class DgrRetriever(BaseRetriever):
    """Nodes of a question, best first. source: a MODEL_DIR, or a Retriever; settings: of
    `Retriever.load`."""

    def __init__(self, source: Retriever | str | Path, *, k: int = 10, **settings: Any) -> None:
        answers.check_k("k", k)
        self.retriever, self.k = answers.opened(source, settings), k
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return [
            NodeWithScore(
                node=TextNode(id_=hit.pid, text=hit.text, metadata={"title": hit.title}),
                score=hit.score,
            )
            for hit in answers.hits(self.retriever, query_bundle.query_str, self.k)
        ]
