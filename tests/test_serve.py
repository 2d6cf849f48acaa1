"""The service over HTTP, in this process: what is answered, and what is refused."""

from __future__ import annotations

import asyncio
import logging
import socket
import time

import httpx
import pytest
from fastapi.testclient import TestClient

from dgr_jax import serve
from dgr_jax.model_dir.writer_lock import Locked
from dgr_jax.serving import server
from dgr_jax.serving.app import Api, application
from dgr_jax.serving.served import Filter, Model, OpenSystem
from dgr_jax.serving.settings import Service
from tests import served as small

QUICK = {"watch_s": 0.05, "patience_ms": 1.0}


@pytest.fixture(scope="module")
def retriever(tmp_path_factory):
    return small.retriever(tmp_path_factory.mktemp("store"))


def client(api):
    return TestClient(application(api))


@pytest.fixture(scope="module")
def asked(retriever):
    """A running service of one model, whose shapes are compiled."""
    api = Api([small.model(retriever)], Service(batch_size=2, **QUICK))
    api.models["small"].served.compile((1, 2))
    with client(api) as running:
        ready(running)
        yield running


def ready(running):
    for _ in range(500):
        if running.get("/readyz").status_code == 200:
            return
        time.sleep(0.01)
    raise AssertionError("never ready")


def pids(result):
    return [hit["pid"] for hit in result["hits"]]


def test_one_query_and_many(asked, retriever):
    query = "who dances best"
    answer = asked.post("/search", json={"query": query, "k": 3}).json()
    (result,) = answer["results"]
    (expected,) = retriever.search([query], 3)
    assert (answer["model"], answer["system"]) == ("small", "distill")
    assert result["query"] == query and pids(result) == [hit.pid for hit in expected]
    assert result["hits"][0]["score"] == pytest.approx(expected[0].score, abs=1e-4)
    assert result["hits"][0]["identifier"] == expected[0].identifier
    many = asked.post("/search", json={"queries": [query, "b", "c d"], "k": 2}).json()["results"]
    assert [r["query"] for r in many] == [query, "b", "c d"] and pids(many[0]) == pids(result)[:2]


def test_a_filter_finds_only_what_it_admits(asked):
    def found(**filter):
        return asked.post("/search", json={"query": "who dances", "k": 4, "filter": filter})

    assert set(pids(found(pids=["bees-01", "music-07"]).json()["results"][0])) == {
        "bees-01", "music-07"
    }  # fmt: skip
    by_prefix = pids(found(pid_prefix="music-").json()["results"][0])
    assert by_prefix and all(pid.startswith("music-") for pid in by_prefix)
    titled = found(title="WOLF", pid_prefix="bees-").json()["results"][0]
    assert pids(titled) == ["bees-02"]
    of = lambda **metadata: found(metadata=metadata)
    assert set(pids(of(year=1991).json()["results"][0])) <= {
        "bees-01", "bees-04", "music-07", "music-10"
    }  # fmt: skip
    assert pids(of(year=[1990, 1991], part="wind").json()["results"][0]) in (
        ["music-09", "music-10"], ["music-10", "music-09"]
    )  # fmt: skip
    message = "filter: metadata: got 'place', expected 'part', 'year'"
    assert of(place="x").status_code == 422 and of(place="x").json() == {"error": message}
    assert of(part="string").json()["error"].startswith("filter: passages: got none of the corpus")
    unknown = found(pids=["bees-01", "nobody"])
    assert unknown.status_code == 422 and "got 'nobody', expected pids of the 12" in unknown.text


def test_a_search_explains_itself(asked):
    query = {"query": "who dances", "k": 1}
    told = asked.post("/search?explain=true", json=query).json()["results"][0]["explanation"]
    assert told["levels"][0]["live"] and told["pid"] is None and told["path"] == []
    assert (
        told
        == asked.post("/search", json={**query, "explain": True}).json()["results"][0][
            "explanation"
        ]
    )
    followed = asked.post("/search?explain=true", json={**query, "explain_pid": "bees-01"}).json()
    assert followed["results"][0]["explanation"]["path"][-1]["complete"]
    unknown = asked.post("/search?explain=true", json={**query, "explain_pid": "nobody"})
    assert unknown.status_code == 422 and unknown.json()["error"].startswith("pid: got 'nobody'")


