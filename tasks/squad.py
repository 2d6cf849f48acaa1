"""SeqIO tasks of SQuAD paragraphs and questions in a BEIR folder.

squad_labelled, squad_passages, squad_pseudo_queries: text -> identifier, those in use;
squad_generation: their mixture; squad_rank_lists: query -> teacher's rank list.
"""

from dgr_jax.data import tasks


def register(prepared: tasks.Prepared) -> None:
    """Add the tasks of a prepared collection to SeqIO's registries."""
    tasks.register("squad", prepared)
