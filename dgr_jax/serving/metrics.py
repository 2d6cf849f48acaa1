"""What a service counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """Counters of one service. waiting: tells how many queries wait now."""

    def __init__(self, waiting: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        of: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter(
            "dgr_jax_requests", "Requests, by path and status.", ["path", "status"], **of
        )
        self.seconds = Histogram(
            "dgr_jax_request_seconds", "Time of a request.", ["path"], buckets=_SECONDS, **of
        )
        self.queries = Counter("dgr_jax_queries", "Queries asked.", ["model", "system"], **of)
        self.batches = Histogram(
            "dgr_jax_batch_size", "Queries answered together.", buckets=_SIZES, **of
        )
        self.versions = Counter(
            "dgr_jax_versions", "New versions found in MODEL_DIR.", ["model", "outcome"], **of
        )
        Gauge("dgr_jax_waiting", "Queries that wait.", **of).set_function(waiting)

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)
