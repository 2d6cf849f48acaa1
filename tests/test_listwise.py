"""A language model as a teacher, behind an endpoint on this machine."""

from __future__ import annotations

import json
import logging
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dgr_jax.corpora import store
from dgr_jax.corpora.types import Passage
from dgr_jax.settings import describe
from dgr_jax.teaching import listwise
from dgr_jax.teaching.listwise import ListwiseTeacher, places

COUNT = 30
PIDS = [f"p{n}" for n in range(COUNT)]
POOL = {"q": PIDS}
QUERIES = {"q": "which is the greatest?"}


class Model:
    """Orders passages by the number that each begins with, the greatest first.

    says: what is answered in turn in place of that: a status, a status with its header, or a text.
    """

    def __init__(self) -> None:
        self.says, self.asked, self.headers, self.paths = [], [], [], []

    def answer(self, text: str) -> str:
        numbers = {int(n): int(v) for n, v in re.findall(r"^\[(\d+)\] title (\d+)", text, re.M)}
        return " > ".join(f"[{n}]" for n in sorted(numbers, key=lambda n: -numbers[n]))


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        model = self.server.model
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        model.asked.append(body)
        model.headers.append(dict(self.headers))
        model.paths.append(self.path)
        said = model.says.pop(0) if model.says else model.answer(body["messages"][1]["content"])
        if isinstance(said, tuple):
            self.send_response(said[0])
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(said[1].encode())
            return
        self.send_response(200)
        self.end_headers()
        usage = {"prompt_tokens": 100, "completion_tokens": 10}
        reply = {"choices": [{"message": {"content": said}}], "usage": usage}
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *_):
        """Says nothing."""


