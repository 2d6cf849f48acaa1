"""A retriever in MTEB: `mteb.evaluate(MtebSearch("MODEL_DIR"), tasks)` (extra `mteb`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dgr_jax.integrations import answers
from dgr_jax.retrieval.retriever import Retriever

_KINDS = {"Searcher": ["dense"], "Bm25System": ["sparse"]}  # others are of no kind that MTEB has


class MtebSearch:
    """MTEB's SearchProtocol. The corpus of every task and split must be that of the index.

    name, revision: how results are filed; give each trained retriever a name of its own.
    training_datasets: MTEB tasks that it was trained on, for MTEB's zero-shot marks; None: not
    said. settings: of `Retriever.load`.
    """

    def __init__(
        self,
        source: Retriever | str | Path,
        *,
        name: str = "dgr_jax/retriever",
        revision: str | None = None,
        training_datasets: Iterable[str] | None = None,
        **settings: Any,
    ) -> None:
        self.retriever = answers.opened(source, settings)
        self.name, self.revision = name, revision
        self.training_datasets = None if training_datasets is None else set(training_datasets)

    def index(self, corpus: Iterable[Mapping[str, Any]], **ignored: Any) -> None:
        """Nothing is made: raises ValueError where the corpus is not that of the index."""
        column = getattr(corpus, "column_names", None)
        pids = corpus["id"] if column else (row["id"] for row in corpus)  # type: ignore[index]
        answers.check_corpus(self.retriever, pids, "MtebSearch")

    def search(
        self,
        queries: Iterable[Mapping[str, Any]],
        *,
        top_k: int,
        top_ranked: Mapping[str, Sequence[str]] | None = None,
        **ignored: Any,
    ) -> dict[str, dict[str, float]]:
        """qid -> pid -> score; of `top_ranked` just these passages, by their identifiers."""
        answers.check_k("top_k", top_k)
        asked = {row["id"]: row["text"] for row in queries}
        if top_ranked is None:
            run = answers.run(self.retriever, asked, top_k)
        else:
            run = answers.reranked(self.retriever, asked, top_ranked)
        return {qid: {p.pid: p.score for p in run.get(qid, ())[:top_k]} for qid in asked}

    @property
    def mteb_model_meta(self) -> Any:
        """What MTEB files results under, and says of the model; None of what is not known."""
        try:
            from mteb.models import ModelMeta
        except ImportError:
            raise answers.missing("MTEB", "mteb") from None
        system = self.retriever.decoder
        parameters = system.describe().get("parameters")
        return ModelMeta(
            loader=None,
            name=self.name,
            revision=self.revision,
            release_date=None,
            languages=None,
            n_parameters=parameters,
            memory_usage_mb=None if parameters is None else parameters * 4 / 2**20,
            max_tokens=system.query_length or None,
            embed_dim=None,
            license=None,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=["JAX"],
            similarity_fn_name=None,
            use_instructions=False,
            training_datasets=self.training_datasets,
            model_type=_KINDS.get(type(system).__name__, []),
        )
