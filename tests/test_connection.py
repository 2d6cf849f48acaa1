"""Headers that come too slowly, or do not end, are refused with one line."""

from __future__ import annotations

import asyncio
import functools

import uvicorn
from uvicorn.server import ServerState

from dgr_jax.serving.connection import MOST, Connection


async def greet(scope, receive, send):
    while (await receive()).get("more_body"):
        pass
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]}
    )
    await send({"type": "http.response.body", "body": b"hi"})


def told(*parts, pause=0.0, seconds=0.1):
    """What a client that sends these parts is told, until the connection ends."""

    async def inside():
        config = uvicorn.Config(greet, log_config=None, lifespan="off")
        config.load()
        made = functools.partial(
            Connection, config=config, server_state=ServerState(), app_state={}, seconds=seconds
        )
        server = await asyncio.get_running_loop().create_server(made, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        answer = asyncio.create_task(reader.read())
        for part in parts:
            writer.write(part)
            await asyncio.sleep(pause)
            for _ in range(8):  # what was answered meanwhile arrives: who goes on to write is reset
                await asyncio.sleep(0)
            if answer.done():
                break
        try:
            return await asyncio.wait_for(answer, 5)
        finally:
            writer.close()
            server.close()

    return asyncio.run(inside())


def test_headers_that_come_slowly():
    slow = [b"GET / HTTP/1.1\r\n", *[b"X"] * 10]
    answer = told(*slow, pause=0.03)
    assert answer.startswith(b"HTTP/1.1 408 ") and b"the headers: not there within 0.1 s" in answer
    assert told().startswith(b"HTTP/1.1 408 ")  # nothing comes at all
    whole = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    answer = told(whole, b"GET / HTTP/1.1\r\n")  # a second request that does not go on
    assert answer.startswith(b"HTTP/1.1 200 ") and b"HTTP/1.1 408 " in answer


def test_headers_that_do_not_end():
    answer = told(b"GET / HTTP/1.1\r\nX: ", b"x" * (MOST + 1), seconds=60)
    assert (
        answer.startswith(b"HTTP/1.1 431 ") and b"the headers: got more bytes than 65,5" in answer
    )


def test_a_request_in_time_is_answered_whatever_its_body():
    body = b"x" * (2 * MOST)
    head = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(
        body
    )
    assert told(head + body, seconds=60).endswith(b"hi")
