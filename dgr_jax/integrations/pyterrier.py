"""A retriever in PyTerrier: `DgrRetriever("MODEL_DIR") % 10 >> ...` (extra `pyterrier`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dgr_jax.integrations import answers
from dgr_jax.retrieval.retriever import Retriever

try:
    import pandas as pd
    import pyterrier as pt
except ImportError:
    raise answers.missing("PyTerrier", "pyterrier") from None


class DgrRetriever(pt.Transformer):
    """Retrieves for frames of qid and query; where these have docno too, it re-ranks just those, by
    the log-probability of their identifiers. Ranks begin with 0.

    source: a MODEL_DIR, or a Retriever. num_results: passages of a query at most; None: the depth
    of the retriever. text: whether results have the columns title and text. settings: of
    `Retriever.load`.
    """

    def __init__(
        self,
        source: Retriever | str | Path,
        *,
        num_results: int | None = None,
        text: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        answers.check_k("num_results", num_results)
        self.retriever = answers.opened(source, settings)
        self.num_results, self.text = num_results, text

    def transform(self, inp: pd.DataFrame) -> pd.DataFrame:
        """The columns of the frame with docno, docid, score and rank."""
        with pt.validate.any(inp, context=self) as valid:
            valid.result_frame(extra_columns=["query"], mode="rerank")
            valid.query_frame(extra_columns=["query"], mode="retrieve")
        queries = dict(zip(inp["qid"].astype(str), inp["query"].astype(str), strict=True))
        if valid.mode == "rerank":
            grouped = inp["docno"].astype(str).groupby(inp["qid"].astype(str), sort=False)
            run = answers.reranked(self.retriever, queries, dict(grouped.agg(list)))
            keys = ["qid", "docno"]
        else:
            run, keys = answers.run(self.retriever, queries, self.num_results), ["qid"]
        store = self.retriever.store
        found = pd.DataFrame(
            (
                (qid, passage.pid, store.index_of(passage.pid), passage.score, rank)
                for qid, passages in run.items()
                for rank, passage in enumerate(passages[: self.num_results])
            ),
            columns=["qid", "docno", "docid", "score", "rank"],
        ).astype({"qid": str, "docno": str, "docid": int, "score": float, "rank": int})
        if self.text:
            listed = [store[row] for row in found["docid"]]
            found["title"] = pd.Series([passage.title for passage in listed], dtype=object)
            found["text"] = pd.Series([passage.text for passage in listed], dtype=object)
        given = inp.drop(columns=[c for c in found.columns if c in inp.columns and c not in keys])
        given = given.astype(dict.fromkeys(keys, str)).drop_duplicates(keys)
        return given.merge(found, on=keys, how="right")[
            [*given.columns.union(found.columns, False)]
        ]

    def fuse_rank_cutoff(self, k: int) -> DgrRetriever:
        """`retriever % k` asks for k passages alone; beams stay, as fewer would find others."""
        least = k if self.num_results is None else min(k, self.num_results)
        return DgrRetriever(self.retriever, num_results=least, text=self.text)

    def __repr__(self) -> str:
        return f"DgrRetriever({self.retriever.store.folder}, num_results={self.num_results})"


class DgrArtifact(pt.Artifact):
    """A folder that `Retriever.save` wrote: `pt.Artifact.load(folder).retriever()`; to_hf and
    from_hf publish and fetch it in PyTerrier's own format."""

    ARTIFACT_TYPE = "dgr"
    ARTIFACT_FORMAT = "dgr_jax"

    def retriever(self, **settings: Any) -> DgrRetriever:
        """See DgrRetriever."""
        return DgrRetriever(self.path, **settings)
