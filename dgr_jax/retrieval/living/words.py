"""What words count by BM25: the postings that are kept of a lexical plan."""

from __future__ import annotations

from dgr_jax.corpora.store import PassageStore
from dgr_jax.model_dir import kept
from dgr_jax.retrieval.bm25 import Bm25
from dgr_jax.retrieval.kept_postings import PLANS, KeptPostings
from dgr_jax.retrieval.living.change import Change
from dgr_jax.settings import restored


def write(change: Change) -> None:
    """Writes the postings of a version, by the settings of each that are kept in the one before.

    What words count stays as it was, until it is renewed; where an older version kept postings, of
    which that cannot be known, it is renewed now. Where training queries count and were not kept
    with the passages, as in a published folder, it stays.
    """
    for folder in sorted((change.old / PLANS).glob("lexical-*")):
        header = kept.read_json(folder / "header.json")
        said = header.get("bm25")
        target = change.new / PLANS / folder.name
        if said is None:
            continue  # whoever opens the plan makes it
        bm25 = restored(Bm25, said)
        store = PassageStore(change.new / "passages")
        queries = {} if not bm25.queries_weight else store.queries
        renew = change.renew and queries is not None
        held = None if renew else KeptPostings.load(folder, change.store.pids)
        if held is None or held.mean_words is None:
            held = bm25.fit(store).kept()
        else:
            added = bm25.counts(change.added, queries or {})
            held = held.changed(bm25, change.stay, added)
        held.save(target, bm25, store.pids)
