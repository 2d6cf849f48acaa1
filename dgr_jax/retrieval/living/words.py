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
    which that cannot be known, it is renewed now.
    """
    for folder in sorted((change.old / PLANS).glob("lexical-*")):
        header = kept.read_json(folder / "header.json")
        said = header.get("bm25")
        target = change.new / PLANS / folder.name
        if said is None:
            continue  # whoever opens the plan makes it
        bm25 = restored(Bm25, said)
        held = None if change.renew else KeptPostings.load(folder, change.store.pids)
        store = PassageStore(change.new / "passages")
        if held is None or held.mean_words is None:
            held = bm25.fit(store).kept()
        else:
            texts = [passage.contents for passage in change.added]
            held = held.changed(bm25, change.stay, texts)
        held.save(target, bm25, store.pids)
