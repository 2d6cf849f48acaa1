"""SeqIO tasks of any folder in BEIR layout.

beir_labelled, beir_passages, beir_pseudo_queries: text -> identifier, those in use;
beir_generation: their mixture; beir_rank_lists: query -> teacher's rank list.
"""

from dgr_jax.data import tasks


def register(prepared: tasks.Prepared) -> None:
    """Add the tasks of a prepared collection to SeqIO's registries."""
    tasks.register("beir", prepared)
