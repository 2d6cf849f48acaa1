"""SeqIO tasks of Natural Questions over Wikipedia passages (DPR).

nq_labelled, nq_passages, nq_pseudo_queries: text -> identifier, those in use;
nq_generation: their mixture; nq_rank_lists: query -> teacher's rank list.
"""

from dgr_jax.data import tasks


def register(prepared: tasks.Prepared) -> None:
    """Add the tasks of a prepared collection to SeqIO's registries."""
    tasks.register("nq", prepared)
