"""What answers queries: the contract of students, dense retrievers, BM25 and sums of systems.

Axis letters: n queries, P passages, D passages that are found for a query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self

import jax
import numpy as np

from dgr_jax import partitioning
from dgr_jax.corpora.ranking import PidOf
from dgr_jax.corpora.store import PassageStore
from dgr_jax.data.vocabulary import Vocabulary
from dgr_jax.retrieval.batching import Found, _pairs
from dgr_jax.retrieval.explanation import Writes

_NO_TOKENS = np.zeros(0, np.int32)


class SystemHit(NamedTuple):
    """A passage, its score, and the tokens of the identifier that found it, none where there is
    none; parts: name -> what the score is the sum of, where it is a sum."""

    passage: int
    score: float
    tokens: np.ndarray = _NO_TOKENS
    parts: Mapping[str, float] = {}


class System(Protocol):
    """What answers queries. It is asked for what `encode` makes of their texts, so that no caller
    need know what a system reads: tokens, words, or both.

    A system of one's own has this class as its base, and gives `limits`, `index_bytes`, `encode` or
    `query_length`, `passages` and `restrict`; the rest is here.
    """

    scores_all: ClassVar[bool] = False  # whether `log_probs` is there
    writes: ClassVar[bool] = False  # whether it writes identifiers, of which beams lose some

    @property
    def query_length(self) -> int:
        """Tokens of a query at most, EOS counted; 0 where it reads no tokens."""
        return 0

    @property
    def batch_size(self) -> int:
        """Queries that are answered together."""
        return 1

    if TYPE_CHECKING:  # for a field of a dataclass, it must not be there

        @property
        def mesh(self) -> jax.sharding.Mesh:
            """The devices that it runs on."""

    @property
    def limits(self) -> dict[str, int]:
        """What bounds the passages of a query, by name: settings, or 'passages' of the corpus."""
        ...

    @property
    def most_passages(self) -> int:
        """Passages that a query can find at most."""
        return min(self.limits.values())

    @property
    def index_bytes(self) -> int:
        """Bytes of what a search reads beside the parameters."""
        ...

    def describe(self) -> dict[str, Any]:
        """Its sizes and settings by name, as JSON, for people."""
        return {}

    def encode(self, vocabulary: Vocabulary, texts: Sequence[str]) -> Any:
        """Queries as the system reads them, of which len() is their number: here their tokens,
        int32 [n, query_length]."""
        return vocabulary.encode_inputs(texts, self.query_length)

    def passages(self, queries: Any) -> Found:
        """What `encode` made -> passage index int32 and score f32 [n, D], best first; free places
        hold -1 and -inf."""
        ...

    def hits(self, queries: Any) -> Iterator[list[SystemHit]]:
        """The passages of each query, with what else is known of them."""
        for passages, scores in zip(*self.passages(queries), strict=True):
            yield [SystemHit(*pair) for pair in _pairs(passages, scores)]

    def passages_of_blocks(self, blocks: Iterable[Any]) -> Iterator[Found]:
        """`passages` of each block of queries, which a generator may encode."""
        return map(self.passages, blocks)

    def may_write(self, queries: Any) -> Writes | None:
        """What may be written for one query that `encode` made, as `explanation` looks at it; None:
        no identifiers are, or they cannot be looked at."""
        return None

    def candidates(self, blocks: Iterable[Any], limit: int) -> Iterator[dict[str, np.ndarray]]:
        """What a teacher is asked to order of each block: passages and scores as of
        `passages_of_blocks`, by name; of passages with many identifiers also the best `limit`."""
        for passages, scores in self.passages_of_blocks(blocks):
            yield {"passages": passages, "scores": scores}

    def log_probs(self, queries: Any) -> Iterator[np.ndarray]:
        """log p(passage | query), f64 [., P], of batches of the queries; -inf for a passage that
        cannot be found. Raises ValueError, as here, of a system that cannot."""
        raise ValueError(f"{type(self).__name__} cannot score all passages")

    def restrict(self, passage_mask: np.ndarray) -> Self:
        """The system that finds only some passages, bool [P], of those that this one finds; nothing
        is compiled again. Raises ValueError for a mask of another shape or dtype, or one that
        leaves nothing."""
        ...

    def pad_to(self, sizes: Sequence[int]) -> None:
        """From now on, the number of queries that `passages` and `hits` get is padded to the least
        of these sizes that is enough, so that few shapes are compiled; where many queries are no
        longer than half of what is read, these are padded to that. Here nothing is padded."""
        return None

    def by_pid(self, pid_of: PidOf) -> Self:
        """The same system, which brings passages of equal score into the order of their pids; here
        one that does so already."""
        return self


def checked_mask(
    passage_mask: np.ndarray, num_passages: int, allowed: np.ndarray | None, owner: str
) -> np.ndarray:
    """bool [P]: what a mask leaves of the allowed passages, None: of all.

    Raises ValueError for a mask of another shape or dtype, or one that leaves nothing.
    """
    mask = np.asarray(passage_mask)
    if mask.dtype != np.bool_ or mask.shape != (num_passages,):
        raise ValueError(
            f"{owner}.restrict: passage_mask must be bool of shape [{num_passages}]; got "
            f"{mask.dtype} of shape {mask.shape}"
        )
    mask = mask if allowed is None else mask & allowed
    if not mask.any():
        raise ValueError(f"{owner}.restrict: passage_mask leaves no passage; expected one True")
    return mask


@dataclass(frozen=True)
class Trained:
    """What a trained system is opened from, beside its parameters.

    folder: of the stage that trained it; prepared: of the prepare stage; model, search: settings.
    """

    folder: Path
    prepared: Path
    vocabulary: Vocabulary
    model: Any
    search: Any
    mesh: jax.sharding.Mesh
    rules: partitioning.Rules


class SearchingSystem(System):
    """A system that searches as settings say.

    sizes: see `pad_to`; none: one query, or a whole batch.
    """

    sizes: tuple[int, ...] = ()

    if TYPE_CHECKING:  # for a field of a dataclass, it must not be there

        @property
        def search(self) -> Any:
            """The settings of its search."""

    @property
    def query_length(self) -> int:
        """Tokens of a query at most, EOS counted."""
        return self.search.query_length

    @property
    def batch_size(self) -> int:
        """Queries that are answered together."""
        return self.search.batch_size

    def pad_to(self, sizes: Sequence[int]) -> None:
        """See System."""
        self.sizes = tuple(sorted(sizes))

    def padded(self, queries: int) -> int:
        """The size of the batches in which so many queries are answered."""
        usual = (1, self.batch_size)
        return next((size for size in self.sizes or usual if size >= queries), self.batch_size)


class TrainedSystem(SearchingSystem):
    """A system with trained parameters. A subclass with a kind, `class Mine(TrainedSystem,
    kind="mine")`, is what experiments of this kind train, and what student.json knows by it."""

    kinds: ClassVar[dict[str, type[TrainedSystem]]] = {}
    model_settings: ClassVar[Any]  # classes of its settings
    search_settings: ClassVar[Any]
    network: ClassVar[Any]  # settings of the model -> flax module
    together: ClassVar[bool] = True  # whether all processes of a run search together

    def __init_subclass__(cls, kind: str = "") -> None:
        super().__init_subclass__()
        if kind:
            TrainedSystem.kinds[kind] = cls

    @classmethod
    def opened(cls, trained: Trained, params: Any) -> Self:
        """The system with these parameters, placed on the mesh."""
        raise NotImplementedError

    def described(self: Any, identifiers: int, length: int) -> dict[str, Any]:
        """What a student says of itself that writes so many identifiers, the longest of `length`
        tokens."""
        return {
            "parameters": sum(leaf.size for leaf in jax.tree.leaves(self.params)),
            "dtype": self.config.dtype,
            "query_length": self.search.query_length,
            "identifier_length": length,
            "identifiers": identifiers,
            "num_beams": self.search.num_beams,
        }


@dataclass(frozen=True)
class Opening:
    """What a system that no stage trains is made of.

    prepared: folder of the prepare stage; store: its passages; depth: passages of a query in a run;
    system: name -> a trained system of the same experiment; keep: whether what is made of the
    passages is kept in `prepared`.
    """

    prepared: Path
    store: PassageStore
    depth: int
    mesh: jax.sharding.Mesh
    rules: partitioning.Rules
    system: Callable[[str], System]
    keep: bool = False


@dataclass(frozen=True)
class SystemSettings:
    """Settings of a system that no stage trains: it is made of the passages, of trained systems, or
    of both. Every subclass is a kind of system, known by its name.

    name: in tables, files, `Evaluate.systems` and `Retriever.load`.
    """

    name: str

    kinds: ClassVar[dict[str, type[SystemSettings]]] = {}
    together: ClassVar[bool] = True  # whether all processes of a run search together
    preferred: ClassVar[bool] = False  # whether it answers where no system is named

    def __init_subclass__(cls) -> None:
        SystemSettings.kinds[cls.__name__] = cls

    @property
    def made_of(self) -> tuple[str, ...]:
        """The trained systems that it opens."""
        return ()

    def asked(self, search: Any) -> tuple[Any, ...]:
        """What of itself, and of the settings of a search, its runs depend on; its name apart."""
        return search, self

    def given(self) -> dict[str, Any]:
        """Name -> value of the settings that whoever opens it may give."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "name"}

    def replaced(self, **settings: Any) -> Self:
        """The same with some of `given` replaced."""
        return replace(self, **settings)

    def open(self, opening: Opening) -> System:
        """The system, ready to be asked."""
        raise NotImplementedError