BAD = [
    ({"queries": ["x", "y"], "explain": True}, "explain: expected one query"),
    ({"query": "x", "k": 0}, "k: got 0, expected 1 to 4"),
    ({"query": "x", "k": 5}, "k: got 5, expected 1 to 4"),
    ({"query": "x", "k": "2"}, "k: input should be a valid integer"),
    ({}, "query: expected either query or queries"),
    ({"query": "x", "queries": ["y"]}, "query: expected either query or queries"),
    ({"query": " \n"}, "query: got a blank one, or no text, expected a question"),
    ({"query": "x" * 1001}, "query: got 1,001 characters, expected at most 1,000"),
    ({"queries": ["x"] * 65}, "queries: got 65, expected 1 to 64 of them"),
    ({"query": "x", "system": "bm26"}, "system: got 'bm26', expected one of distill"),
    ({"query": "x", "path": "/etc"}, "path: no such field"),
    ({"query": "x", "filter": {}}, "filter: got nothing, expected pids, pid_prefix, ti"),
    (
        {"query": "x", "filter": {"metadata": {"year": {}}}},
        "filter: metadata: got {} for 'year'",
    ),
    ({"query": "x", "filter": {"pid_prefix": "q"}}, "filter: passages: got none of the corpus"),
    ({"query": "x", "seconds": 0}, "seconds: got 0, expected above 0, at most 10"),
    ({"query": "x", "explain_pid": "p"}, "explain_pid: has no effect without explain"),
]


@pytest.mark.parametrize(("body", "message"), BAD)
def test_values_that_cannot_be(asked, body, message):
    answer = asked.post("/search", json=body)
    assert answer.status_code == 422 and answer.json()["error"].startswith(message)


@pytest.mark.parametrize(
    ("how", "status", "message"),
    [
        (("POST", "/search", b"{"), 400, "the body is no JSON"),
        (("POST", "/search", b'{"query": "\\ud800"}'), 400, "the body is no JSON: unexpected en"),
        (("POST", "/search", b""), 400, "the body is no JSON: EOF while parsing a value at line 1"),
        (
            ("POST", "/search?explain=yes", b'{"query": "x"}'),
            422,
            "explain: got 'yes', expected tr",
        ),
        (("POST", "/search?k=3", b'{"query": "x"}'), 422, "k: no such parameter, expected explain"),
        (("POST", "/passages", b"{"), 400, "the body is no JSON: Expecting property name"),
        (("POST", "/search", b"x" * (10 << 20)), 413, "the body: got more bytes than 1,048,576"),
        (("GET", "/search", b""), 405, "Method Not Allowed"),
        (("GET", "/nowhere", b""), 404, "Not Found"),
        (("POST", "/search", b'{"query": "x", "model": "other"}'), 404, "model: got 'other', expe"),
    ],
)
def test_requests_that_are_none(asked, how, status, message):
    method, path, body = how
    answer = asked.request(method, path, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status and answer.json()["error"].startswith(message)
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_what_else_is_there(asked):
    assert asked.get("/healthz").json() == {"status": "ok"}
    assert asked.get("/models").json()["small"]["systems"] == {
        "distill": {"passages": 12, "most_k": 4}
    }
    paths = asked.get("/openapi.json").json()["paths"]
    assert {"post"} == paths["/search"].keys() and {"post", "delete"} == paths["/passages"].keys()
    read = paths["/search"]["post"]
    assert read["parameters"][0]["name"] == "explain" and "SearchBody" in str(read["requestBody"])
    schemas = asked.get("/openapi.json").json()["components"]["schemas"]
    assert schemas["SearchBody"]["properties"]["filter"] and schemas["FilterBody"]
    assert asked.get("/docs").status_code == 404  # it would be fetched from elsewhere
    counted = asked.get("/metrics").text
    assert 'dgr_jax_requests_total{path="/search",status="422"}' in counted
    assert 'dgr_jax_queries_total{model="small",system="distill"}' in counted


def test_nothing_is_compiled_once_it_is_ready(asked, retriever):
    before = retriever.decoder._decode._cache_size()  # also of other tests with this student
    for count in (1, 2, 3, 4, 7):
        assert asked.post("/search", json={"queries": ["a query"] * count}).status_code == 200
    assert retriever.decoder._decode._cache_size() == before >= 2


# What waits, and who does not.


def with_gate(work, **settings):
    """Runs `work(post, gate, api)` with a service whose retriever is a Gate."""
    gate, settings = small.Gate(), {"batch_size": 1} | QUICK | settings
    api = Api([small.model(gate)], Service(**settings))

    async def inside():
        app = application(api)
        transport = httpx.ASGITransport(app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test") as http,
        ):
            while not api.is_ready:
                await asyncio.sleep(0.01)
            post = lambda query, **more: http.post("/search", json={"query": query, **more})
            try:
                return await work(post, gate, api)
            finally:
                gate.open.set()

    return asyncio.run(inside())


async def until(condition):
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never was")


def test_beyond_what_may_wait_one_is_told_when_to_try_again():
    async def work(post, gate, api):
        first = asyncio.create_task(post("first"))
        await until(gate.began.is_set)
        second = asyncio.create_task(post("second"))
        await until(lambda: len(api.batcher) == 1)
        third = await post("third")
        gate.open.set()
        return third, await first, await second

    third, *others = with_gate(work, waiting=1)
    assert third.status_code == 429 and int(third.headers["retry-after"]) >= 1
    assert "1 queries wait already" in third.json()["error"]
    assert [answer.status_code for answer in others] == [200, 200]
    assert others[0].json()["results"][0]["hits"][0]["parts"] == {"log_prob": None}


def test_who_is_not_answered_in_time_is_told_so_and_not_searched_for():
    async def work(post, gate, api):
        first = asyncio.create_task(post("first"))
        await until(gate.began.is_set)
        late = await post("late", seconds=0.05)
        gate.open.set()
        return late, await first, gate

    late, first, gate = with_gate(work)
    assert late.status_code == 504 and late.json() == {"error": "no answer within 0.05 s"}
    assert first.status_code == 200 and "late" not in gate.searched


def test_before_it_is_ready_nothing_is_searched(retriever):
    api = Api([small.model(retriever)], Service(**QUICK))
    api.models["small"].compile = lambda: time.sleep(0.3)
    with client(api) as running:
        assert running.get("/healthz").status_code == 200
        assert running.get("/readyz").json() == {"status": "compiling"}
        answer = running.post("/search", json={"query": "x"})
        assert answer.status_code == 503 and answer.headers["retry-after"] == "2"


def test_a_service_that_cannot_compile_says_so(retriever, caplog):
    def breaks():
        raise MemoryError("of the device")

    api = Api([small.model(retriever)], Service(**QUICK))
    api.models["small"].compile = breaks
    with client(api) as running, caplog.at_level(logging.ERROR):
        for _ in range(100):
            if (said := running.get("/readyz")).json() == {"status": "failed"}:
                break
            time.sleep(0.01)
    assert (
        said.status_code == 503 and "nothing is answered: MemoryError: of the device" in caplog.text
    )


async def raw(api, parts, headers=(), pause=0.0):
    """Sends a body in parts to the application, as a server would; -> status, body."""
    sent, parts = [], list(parts)

    async def receive():
        if parts:
            await asyncio.sleep(pause)
            return {"type": "http.request", "body": parts.pop(0), "more_body": True}
        await asyncio.sleep(60)

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/search", "raw_path": b"/search",
             "query_string": b"", "headers": list(headers), "http_version": "1.1",
             "scheme": "http", "server": ("test", 80), "client": ("test", 1)}  # fmt: skip
    await application(api)(scope, receive, send)
    return sent[0]["status"], sent[1]["body"].decode()


