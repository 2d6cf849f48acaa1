"""SeqIO tasks of MS MARCO passage ranking.

msmarco_labelled, msmarco_passages, msmarco_pseudo_queries: text -> identifier, those in use;
msmarco_generation: their mixture; msmarco_rank_lists: query -> teacher's rank list.
"""

from dgr_jax.data import tasks


def register(prepared: tasks.Prepared) -> None:
    """Add the tasks of a prepared collection to SeqIO's registries."""
    tasks.register("msmarco", prepared)
