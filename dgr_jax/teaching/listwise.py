"""A language model behind an OpenAI-compatible endpoint as a teacher: it reads a window of passages
and writes their order (listwise reranking with sliding windows, Sun et al. 2023, RankGPT)."""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dgr_jax import ranges
from dgr_jax.corpora.types import ScoredPassage
from dgr_jax.settings import without_effect
from dgr_jax.teaching.teacher import Queries, Teacher
from dgr_jax.teaching.teachers import batched

if TYPE_CHECKING:
    from dgr_jax.corpora.store import PassageStore

_log = logging.getLogger(__name__)

_SYSTEM = "You order passages by how well they answer a question. You write numbers and no words."
_ASKED = (
    "Question: {query}\n\n{passages}\n\nOrder all {count} passages, the one that answers the "
    "question best first. Write their numbers alone, in this form: [2] > [1] > [3]"
)
_NUMBER = re.compile(r"\[(\d{1,6})\]")
_LONGEST_PAUSE = 60.0  # seconds between two tries
_BUSY = (408, 409, 425, 429)  # statuses after which the same request may succeed, as after any 5xx


@dataclass(frozen=True)
class ListwiseTeacher(Teacher):
    """The order in which a language model puts the passages of a query.

    The best `depth` candidates (judged passages after them) are read in windows, from the last to
    the first, so that a passage can rise from the end to the front. A passage's score is the number
    of passages behind it, plus 1. The temperature is 0.

    url: of the endpoint, before '/chat/completions'. model: the name that it knows.
    window, stride: passages in a request, and how far the next one is ahead.
    words: of a passage, its title counted; the rest is cut.
    key_variable: the environment variable with the key of the endpoint; it may be unset.
    tries: of a request, with growing pauses, while the endpoint is busy, cannot be reached, or its
      answer has no order; then the window stays as it is, or, where there is no answer, all ends.
    timeout: seconds of a request. parallel: queries that are asked together.
    cache: a file that keeps every answer ('' for none), so that no request is paid for twice.
    price_in, price_out: of a million tokens, for the line on what it cost.
    """

    model: str
    url: str = without_effect("http://localhost:8000/v1")
    window: int = 20
    stride: int = 10
    depth: int = 100
    words: int = 150
    key_variable: str = without_effect("OPENAI_API_KEY")
    tries: int = without_effect(5)
    timeout: float = without_effect(120.0)
    parallel: int = without_effect(4)
    cache: str = without_effect("")
    price_in: float = without_effect(0.0)
    price_out: float = without_effect(0.0)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(
                f"ListwiseTeacher.url: got {self.url!r}, expected an address such as "
                "'http://localhost:8000/v1'"
            )
        count = ranges.at_least(1)
        ranges.check(
            self,
            window=ranges.at_least(2),
            stride=count,
            depth=count,
            words=count,
            tries=count,
            timeout=ranges.above(0),
            parallel=count,
            price_in=ranges.at_least(0),
            price_out=ranges.at_least(0),
        )
        if self.stride >= self.window:
            raise ValueError(
                f"ListwiseTeacher.stride: got {self.stride}, expected less than {self.window}, "
                "ListwiseTeacher.window: windows must overlap"
            )

    def order(
        self, queries: Queries, pools: Mapping[str, list[str]], store: PassageStore
    ) -> Iterator[tuple[str, list[ScoredPassage]]]:
        endpoint = _Endpoint(self)

        def ordered(item: tuple[str, list[str]]) -> tuple[str, list[ScoredPassage]]:
            qid, pids = item[0], item[1][: self.depth]
            if len(pids) > 1:
                pids = self._ordered(endpoint, queries[qid], pids, store)
            return qid, [ScoredPassage(p, float(len(pids) - i)) for i, p in enumerate(pids)]

        try:
            with ThreadPoolExecutor(self.parallel) as workers:
                for block in batched(pools.items(), 4 * self.parallel):
                    yield from workers.map(ordered, block)
        finally:
            endpoint.report()

    def _ordered(
        self, endpoint: _Endpoint, query: str, pids: Sequence[str], store: PassageStore
    ) -> list[str]:
        """The pids in the order of the model, window by window from the end."""
        ranked, end = list(pids), len(pids)
        while True:
            start = max(0, end - self.window)
            texts = [store[store.index_of(pid)].contents for pid in ranked[start:end]]
            order = endpoint.order(query, [" ".join(t.split()[: self.words]) for t in texts])
            ranked[start:end] = [ranked[start + place] for place in order]
            if not start:
                return ranked
            end -= self.stride


