"""A connection whose requests begin in time: their headers are neither too slow nor too large.

What lies behind it looks at bodies, see `guard`; before the headers are whole it is not asked.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MOST = 64 << 10  # bytes of headers


class Connection(HttpToolsProtocol):
    """uvicorn's, with a limit on the seconds and the bytes of a request's headers.

    Between two requests uvicorn closes it when it is time.
    """

    def __init__(self, *given: Any, seconds: float, **named: Any) -> None:
        super().__init__(*given, **named)
        self._seconds = seconds
        self._late: asyncio.TimerHandle | None = None  # while headers are awaited
        self._bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._have_headers()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._await_headers()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._have_headers()
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._late is None:
            return
        self._bytes += len(data)
        if self._bytes > MOST:
            self._refuse("431 Request Header Fields Too Large", f"got more bytes than {MOST:,}")

    def _await_headers(self) -> None:
        self._have_headers()
        self._late = self.loop.call_later(
            self._seconds,
            lambda: self._refuse("408 Request Timeout", f"not there within {self._seconds:g} s"),
        )

    def _have_headers(self) -> None:
        if self._late is not None:
            self._late.cancel()
        self._late, self._bytes = None, 0

    def _refuse(self, status: str, message: str) -> None:
        """Answers as `guard` does, and closes."""
        self._have_headers()
        if self.transport.is_closing():
            return
        body = json.dumps({"error": f"the headers: {message}"}).encode()
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()
