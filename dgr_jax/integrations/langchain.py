"""A retriever in LangChain: `DgrRetriever(source="MODEL_DIR", k=5)` (extra `langchain`)."""

from __future__ import annotations

from typing import Any

from dgr_jax.integrations import answers

try:
    from langchain_core.callbacks import CallbackManagerForRetrieverRun
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever
except ImportError:
    raise answers.missing("langchain-core", "langchain") from None


class DgrRetriever(BaseRetriever):
    """Documents of a question, best first. source: a MODEL_DIR, or a Retriever; settings: of
    `Retriever.load`."""

    source: Any
    k: int = 10
    settings: dict[str, Any] = {}

    def model_post_init(self, context: Any) -> None:
        """Opens the retriever."""
        super().model_post_init(context)
        answers.check_k("k", self.k)
        self.source = answers.opened(self.source, self.settings)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun
    ) -> list[Document]:
        return [
            Document(
                id=hit.pid,
                page_content=hit.text,
                metadata={"pid": hit.pid, "title": hit.title, "score": hit.score},
            )
            for hit in answers.hits(self.source, query, self.k)
        ]