@pytest.fixture
def model():
    """A model, with the address that it answers at."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.model = Model()
    server.model.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server.model
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def passages(tmp_path_factory):
    """Passage pN has the number N * 7 mod COUNT."""
    made = (Passage(pid, "word " * 50, f"title {n * 7 % COUNT}") for n, pid in enumerate(PIDS))
    return store.write(made, tmp_path_factory.mktemp("store") / "s")


def order(teacher, passages, pools=POOL, queries=QUERIES):
    return {qid: listed for qid, listed in teacher.order(queries, pools, passages)}


def number(pid: str) -> int:
    return int(pid[1:]) * 7 % COUNT


def test_windows_bring_the_best_passages_to_the_front(model, passages):
    teacher = ListwiseTeacher(model="m", url=model.url + "/", window=10, stride=5)
    (listed,) = order(teacher, passages).values()
    assert [number(p.pid) for p in listed[:5]] == [29, 28, 27, 26, 25]
    assert sorted(p.pid for p in listed) == sorted(PIDS)
    assert [p.score for p in listed] == [float(COUNT - rank) for rank in range(COUNT)]
    assert len(model.asked) == 5
    assert set(model.paths) == {"/v1/chat/completions"}
    body = model.asked[0]
    assert (body["model"], body["temperature"]) == ("m", 0)
    assert body["messages"][1]["content"].startswith(
        "Question: which is the greatest?\n\n[1] title"
    )
    whole = ListwiseTeacher(model="m", url=model.url, window=COUNT, stride=1)
    (listed,) = order(whole, passages).values()
    assert [number(p.pid) for p in listed] == list(range(COUNT))[::-1]


def test_depth_and_words_bound_what_is_read(model, passages):
    teacher = ListwiseTeacher(model="m", url=model.url, depth=4, words=5)
    (listed,) = order(teacher, passages).values()
    assert {p.pid for p in listed} == set(PIDS[:4])
    text = model.asked[0]["messages"][1]["content"]
    assert text.count("word") == 4 * 3 and "[4]" in text and "[5]" not in text.split("Order")[0]


def test_many_queries_keep_their_order_and_one_passage_is_not_asked_about(model, passages):
    queries = {f"q{n}": f"question {n}" for n in range(9)}
    pools = {qid: PIDS[n : n + 3] for n, qid in enumerate(queries)} | {"q8": ["p1"], "q7": []}
    found = order(ListwiseTeacher(model="m", url=model.url), passages, pools, queries)
    assert list(found) == list(queries)
    for qid in list(queries)[:7]:
        numbers = [number(p.pid) for p in found[qid]]
        assert numbers == sorted(numbers, reverse=True)
    assert ([p.pid for p in found["q8"]], found["q7"]) == (["p1"], [])
    assert len(model.asked) == 7


def test_an_endpoint_that_is_busy_is_asked_again(model, passages, caplog):
    model.says = [(429, "slow down"), (503, ""), "[2] > [1]"]
    teacher = ListwiseTeacher(model="m", url=model.url, price_in=1000.0, price_out=5000.0)
    caplog.set_level(logging.INFO, logger="dgr_jax")
    (listed,) = order(teacher, passages, {"q": PIDS[:2]}).values()
    assert [p.pid for p in listed] == ["p1", "p0"]
    assert (
        "ListwiseTeacher: 1 requests, 0 answers from the cache, 2 tries again; 100 tokens read, 10 "
        "written, 0.15 in the unit of its prices"
    ) in caplog.messages


def test_an_answer_without_an_order_is_asked_for_again_and_then_left(model, passages, caplog):
    model.says = ["I cannot say.", "[2]"]
    teacher = ListwiseTeacher(model="m", url=model.url, tries=2)
    (listed,) = order(teacher, passages, {"q": PIDS[:3]}).values()
    assert [p.pid for p in listed] == ["p1", "p0", "p2"]
    model.says = ["", "None."]
    (listed,) = order(teacher, passages, {"q": PIDS[:3]}).values()
    assert [p.pid for p in listed] == PIDS[:3]
    assert caplog.messages[-1].startswith("ListwiseTeacher: 1 windows got no order from the model")


def test_no_answer_is_paid_for_twice(model, passages, tmp_path, caplog):
    cache = tmp_path / "made/answers.jsonl"
    teacher = ListwiseTeacher(model="m", url=model.url, window=10, stride=5, cache=str(cache))
    first = order(teacher, passages)
    with cache.open("a") as file:
        file.write('{"request": "cut o')
    caplog.set_level(logging.INFO, logger="dgr_jax")
    assert order(teacher, passages) == first
    assert len(model.asked) == 5
    assert "0 requests, 5 answers from the cache" in caplog.messages[-1]
    other = ListwiseTeacher(model="n", url=model.url, window=10, stride=5, cache=str(cache))
    order(other, passages)
    assert len(model.asked) == 10


def test_the_key_is_that_of_the_environment(model, passages, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    pools = {"q": PIDS[:2]}
    order(ListwiseTeacher(model="m", url=model.url), passages, pools)
    monkeypatch.setenv("MY_KEY", "secret")
    order(ListwiseTeacher(model="m", url=model.url, key_variable="MY_KEY"), passages, pools)
    assert "Authorization" not in model.headers[0]
    assert model.headers[1]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("says", "error", "message"),
    [
        ([(401, "bad key")], ValueError, "refuses the request .status 401: bad key.; expected ano"),
        ([(500, "no")] * 2, OSError, "gave no answer in 2 tries .status 500: no.; the answers so"),
    ],
)
def test_an_endpoint_that_gives_no_answer(says, error, message, model, passages):
    model.says = says
    with pytest.raises(error, match=message):
        order(ListwiseTeacher(model="m", url=model.url, tries=2), passages, {"q": PIDS[:2]})


def test_an_endpoint_that_is_not_there_or_is_another(model, passages, monkeypatch):
    pauses = []
    monkeypatch.setattr(listwise.time, "sleep", pauses.append)
    teacher = ListwiseTeacher(model="m", url="http://127.0.0.1:1", tries=4)
    with pytest.raises(OSError, match="127.0.0.1:1 gave no answer in 4 tries .*refused"):
        order(teacher, passages, {"q": PIDS[:2]})
    assert pauses == [1.0, 2.0, 4.0]
    monkeypatch.setattr(
        Handler, "do_POST", lambda self: self.wfile.write(b"HTTP/1.0 200 OK\r\n\r\nhi")
    )
    with pytest.raises(ValueError, match="answered b'hi', expected the JSON of a chat completion"):
        order(ListwiseTeacher(model="m", url=model.url), passages, {"q": PIDS[:2]})


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("[2] > [1] > [3]", [1, 0, 2]),
        ("The order is: [3], [1].", [2, 0, 1]),
        ("[2] [2] [9] [0] [1]", [1, 0, 2]),
        ("3 > 1", []),
        ("", []),
    ],
)
def test_places_of_an_answer(answer, expected):
    assert places(answer, 3) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(url="localhost"), "ListwiseTeacher.url: got 'localhost', expected an address such"),
        (dict(stride=20), "ListwiseTeacher.stride: got 20, expected less than 20, Listwi"),
    ],
)  # fmt: skip
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        ListwiseTeacher(model="m", **settings)


def test_where_and_how_it_is_asked_makes_no_other_stage():
    asked = dict(url="https://there/v1", tries=1, timeout=1.0, parallel=1, cache="c", price_in=2.0)
    assert describe(ListwiseTeacher(model="m", **asked)) == describe(ListwiseTeacher(model="m"))
    assert describe(ListwiseTeacher(model="n")) != describe(ListwiseTeacher(model="m"))
