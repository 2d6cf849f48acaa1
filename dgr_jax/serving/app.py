"""The service as an ASGI application: POST /search and what belongs to it, over HTTP and JSON."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import hmac
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

import dgr_jax
from dgr_jax.corpora.types import Passage
from dgr_jax.model_dir.writer_lock import Locked
from dgr_jax.retrieval.retriever import Retriever
from dgr_jax.serving import page, served
from dgr_jax.serving.batches import Batcher, Closed, Full, Late
from dgr_jax.serving.guard import BodyGuard, Measured
from dgr_jax.serving.metrics import Metrics
from dgr_jax.serving.requests import (
    SEARCH_PARAMETERS,
    AddBody,
    Refused,
    RemoveBody,
    SearchBody,
    describe_search,
    refusal,
    results_json,
    written,
)
from dgr_jax.serving.served import Filter, Model, OpenSystem
from dgr_jax.serving.settings import Service

logger = logging.getLogger(__name__)

_GONE = 499  # what is counted where the client did not wait for its answer
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": what}
    for status, what in {
        400: "No JSON.",
        404: "No such model.",
        413: "The body is too large.",
        422: "A value that cannot be.",
        429: "Too much waits; see Retry-After.",
        503: "Not ready yet, or about to end.",
        504: "Not answered in time.",
    }.items()
}


class Api:
    """The models that are served, the queue before them, and what is done with each request.

    token: what who changes passages must show; "": nobody may.
    """

    def __init__(self, models: Sequence[Model], service: Service, token: str = "") -> None:
        self.models = {model.name: model for model in models}
        self.service, self.token = service, token
        self.batcher: Batcher | None = None
        self.failure = ""  # why it never becomes ready
        self.metrics = Metrics(lambda: len(self.batcher or ()))
        for model in models:
            model.told = functools.partial(self._tell, model.name)

    def _tell(self, name: str, outcome: str) -> None:
        self.metrics.versions.labels(name, outcome).inc()

    @contextlib.asynccontextmanager
    async def running(self, app: FastAPI | None = None) -> AsyncIterator[None]:
        """While this is open, queries are answered and MODEL_DIRs are watched."""
        service = self.service
        self.batcher = Batcher(
            most=service.batch_size,
            patience=service.patience_ms / 1000,
            waiting=service.waiting,
            on_batch=self.metrics.batches.observe,
        )
        self.batcher.start()
        watching = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watching.cancel()
            for model in self.models.values():
                model.end()
            await self.batcher.drain(service.drain_s)

    async def _watch(self) -> None:
        try:
            for model in self.models.values():
                await asyncio.to_thread(model.compile)
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
            logger.error("nothing is answered: %s", self.failure)
            return
        # What is there by now stays: the garbage collector need not look at it again and again.
        gc.collect()
        gc.freeze()
        logger.info("ready")
        while True:
            await asyncio.sleep(self.service.watch_s)
            for model in self.models.values():
                await asyncio.to_thread(model.renew)

    @property
    def is_ready(self) -> bool:
        """Whether everything is compiled."""
        return all(model.ready for model in self.models.values())

    def model(self, name: str | None) -> Model:
        """A model by name, or the only one. Raises Refused."""
        if name is None and len(self.models) > 1:
            raise Refused(422, f"model: expected one of {', '.join(self.models)}")
        if name is not None and name not in self.models:
            raise Refused(404, f"model: got {name!r:.80}, expected one of {', '.join(self.models)}")
        return self.models[name or next(iter(self.models))]

    def system(self, body: SearchBody) -> tuple[Model, str, OpenSystem]:
        """The model, and the system that is asked, in its present version. Raises Refused."""
        model = self.model(body.model)
        present = model.served
        name = body.system or present.default
        if name not in present.systems:
            raise Refused(
                422, f"system: got {name!r:.80}, expected one of {', '.join(present.systems)}"
            )
        return model, name, present.systems[name]

    async def search(self, body: SearchBody) -> dict[str, Any]:
        """What POST /search answers. Raises Refused."""
        texts = body.texts(self.service)
        model, name, opened = self.system(body)
        body.check(self.service)
        k = body.depth(self.service, opened.retriever.decoder.most_passages)
        if not self.is_ready:
            raise Refused(503, "not everything is compiled yet", **{"Retry-After": "2"})
        self.metrics.queries.labels(model.name, name).inc(len(texts))
        retriever = await self._restricted(body, opened)
        asked = [(text, k) for text in texts]
        answer = lambda items: served.search(retriever, items)
        hits = await self._ask((id(retriever), "search"), answer, asked, body)
        answers = results_json(texts, hits)
        if body.explain:
            explain = lambda items: [served.explain(retriever, *item) for item in items]
            of = [(texts[0], body.explain_pid)]
            try:
                (told,) = await self._ask(object(), explain, of, body)
            except ValueError as error:
                raise Refused(422, str(error)) from None
            answers[0]["explanation"] = told
        return {"model": model.name, "system": name, "results": answers}

    async def _restricted(self, body: SearchBody, opened: OpenSystem) -> Retriever:
        wanted = body.filter.wanted() if body.filter else Filter()
        try:
            return await asyncio.to_thread(opened.of, wanted) if body.filter else opened.retriever
        except ValueError as error:
            raise Refused(422, f"filter: {error}") from None

    async def _ask(
        self, key: Any, answer: Callable[[Any], Any], items: Sequence[Any], body: SearchBody
    ) -> list[Any]:
        assert self.batcher is not None
        seconds = body.seconds or self.service.deadline_s
        try:
            return await self.batcher.ask(key, answer, items, seconds)
        except Full as full:
            raise Refused(
                429,
                f"{self.service.waiting} queries wait already; try again in {full.seconds} s",
                **{"Retry-After": str(full.seconds)},
            ) from None
        except Late:
            raise Refused(504, f"no answer within {seconds:g} s") from None
        except Closed:
            raise Refused(503, "the service ends") from None

    async def change(self, name: str | None, method: str, argument: Any) -> Any:
        """Adds or removes passages. Raises Refused."""
        model = self.model(name)
        try:
            await asyncio.to_thread(model.change, method, argument)
        except NotImplementedError as error:
            raise Refused(501, str(error)) from None
        except Locked as error:
            raise Refused(409, str(error)) from None
        except ValueError as error:
            raise Refused(422, str(error)) from None
        except OSError as error:
            raise Refused(507, f"nothing was changed: {error.strerror or error}") from None
        return {"model": model.name, "changed": len(argument)}

    def admit(self, request: Request) -> None:
        """Raises Refused for who may not change passages."""
        if not self.token:
            raise Refused(403, "changes are off: the service was started without an admin token")
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self.token}".encode()):
            raise Refused(401, "expected the admin token", **{"WWW-Authenticate": "Bearer"})

    def described(self) -> dict[str, Any]:
        """What is served: GET /models."""
        return {
            model.name: {
                "default": model.served.default,
                "ready": model.ready,
                "systems": {
                    name: {
                        "passages": len(opened.retriever.store),
                        "most_k": min(self.service.most_k, opened.retriever.decoder.most_passages),
                    }
                    for name, opened in model.served.systems.items()
                },
            }
            for model in self.models.values()
        }


async def unless_gone(request: Request, answer: Awaitable[Any]) -> Any:
    """What is awaited; cancelled, and Refused, as soon as the client has gone."""
    answering = asyncio.current_task()
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        assert answering is not None
        answering.cancel()

    watching = asyncio.create_task(watch())
    try:
        return await answer
    except asyncio.CancelledError:
        if not gone:
            raise
        assert answering is not None
        answering.uncancel()
        raise Refused(_GONE, "the client has gone") from None
    finally:
        watching.cancel()


def application(api: Api) -> FastAPI:
    """The ASGI application of an Api."""
    app = FastAPI(
        title="dgr_jax",
        version=dgr_jax.__version__,
        description="Generative retrieval: questions in, passages out.",
        lifespan=api.running,
        docs_url=None,  # its page would be fetched from elsewhere
        redoc_url=None,
    )
    _answer_errors(app)
    _add_routes(app, api)
    _add_status(app, api)
    app.add_middleware(BodyGuard, service=api.service)
    describe_search(app.openapi())
    app.add_middleware(Measured, metrics=api.metrics, known=frozenset(app.openapi()["paths"]))
    return app


def _add_routes(app: FastAPI, api: Api) -> None:
    @app.post("/search", responses=_ERRORS, openapi_extra=SEARCH_PARAMETERS)
    async def search(request: Request) -> Response:
        """The best passages of one query, or of many."""
        body = SearchBody.read(await request.body(), **request.query_params)
        start = time.perf_counter()
        answer = await unless_gone(request, api.search(body))
        if api.service.log_queries:
            asked = [result["query"] for result in answer["results"]]
            logger.info("%.0f ms: %r", 1000 * (time.perf_counter() - start), asked)
        return Response(written(answer), media_type="application/json")

    @app.post("/passages", responses={401: {}, 403: {}, 501: {}})
    async def add(request: Request, body: AddBody) -> Response:
        """Adds passages, or replaces those of the same pid; needs the admin token."""
        api.admit(request)
        passages = [Passage(p.pid, p.text, p.title, p.metadata) for p in body.passages]
        return JSONResponse(await api.change(body.model, "add", passages))

    @app.delete("/passages", responses={401: {}, 403: {}, 501: {}})
    async def remove(request: Request, body: RemoveBody) -> Response:
        """Removes passages; needs the admin token."""
        api.admit(request)
        return JSONResponse(await api.change(body.model, "remove", body.pids))


def _add_status(app: FastAPI, api: Api) -> None:
    @app.get("/models")
    async def models() -> Response:
        """What is served."""
        return JSONResponse(api.described())

    @app.get("/healthz")
    async def healthz() -> Response:
        """Whether the process is alive."""
        return JSONResponse({"status": "ok"})

    @app.get("/readyz", responses={503: {"description": "Not everything is compiled yet."}})
    async def readyz() -> Response:
        """Whether everything is compiled, and queries are answered."""
        ready = api.is_ready
        said = "ready" if ready else "failed" if api.failure else "compiling"
        return JSONResponse({"status": said}, 200 if ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counters, for Prometheus."""
        return Response(api.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return HTMLResponse(page.HTML, headers={"Content-Security-Policy": page.POLICY})


def _answer_errors(app: FastAPI) -> None:
    """One line of JSON for each error."""

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return JSONResponse({"error": error.message}, error.status, headers=error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        wrong = refusal(error.errors())
        return JSONResponse({"error": wrong.message}, wrong.status)

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": f"{error.detail}"}, error.status_code, error.headers)
