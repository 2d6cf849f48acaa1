"""SeqIO tasks of the embedded collection.

quickstart_labelled, quickstart_passages, quickstart_pseudo_queries: text -> identifier;
quickstart_generation: their mixture; quickstart_rank_lists: query -> teacher's rank list.
"""

from dgr_jax.data import tasks


def register(prepared: tasks.Prepared) -> None:
    """Add the tasks of a prepared collection to SeqIO's registries."""
    tasks.register("quickstart", prepared)
