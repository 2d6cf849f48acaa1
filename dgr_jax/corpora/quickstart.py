"""The collection that comes with the package: short titled passages and questions about them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files

from dgr_jax.corpora.beir import BeirCollection
from dgr_jax.corpora.types import Collection, Passage, Qrel, Query


@dataclass(frozen=True)
class QuickstartCollection(Collection):
    """The embedded BEIR folder, wherever the package is installed."""

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits."""
        return _reader().splits

    def check(self, splits: Iterable[str] = ()) -> None:
        """Raises FileNotFoundError when the package was installed without its data."""
        _reader().check(splits)

    def inputs(self, splits: Iterable[str] = ()) -> dict[str, None]:
        """Empty: a user can change none of the embedded files."""
        return {}

    def passages(self) -> Iterator[Passage]:
        """All passages in corpus order."""
        return _reader().passages()

    def all_queries(self) -> Iterator[Query]:
        """The queries of all splits."""
        return _reader().all_queries()

    def queries(self, split: str) -> Iterator[Query]:
        """The queries of a split."""
        return _reader().queries(split)

    def qrels(self, split: str) -> Iterator[Qrel]:
        """The judgements of a split."""
        return _reader().qrels(split)


def _reader() -> BeirCollection:
    return BeirCollection(str(files("dgr_jax.corpora") / "quickstart_data"))
