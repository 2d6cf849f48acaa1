"""The process that serves: MODEL_DIRs opened, a port listened on, SIGTERM answered by draining."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import logging
import os
import re
import signal
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from dgr_jax import interrupts
from dgr_jax.serving.served import Model
from dgr_jax.serving.settings import Service

logger = logging.getLogger(__name__)

TOKEN = "DGR_JAX_ADMIN_TOKEN"  # variable of the environment
_KEPT = 60  # seconds that a connection stays open without a request
_LEAST_TOKEN = 16  # characters
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def serve(
    model_dirs: Sequence[str], systems: Sequence[str], host: str, port: int, service: Service
) -> None:
    """Serves until SIGTERM or Ctrl-C; then what was asked is still answered.

    model_dirs: folders, or NAME=FOLDER. systems: those that are opened; none: all.
    Raises ValueError and OSError, before anything is listened on, for what cannot be served.
    """
    places, token = named(model_dirs), _token()
    _require("serving", "serve", "fastapi", "httptools", "prometheus_client", "uvicorn")
    import uvicorn

    from dgr_jax.serving.app import Api, application
    from dgr_jax.serving.connection import Connection

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """The first signal ends the server by draining it, and the process as after any work:
            uvicorn would raise the signal again."""
            numbers = signal.SIGINT, signal.SIGTERM
            before = {number: signal.signal(number, self.handle_exit) for number in numbers}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    with _bound(host, port) as listening:
        config = uvicorn.Config(
            application(Api(_opened(places, systems, service), service, token)),
            log_config=None,
            access_log=False,
            server_header=False,
            http=cast(Any, functools.partial(Connection, seconds=service.body_s)),
            loop="asyncio",  # another one would take the signals for itself
            timeout_keep_alive=_KEPT,
            timeout_graceful_shutdown=max(1, round(service.drain_s)),
        )
        server = Server(config)
        listening.listen(config.backlog)  # whoever comes before the server has started, waits
        logger.info("http://%s:%d", *listening.getsockname()[:2])
        with interrupts.held("answers what was asked, then ends"):
            server.run(sockets=[listening])


def _bound(host: str, port: int) -> socket.socket:
    """A socket at an address, on which nothing is listened yet. Raises ValueError where it cannot
    be had."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        if os.name == "posix":  # elsewhere it would let two share the port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"--host, --port: got {host} and {port}: {why}") from None
    return bound


def converse(model_dirs: Sequence[str], systems: Sequence[str], service: Service) -> None:
    """Offers the tool `search` by the Model Context Protocol (MCP) over standard input and output,
    until the input ends.

    See `serve` for the rest; nobody changes passages.
    """
    places = named(model_dirs)
    _require("--mcp", "mcp", "mcp.server.mcpserver", "fastapi", "prometheus_client")
    from dgr_jax.serving import mcp_tool
    from dgr_jax.serving.app import Api

    asyncio.run(mcp_tool.run(Api(_opened(places, systems, service), service)))


def _require(what: str, extra: str, *modules: str) -> None:
    try:
        for module in modules:
            importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{what} needs the extra 'dgr_jax[{extra}]' ({error}): pip install 'dgr_jax[{extra}]'"
        ) from None


def _opened(places: Mapping[str, Path], systems: Sequence[str], service: Service) -> list[Model]:
    models = [Model(name, folder, systems, service.sizes) for name, folder in places.items()]
    for model in models:
        logger.info("%s: %s of %s", model.name, ", ".join(model.served.systems), model.model_dir)
    return models


def named(model_dirs: Sequence[str]) -> dict[str, Path]:
    """Name -> folder of DIR, whose name is its last part, and of NAME=DIR.

    Raises ValueError for a name that no URL can hold, or that is there twice.
    """
    places: dict[str, Path] = {}
    for text in model_dirs:
        name, equals, folder = text.partition("=")
        if not equals or os.path.isdir(text):
            name, folder = Path(text).absolute().name, text
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"--model_dir: got the name {name!r}, expected letters, digits, '_', '.' and '-'; "
                "give one as NAME=DIR"
            )
        if name in places:
            raise ValueError(f"--model_dir: got two of the name {name!r}; name them by NAME=DIR")
        places[name] = Path(folder)
    return places


def _token() -> str:
    token = os.environ.get(TOKEN, "")
    if token and len(token) < _LEAST_TOKEN:
        raise ValueError(
            f"{TOKEN}: got {len(token)} characters, expected at least {_LEAST_TOKEN}, or none: "
            "then nobody changes passages"
        )
    return token
