"""What a request may hold, and what is said of one that holds something else."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dgr_jax.corpora import words
from dgr_jax.corpora.types import Scalar
from dgr_jax.retrieval.retriever import USUAL_K, Hit, is_text
from dgr_jax.serving.served import Filter
from dgr_jax.serving.settings import Service


class Refused(Exception):
    """A request that is answered with a status and one line."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class FilterBody(_Body):
    """Which passages may be found; all that is given must hold."""

    pids: list[str] | None = Field(None, description="these passages")
    pid_prefix: str | None = Field(None, description="those whose pid begins so")
    title: str | None = Field(
        None, description="those whose title contains this, in upper or lower case"
    )

    metadata: dict[str, Any] | None = Field(
        None, description="those with this value (no object), or one of a list, of each name"
    )

    def wanted(self) -> Filter:
        """The filter. Raises Refused where nothing is given."""
        if self.pids is None and not (self.pid_prefix or self.title or self.metadata):
            raise Refused(422, "filter: got nothing, expected pids, pid_prefix, title or metadata")
        pids = None if self.pids is None else frozenset(self.pids)
        asked = self.metadata or {}
        values = {name: of if isinstance(of, list) else [of] for name, of in asked.items()}
        for name, given in values.items():
            if not given or not all(isinstance(value, Scalar) for value in given):
                raise Refused(
                    422,
                    f"filter: metadata: got {asked[name]!r:.40} for {name!r:.40}, expected a "
                    "string, a number, a truth value, or a list of these",
                )
        metadata = tuple((name, tuple(values[name])) for name in sorted(values))
        return Filter(pids, self.pid_prefix or None, self.title or None, metadata)


class SearchBody(_Body):
    """One query, or many."""

    query: str | None = Field(None, description="a question")
    queries: list[str] | None = Field(None, description="several questions")
    k: int | None = Field(
        None, description="passages of each query; by default 10, or all that can be found"
    )
    model: str | None = Field(None, description="which model; needed where several are served")
    system: str | None = Field(None, description="which system answers, such as bm25 or planned")
    filter: FilterBody | None = Field(None, description="which passages may be found")
    explain: bool = Field(False, description="also what the search of one query has looked at")
    explain_pid: str | None = Field(None, description="a passage to follow through that search")
    seconds: float | None = Field(None, description="give up after so long")

    @classmethod
    def read(cls, body: bytes, explain: str = "false", **others: str) -> Self:
        """A body, and what the address says beside it. Raises Refused."""
        if others:
            raise Refused(422, f"{min(others):.40}: no such parameter, expected explain")
        if explain not in ("true", "false"):
            raise Refused(422, f"explain: got {explain!r:.40}, expected true or false")
        try:
            asked = cls.model_validate_json(body)
        except ValidationError as error:
            raise refusal(error.errors(include_url=False)) from None
        asked.explain = asked.explain or explain == "true"
        return asked

    def texts(self, service: Service) -> list[str]:
        """The queries. Raises Refused for none, too many, and one that is blank or too long."""
        if (self.query is None) == (self.queries is None):
            raise Refused(422, "query: expected either query or queries")
        texts = [self.query] if self.query is not None else self.queries or []
        if not 1 <= len(texts) <= service.most_queries:
            raise Refused(
                422, f"queries: got {len(texts)}, expected 1 to {service.most_queries} of them"
            )
        for text in texts:
            if not is_text(text) or not words.visible(text):
                raise Refused(422, "query: got a blank one, or no text, expected a question")
            if len(text) > service.query_length:
                raise Refused(
                    422,
                    f"query: got {len(text):,} characters, expected at most "
                    f"{service.query_length:,}",
                )
        return texts

    def depth(self, service: Service, most_passages: int) -> int:
        """Passages of each query. Raises Refused for a number that cannot be."""
        most = min(service.most_k, most_passages)
        k = min(USUAL_K, most) if self.k is None else self.k
        if not 1 <= k <= most:
            raise Refused(422, f"k: got {k}, expected 1 to {most}")
        return k

    def check(self, service: Service) -> None:
        """Raises Refused for what else cannot be."""
        if self.seconds is not None and not 0 < self.seconds <= service.deadline_s:
            raise Refused(
                422, f"seconds: got {self.seconds:g}, expected above 0, at most "
                f"{service.deadline_s:g}"
            )  # fmt: skip
        if self.explain_pid is not None and not self.explain:
            raise Refused(422, "explain_pid: has no effect without explain")
        if self.explain and self.query is None and len(self.queries or ()) != 1:
            raise Refused(422, "explain: expected one query")


class PassageBody(_Body):
    """A passage to add; one of the same pid is replaced."""

    pid: str
    title: str = ""
    text: str
    metadata: dict[str, Scalar] = {}


class AddBody(_Body):
    """Passages to add."""

    passages: list[PassageBody]
    model: str | None = None


class RemoveBody(_Body):
    """Passages to remove."""

    pids: list[str]
    model: str | None = None


# The body of a search is read by `SearchBody.read`: to have it read by FastAPI takes as long as to
# answer. What it would say of it in its description, these say.
SEARCH_PARAMETERS: dict[str, Any] = {
    "parameters": [
        {
            "name": "explain",
            "in": "query",
            "schema": {"type": "boolean", "default": False},
            "description": "as in the body",
        }
    ]
}


def describe_search(described: dict[str, Any]) -> None:
    """Adds the body of a search to an OpenAPI description."""
    schema = SearchBody.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas = described["components"]["schemas"]
    schemas |= schema.pop("$defs") | {"SearchBody": schema}
    reference = {"$ref": "#/components/schemas/SearchBody"}
    described["paths"]["/search"]["post"]["requestBody"] = {
        "content": {"application/json": {"schema": reference}},
        "required": True,
    }


def refusal(errors: Sequence[Mapping[str, Any]]) -> Refused:
    """What is said of a body that is no JSON, or in which pydantic found something wrong."""
    for error in errors:
        if error["type"] == "json_invalid":
            return Refused(400, f"the body is no JSON: {error['ctx']['error']}")
    return Refused(422, "; ".join(map(problem, errors[:5])))


def problem(error: Mapping[str, Any]) -> str:
    """A line on what pydantic found wrong with a body."""
    place = ".".join(str(part) for part in error["loc"] if part != "body") or "the body"
    if error["type"] == "missing":
        return f"{place}: is missing"
    if error["type"] == "extra_forbidden":
        return f"{place}: no such field"
    message = error["msg"]
    return f"{place}: {message[:1].lower()}{message[1:]}"


def hit_json(hit: Hit) -> dict[str, Any]:
    """A hit as JSON."""
    return {
        "rank": hit.rank,
        "pid": hit.pid,
        "score": number(hit.score),
        "title": hit.title,
        "text": hit.text,
        "identifier": hit.identifier,
        "parts": {name: number(value) for name, value in hit.parts.items()},
    }


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def written(answer: Mapping[str, Any]) -> bytes:
    """An answer as JSON."""
    return _encode(answer).encode()


def number(value: float | None) -> float | None:
    """The number as JSON can write it: None where it is not finite."""
    return value if value is not None and math.isfinite(value) else None


def results_json(texts: Sequence[str], hits: Sequence[Sequence[Hit]]) -> list[dict[str, Any]]:
    """What each query has found."""
    return [
        {"query": text, "hits": [hit_json(hit) for hit in own]}
        for text, own in zip(texts, hits, strict=True)
    ]
