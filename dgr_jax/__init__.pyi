from dgr_jax.config.builder import GenerativeRetriever as GenerativeRetriever
from dgr_jax.retrieval.retriever import Retriever as Retriever

__version__: str