@dataclass
class _Endpoint:
    """Asks for orders, remembers the answers, and counts what they cost."""

    settings: ListwiseTeacher
    counts: Counter = field(default_factory=Counter)
    answers: dict[str, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        path = Path(self.settings.cache)
        if not self.settings.cache or not path.is_file():
            return
        for line in path.read_text(encoding="utf-8").splitlines():
            try:  # the last line may be cut off, where a process was killed
                kept = json.loads(line)
                self.answers[kept["request"]] = kept["answer"]
            except (ValueError, KeyError, TypeError):
                continue

    def order(self, query: str, texts: Sequence[str]) -> list[int]:
        """The places of the texts, best first."""
        passages = "\n\n".join(f"[{n}] {text}" for n, text in enumerate(texts, start=1))
        asked = _ASKED.format(query=query, passages=passages, count=len(texts))
        roles = {"system": _SYSTEM, "user": asked}
        request = {
            "model": self.settings.model,
            "messages": [{"role": role, "content": text} for role, text in roles.items()],
            "temperature": 0,
        }
        body = json.dumps(request).encode()
        key = hashlib.sha256(body).hexdigest()
        if key in self.answers:
            self._count(cached=1)
            return places(self.answers[key], len(texts))
        for _ in range(self.settings.tries):
            answer = self._answer(body)
            if order := places(answer, len(texts)):
                self._keep(key, answer)
                return order
        self._count(without_order=1)
        return list(range(len(texts)))

    def _answer(self, body: bytes) -> str:
        """What the model writes. Raises OSError after the last try, ValueError for an answer of
        another form and for a request that the endpoint refuses."""
        for again in range(1, self.settings.tries + 1):
            problem, pause = "", min(_LONGEST_PAUSE, 2.0 ** (again - 1))
            try:
                return self._asked(body)
            except urllib.error.HTTPError as error:
                said = error.read(300).decode("utf-8", "replace").strip()
                problem = f"status {error.code}: {said}"
                if error.code not in _BUSY and error.code < 500:
                    raise ValueError(
                        f"ListwiseTeacher: {self.settings.url} refuses the request ({problem}); "
                        "expected another ListwiseTeacher.model, .url or key (.key_variable)"
                    ) from None
                after = error.headers.get("Retry-After", "")
                pause = min(_LONGEST_PAUSE, float(after)) if after.isdecimal() else pause
            except (OSError, http.client.HTTPException) as error:  # no whole answer in time
                problem = str(getattr(error, "reason", error))
            if again < self.settings.tries:
                self._count(tried_again=1)
                time.sleep(pause)
        raise OSError(
            f"ListwiseTeacher: {self.settings.url} gave no answer in {self.settings.tries} tries "
            f"({problem}); the answers so far are "
            + ("in ListwiseTeacher.cache" if self.settings.cache else "lost: set .cache to a file")
        )

    def _asked(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.settings.key_variable, ""):
            headers["Authorization"] = f"Bearer {key}"
        url = f"{self.settings.url.rstrip('/')}/chat/completions"
        asked = urllib.request.Request(url, body, headers)
        with urllib.request.urlopen(asked, timeout=self.settings.timeout) as reply:
            text = reply.read()
        try:
            said = json.loads(text)
            answer = str(said["choices"][0]["message"]["content"] or "")
        except (ValueError, LookupError, TypeError):
            raise ValueError(
                f"ListwiseTeacher.url: {url} answered {text[:100]!r}, expected the JSON of a chat "
                "completion"
            ) from None
        usage: Any = said.get("usage") or {}
        tokens = (usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0)
        self._count(requests=1, tokens_in=tokens[0], tokens_out=tokens[1])
        return answer

    def _keep(self, key: str, answer: str) -> None:
        with self.lock:
            self.answers[key] = answer
            if self.settings.cache:
                path = Path(self.settings.cache)
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"request": key, "answer": answer}) + "\n")

    def _count(self, **counts: int) -> None:
        with self.lock:
            self.counts.update(counts)

    def report(self) -> None:
        """Logs what was asked and what it cost."""
        counts, settings = self.counts, self.settings
        cost = counts["tokens_in"] * settings.price_in + counts["tokens_out"] * settings.price_out
        priced = f", {cost / 1e6:,.2f} in the unit of its prices" if cost else ""
        _log.info(
            "ListwiseTeacher: %s requests, %s answers from the cache, %s tries again; %s tokens "
            "read, %s written%s",
            *(f"{counts[name]:,}" for name in (
                "requests", "cached", "tried_again", "tokens_in", "tokens_out",
            )),
            priced,
        )  # fmt: skip
        if counts["without_order"]:
            _log.warning(
                "ListwiseTeacher: %s windows got no order from the model, and stayed as they were",
                f"{counts['without_order']:,}",
            )


def places(answer: str, count: int) -> list[int]:
    """The order that an answer gives, as places from 0; those that it leaves out follow as they
    were. [] where it names none."""
    named = (int(number) - 1 for number in _NUMBER.findall(answer))
    order = list(dict.fromkeys(place for place in named if 0 <= place < count))
    rest = [place for place in range(count) if place not in order]
    return order + rest if order else []