def test_bodies_that_come_slowly_or_do_not_end(retriever):
    api = Api([small.model(retriever)], Service(body_bytes=100, body_s=0.05))
    status, body = asyncio.run(raw(api, [b"{"]))
    assert status == 408 and "did not arrive within 0.05 s" in body
    status, body = asyncio.run(raw(api, [b"x" * 60] * 3))
    assert status == 413 and "more bytes than 100" in body
    told = [(b"content-length", b"101")]
    status, _ = asyncio.run(raw(api, [], told))
    assert status == 413


def test_a_client_that_has_gone_is_not_searched_for():
    async def work(post, gate, api):
        first = asyncio.create_task(post("first"))
        await until(gate.began.is_set)
        messages = [{"type": "http.request", "body": b'{"query": "gone"}', "more_body": False}]

        async def receive():
            if messages:
                return messages.pop()
            await until(lambda: len(api.batcher) == 1)
            return {"type": "http.disconnect"}

        async def send(message):
            pass

        scope = {"type": "http", "method": "POST", "path": "/search", "raw_path": b"/search",
                 "query_string": b"", "headers": [(b"content-type", b"application/json")],
                 "http_version": "1.1", "scheme": "http", "server": ("test", 80),
                 "client": ("test", 1)}  # fmt: skip
        await application(api)(scope, receive, send)
        waits = len(api.batcher)
        gate.open.set()
        await first
        return waits, gate

    waits, gate = with_gate(work)
    assert waits == 0 and gate.searched == ["first"] or "gone" not in gate.searched


def breaks(queries, k):
    raise ZeroDivisionError(f"in {queries}")


def test_a_log_holds_no_query(caplog):
    async def work(post, gate, api):
        gate.open.set()
        await post("secret")
        gate.search = breaks
        return await post("secret")

    with caplog.at_level(logging.INFO):
        failed = with_gate(work)
    assert failed.status_code == 500 and "its log says where" in failed.json()["error"]
    assert "ZeroDivisionError in a request" in caplog.text and "secret" not in caplog.text
    caplog.clear()

    async def told(post, gate, api):
        gate.open.set()
        await post("secret")

    with caplog.at_level(logging.INFO):
        with_gate(told, log_queries=True)
    assert "ms: ['secret']" in caplog.text


