"""A new version in MODEL_DIR takes the place of the old one, and no request is lost."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest
from fastapi.testclient import TestClient

from dgr_jax.retrieval.retriever import Hit
from dgr_jax.serving import served
from dgr_jax.serving.app import Api, application
from dgr_jax.serving.served import Model, OpenSystem, Served, mark_of
from dgr_jax.serving.settings import Service
from tests.campaigns import endurance
from tests.conftest import ROOT, kept_programs
from tests.served import Gate


class Numbered(Gate):
    """A retriever whose hits say which version it is."""

    def __init__(self, version):
        super().__init__()
        self.version, self.compiled = version, 0
        self.store = [served.Filter]

    def search(self, queries, k):
        time.sleep(0.002)
        return [[Hit(1, f"v{self.version}", -1.0, "", query, "")] for query in queries]


class Folder:
    """What lies in a MODEL_DIR, as `Served.open` and `mark_of` see it."""

    def __init__(self, monkeypatch):
        self.version, self.broken = 1, False
        monkeypatch.setattr(served, "mark_of", lambda model_dir: f"{self.version}")
        monkeypatch.setattr(Served, "open", self.open)
        monkeypatch.setattr(Served, "compile", self.compile)
        self.compiled = []

    def open(self, model_dir, wanted, sizes, before=None):
        if self.broken:
            raise ValueError("stage.json: no text")
        system = OpenSystem(Numbered(self.version))
        return Served(f"{self.version}", {"distill": system}, "distill")

    def compile(self, sizes, goes_on):
        self.compiled.append(self.version)


@pytest.fixture
def folder(monkeypatch):
    return Folder(monkeypatch)


def test_a_new_version_is_compiled_before_it_answers(folder, tmp_path):
    told = []
    model = Model("m", tmp_path, (), (1,))
    model.told = told.append
    assert not model.renew() and model.served.mark == "1"
    folder.version = 2
    old = model.served
    assert model.renew() and model.served.mark == "2" and folder.compiled == [2]
    assert old.systems["distill"].retriever.version == 1  # goes on for who has asked it
    assert told == ["switched"]


def test_a_version_that_cannot_be_opened_is_told_of_once(folder, tmp_path, caplog):
    told = []
    model = Model("m", tmp_path, (), (1,))
    model.told = told.append
    folder.version, folder.broken = 2, True
    assert not model.renew() and not model.renew()
    assert told == ["failed"] and model.served.mark == "1"
    assert caplog.text.count("the new version does not answer, the old one does: ValueError") == 1
    folder.version, folder.broken = 3, False
    assert model.renew() and model.served.mark == "3"


def test_no_request_is_lost_over_many_versions(folder, tmp_path):
    api = Api([Model("m", tmp_path, (), (1,))], Service(watch_s=0.01, patience_ms=0))
    found = []

    async def ask(http, until):
        while folder.version < until:
            answer = await http.post("/search", json={"query": "x"})
            found.append((answer.status_code, answer.json()["results"][0]["hits"][0]["pid"]))

    async def work():
        app = application(api)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http,
        ):
            while not api.is_ready:
                await asyncio.sleep(0.01)
            clients = [asyncio.create_task(ask(http, 20)) for _ in range(8)]
            while folder.version < 20:
                await asyncio.sleep(0.02)
                folder.version += 1
            await asyncio.gather(*clients)

    asyncio.run(work())
    assert {status for status, _ in found} == {200}
    assert len({pid for _, pid in found}) > 5  # the versions did change meanwhile


def test_a_change_goes_through_a_retriever_apart(folder, tmp_path):
    model = Model("m", tmp_path, (), (1,))
    seen = []

    def add(self, passages):
        seen.append((self is model.served.systems["distill"].retriever, passages))
        folder.version = 2

    Numbered.add = add
    try:
        model.change("add", ["p"])
    finally:
        del Numbered.add
    assert seen == [(False, ["p"])] and model.served.mark == "2"
    with pytest.raises(NotImplementedError, match="this version cannot remove passages"):
        model.change("remove", ["p"])


def test_the_mark_of_a_folder(tiny_model_dir, tmp_path):
    shutil.copytree(tiny_model_dir, tmp_path / "model", ignore=shutil.ignore_patterns("0", "*.npy"))
    model = tmp_path / "model"
    before = mark_of(model)
    assert before == mark_of(model) == mark_of(tiny_model_dir)
    (model / "previous").mkdir(exist_ok=True)
    (model / "distill").rename(model / "previous" / "distill")  # while it is made again
    assert mark_of(model) == before
    (model / "previous" / "distill").rename(model / "distill")
    record = model / "distill" / "stage.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "seconds": 1234}))
    assert mark_of(model) != before
    before = mark_of(model)
    (model / "index" / "abc").mkdir(parents=True)
    (model / "index" / "abc" / "current.json").write_text('{"version": 1}')
    assert mark_of(model) != before


@pytest.mark.slow
def test_passages_are_added_and_removed_over_http(tiny_model_dir, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model_dir, folder)
    model = Model("m", folder, ("distill", "bm25"), (1,))
    token = {"Authorization": "Bearer " + "t" * 16}
    added = {"pid": "new-1", "title": "Tin whistles", "text": "Tin whistles have six holes."}
    asked = {"query": "tin whistles holes", "k": 1, "system": "bm25"}
    api = Api([model], Service(batch_size=1, deadline_s=60), "t" * 16)
    with TestClient(application(api)) as http:
        while http.get("/readyz").status_code != 200:
            time.sleep(0.1)
        found = lambda: http.post("/search", json=asked).json()["results"][0]["hits"][0]["pid"]
        before, count = found(), len(model.served.systems["distill"].retriever.store)
        compiled = model.served.systems["distill"].retriever.decoder._decode._cache_size()
        done = http.post("/passages", json={"passages": [added]}, headers=token)
        assert done.json() == {"model": "m", "changed": 1}
        assert found() == "new-1" != before
        student = model.served.systems["distill"].retriever
        assert len(student.store) == count + 1 and student.version == 1
        only = {"query": "tin whistles", "k": 1, "filter": {"pids": ["new-1"]}}
        hits = http.post("/search", json=only).json()["results"][0]["hits"]
        assert [hit["pid"] for hit in hits] == ["new-1"]
        assert student.decoder._decode._cache_size() == compiled
        unknown = http.request("DELETE", "/passages", json={"pids": ["no"]}, headers=token)
        assert unknown.status_code == 422 and "'no'" in unknown.json()["error"]
        gone = http.request("DELETE", "/passages", json={"pids": ["new-1"]}, headers=token)
        assert gone.status_code == 200 and found() == before


@pytest.mark.slow
def test_no_request_fails_while_indexes_and_students_are_exchanged(tiny_model_dir, tmp_path):
    few = {"switches": 3, "reloads": 1, "minutes": 0, "clients": 2, "system": "distill"}
    counts = endurance.campaign(tmp_path, tiny_model_dir, **few)
    assert (counts["switched"], counts["failed"], counts["not_opened"]) == (4, 0, 0)
    assert counts["requests"] > 0


@pytest.mark.slow
def test_sigterm_lets_requests_end_and_a_new_version_answers(tiny_model_dir, tmp_path, together):
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    settings = {"PYTHONPATH": str(ROOT), **kept_programs(together)}
    command = [sys.executable, "-m", "dgr_jax.serve", f"--model_dir={model}", "--port=0"]
    command += ["--batch_size=2", "--watch_s=0.2", "--system=distill", "--system=bm25"]
    command += ["--waiting=2000", "--deadline_s=90", "--drain_s=90"]
    running = subprocess.Popen(
        command, env=os.environ | settings, cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    try:
        port = next(int(line.rpartition(":")[2]) for line in running.stderr if "http://" in line)

        def ask(path="/search", queries=1, sent=threading.Event()):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=100)
            asked = {"queries": ["Why do bees dance?"] * queries, "k": 3}
            body = None if path != "/search" else json.dumps(asked)
            kind = {"Content-Type": "application/json"}
            connection.request("GET" if body is None else "POST", path, body, kind)
            sent.set()
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read()), time.monotonic()

        deadline = time.monotonic() + 300
        while ask("/readyz")[0] != 200:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        status, first, _ = ask()
        assert status == 200 and len(first["results"][0]["hits"]) == 3
        record = model / "distill" / "stage.json"
        record.write_text(json.dumps({**json.loads(record.read_text()), "seconds": 1234}))
        assert any("a new version answers" in line for line in running.stderr)
        assert ask()[:2] == (200, first)

        answers, sent = [], [threading.Event() for _ in range(20)]
        ask_much = lambda event: answers.append(ask(queries=64, sent=event))
        for event in sent:
            threading.Thread(target=ask_much, args=(event,)).start()
        assert all(event.wait(60) for event in sent)
        time.sleep(0.5)  # all are accepted
        ended = time.monotonic()
        running.send_signal(signal.SIGTERM)
        assert running.wait(100) == 0
    finally:
        running.kill()
    assert [status for status, _, _ in answers] == [200] * 20
    assert max(at for _, _, at in answers) > ended
