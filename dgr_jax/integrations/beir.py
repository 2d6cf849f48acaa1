"""A retriever in BEIR: `EvaluateRetrieval(BeirSearch("MODEL_DIR"))` (extra `beir`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dgr_jax.integrations import answers
from dgr_jax.retrieval.retriever import Retriever


class BeirSearch:
    """The searches that BEIR's EvaluateRetrieval asks for; settings: of `Retriever.load`."""

    def __init__(self, source: Retriever | str | Path, **settings: Any) -> None:
        self.retriever = answers.opened(source, settings)

    def search(
        self,
        corpus: Mapping[str, Any],
        queries: Mapping[str, str],
        top_k: int,
        score_function: str | None = None,
        **ignored: Any,
    ) -> dict[str, dict[str, float]]:
        """qid -> pid -> score of at most top_k passages; the retriever scores by its own function.

        Raises ValueError where the corpus is not that of the index.
        """
        answers.check_k("top_k", top_k)
        answers.check_corpus(self.retriever, corpus, "BeirSearch")
        run = answers.run(self.retriever, queries, top_k)
        return {qid: {p.pid: p.score for p in passages} for qid, passages in run.items()}