# Who may change passages.


def test_changes_are_off_without_a_token(asked):
    for method, body in (("POST", {"passages": []}), ("DELETE", {"pids": []})):
        answer = asked.request(method, "/passages", json=body)
        assert answer.status_code == 403 and "without an admin token" in answer.json()["error"]


def full(method, argument):
    raise OSError(28, "No space left on device")


def locked(method, argument):
    raise Locked("process 7 writes into it")


def test_changes_need_the_token_and_a_retriever_that_can(retriever):
    changed = []

    def change(method, argument):
        changed.append((method, argument))
        if method == "remove":
            raise ValueError("pids: got 'x', expected some of the corpus")

    api = Api([small.model(retriever, change=change)], Service(**QUICK), "t" * 16)
    body = {"passages": [{"pid": "p", "title": "T", "text": "x"}]}
    with client(api) as running:
        for given in ({}, {"Authorization": "Bearer wrong"}):
            answer = running.post("/passages", json=body, headers=given)
            assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
        token = {"Authorization": "Bearer " + "t" * 16}
        added = running.post("/passages", json=body, headers=token)
        assert added.json() == {"model": "small", "changed": 1}
        gone = running.request("DELETE", "/passages", json={"pids": ["x"]}, headers=token)
        assert gone.status_code == 422 and gone.json()["error"].startswith("pids: got 'x'")
        api.models["small"].change = full
        assert running.post("/passages", json=body, headers=token).json() == {
            "error": "nothing was changed: No space left on device"
        }
        api.models["small"].change = locked
        assert running.post("/passages", json=body, headers=token).status_code == 409
        api.models["small"].change = lambda *_: Model.change(api.models["small"], "frob", [])
        assert running.post("/passages", json=body, headers=token).status_code == 501
    assert [method for method, _ in changed] == ["add", "remove"]
    assert changed[0][1][0].title == "T"


# The command.


def test_names_of_models(tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    assert server.named([str(folder), f"b={folder}"]) == {"one": folder, "b": folder}
    with pytest.raises(ValueError, match="got two of the name 'one'; name them by NAME=DIR"):
        server.named([str(folder), str(folder)])
    with pytest.raises(ValueError, match="got the name 'a b', expected letters, digits"):
        server.named(["a b=x"])


def test_a_short_token_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv(server.TOKEN, "short")
    with pytest.raises(ValueError, match="DGR_JAX_ADMIN_TOKEN: got 5 characters, expected at lea"):
        serve.command([f"--model_dir={tmp_path}"])


def test_a_folder_without_a_student_is_told_before_it_listens(tmp_path):
    with pytest.raises(FileNotFoundError, match="no trained student in "):
        serve.command([f"--model_dir={tmp_path}", "--port=0"])


def test_an_address_that_cannot_be_had_is_told_before_anything_is_opened(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"got 127.0.0.1 and {port}: Address already in use"):
            serve.command([f"--model_dir={tmp_path}", f"--port={port}"])
    with pytest.raises(ValueError, match="--host, --port: got 127.0.0.1 and 65536: .*0-65535"):
        serve.command([f"--model_dir={tmp_path}", "--port=65536"])


@pytest.mark.parametrize("name", ["fastapi", "httptools", "uvicorn", "prometheus_client"])
def test_what_must_be_installed_is_named(name, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(ValueError, match=r"needs the extra 'dgr_jax\[serve\]' .*: pip install 'dg"):
        serve.command([f"--model_dir={tmp_path}"])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--batch_size=0", "Service.batch_size: got 0, expected at least 1"),
        ("--deadline_s=0", "Service.deadline_s: got 0.0, expected above 0"),
        ("--patience_ms=nan", "Service.patience_ms: got nan, expected at least 0"),
    ],
)
def test_settings_that_cannot_be(flag, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        serve.command([f"--model_dir={tmp_path}", flag])


def test_sizes_that_batches_are_padded_to():
    assert Service(batch_size=32).sizes == (1, 2, 4, 8, 16, 32)
    assert Service(batch_size=6).sizes == (1, 2, 4, 6) and Service(batch_size=1).sizes == (1,)


def test_filters_are_kept_a_while(retriever):
    opened = OpenSystem(retriever)
    wanted = Filter(pid_prefix="bees-")
    assert opened.of(wanted) is opened.of(Filter(pid_prefix="bees-"))
    assert opened.of(Filter()) is retriever
    kept = opened.of(wanted)
    for i in range(12):
        opened.of(Filter(pids=frozenset({small.PASSAGES[i].pid})))
    for i in range(6):
        opened.of(Filter(pids=frozenset({small.PASSAGES[i].pid, "music-11"})))
    assert opened.of(wanted) is not kept
