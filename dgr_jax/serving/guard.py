"""What lies around the application: bodies are neither too large nor too slow, every answer is
counted and has its headers, and no error tells a log what was asked."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from dgr_jax.serving.metrics import Metrics
from dgr_jax.serving.settings import Service

logger = logging.getLogger(__name__)

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

HEADERS = {  # of every answer
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Measured:
    """An ASGI application around another one: counts its answers, by path and status, adds HEADERS
    to them, and answers 500 where it fails.

    known: paths that are counted by their names.
    """

    def __init__(self, app: App, metrics: Metrics, known: frozenset[str]) -> None:
        self.app, self.metrics, self.known = app, metrics, known

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *_encoded(HEADERS)]
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        except Exception as error:
            # Without its message, which may hold a query.
            place = "".join(traceback.format_tb(error.__traceback__)[-3:])
            logger.error("%s in a request:\n%s", type(error).__name__, place)
            if status:
                raise _Broken from None
            await _answer(send_and_note, 500, "an error of the service; its log says where")
        finally:
            path = scope["path"] if scope["path"] in self.known else "other"
            self.metrics.requests.labels(path, status).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - start)


class _Broken(Exception):
    """An answer that failed when it had begun."""


class BodyGuard:
    """An ASGI application before another one: reads the body within its limits, and answers 413 or
    408 where it cannot."""

    def __init__(self, app: App, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        most = self.service.body_bytes
        told = dict(scope["headers"]).get(b"content-length", b"")
        try:
            if told.isdigit() and int(told[:20]) > most:
                raise _TooLarge
            async with asyncio.timeout(self.service.body_s):
                body = await _read(receive, most)
        except _TooLarge:
            await _answer(
                send, 413, f"the body: got more bytes than {most:,}, the most that are read"
            )
            return
        except TimeoutError:
            await _answer(send, 408, f"the body: did not arrive within {self.service.body_s:g} s")
            return
        if body is None:  # the client has gone
            return
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, again, send)


class _TooLarge(Exception):
    pass


async def _read(receive: Receive, most: int) -> bytes | None:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > most:
            raise _TooLarge
        if not message.get("more_body"):
            return b"".join(parts)


async def _answer(send: Send, status: int, message: str) -> None:
    """One line, and the connection ends: what else the client sends is not read."""
    body = json.dumps({"error": message}).encode()
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    headers["Connection"] = "close"
    start = {"type": "http.response.start", "status": status, "headers": _encoded(headers)}
    await send(start)
    await send({"type": "http.response.body", "body": body})


def _encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode()) for name, value in headers.items()]
