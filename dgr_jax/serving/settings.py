"""Settings of the service: what it admits, and how long it waits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from dgr_jax import ranges


def _setting(default: Any, help: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Service:
    """Each is a flag of `python -m dgr_jax.serve` of the same name."""

    batch_size: int = _setting(32, "queries that are decoded together, at most")
    patience_ms: float = _setting(
        2.0, "milliseconds that a query waits for as many as came before, at most"
    )
    waiting: int = _setting(
        512, "queries that may wait; a request beyond them is told to try later"
    )
    deadline_s: float = _setting(10.0, "seconds within which a request is answered, or given up")
    body_bytes: int = _setting(1 << 20, "bytes of a request's body, at most")
    body_s: float = _setting(
        10.0, "seconds within which the headers of a request must arrive, and its body"
    )
    query_length: int = _setting(1000, "characters of a query, at most")
    most_queries: int = _setting(64, "queries of a request, at most")
    most_k: int = _setting(100, "passages of a query, at most")
    drain_s: float = _setting(30.0, "seconds that SIGTERM leaves to requests which are there")
    watch_s: float = _setting(2.0, "seconds between two looks for a new version in MODEL_DIR")
    log_queries: bool = _setting(False, "write a log line for each request, with its queries")

    def __post_init__(self) -> None:
        counts = ("batch_size", "waiting", "body_bytes", "query_length", "most_queries", "most_k")
        ranges.check(
            self,
            **dict.fromkeys(counts, ranges.at_least(1)),
            **dict.fromkeys(("deadline_s", "body_s", "watch_s"), ranges.above(0)),
            patience_ms=ranges.at_least(0),
            drain_s=ranges.at_least(0),
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """What the number of queries that are decoded together is padded to: 1, 2, 4 ... and
        `batch_size`."""
        powers = (1 << power for power in range(self.batch_size.bit_length()))
        return tuple(sorted({*powers, self.batch_size}))
