"""The tool of the Model Context Protocol: what is answered, and what is refused."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tarfile
import time

import pytest

from dgr_jax import serve
from dgr_jax.serving.app import Api
from dgr_jax.serving.settings import Service
from tests import served as small
from tests.conftest import ROOT
from tests.test_old_model_dir import KEPT

pytest.importorskip("mcp.server.mcpserver", reason="the extra mcp is not installed")

import mcp  # noqa: E402

from dgr_jax.serving import mcp_tool  # noqa: E402 - needs mcp

QUERY = "who dances best"


@pytest.fixture
def retriever():
    """One that finds the same passage again and again, at most ten times."""
    gate = small.Gate()
    gate.open.set()
    return gate


def asked(api, work):
    """What `work(client)` returns, of a client in this process."""

    async def inside():
        async with api.running(), mcp.Client(mcp_tool.server(api)) as client:
            return await work(client)

    return asyncio.run(inside())


def called(api, *calls):
    async def work(client):
        return [await client.call_tool("search", arguments) for arguments in calls]

    return asked(api, work)


def api_of(*models, **settings):
    return Api(models, Service(batch_size=2, patience_ms=1.0, **settings))


def test_the_tool_says_what_it_takes(retriever):
    async def work(client):
        return (await client.list_tools()).tools

    (tool,) = asked(api_of(small.model(retriever)), work)
    assert tool.name == "search" and "model small: systems distill" in tool.description
    assert list(tool.input_schema["properties"]) == ["query", "k", "model", "system"]
    assert tool.input_schema["required"] == ["query"]


def test_hits_as_json(retriever):
    api = api_of(small.model(retriever))
    (answer,) = called(api, {"query": QUERY, "k": 3, "model": "small", "system": "distill"})
    assert not answer.is_error
    told = answer.structured_content
    assert json.loads(answer.content[0].text) == told
    hit = {"rank": 1, "pid": "p", "score": -1.0, "title": "title", "text": QUERY, "identifier": ""}
    hit["parts"] = {"log_prob": None}  # which is not finite
    assert told == {"model": "small", "system": "distill", "query": QUERY, "hits": [hit] * 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query": " "}, "query: got a blank one, or no text, expected a question"),
        ({"query": "x" * 1001}, "query: got 1,001 characters, expected at most 1,000"),
        ({"query": "x", "k": 0}, "k: got 0, expected 1 to 10"),
        ({"query": "x", "model": "large"}, "model: got 'large', expected one of small"),
        ({"query": "x", "system": "bm26"}, "system: got 'bm26', expected one of distill"),
        ({"k": 1}, "query"),
    ],
)
def test_what_cannot_be_asked(retriever, arguments, message):
    (answer,) = called(api_of(small.model(retriever)), arguments)
    assert answer.is_error and message in answer.content[0].text


def test_one_of_several_models(retriever):
    api = api_of(small.model(retriever), small.model(retriever, "other"))
    unnamed, named = called(api, {"query": QUERY}, {"query": QUERY, "model": "other"})
    assert unnamed.is_error and "model: expected one of small, other" in unnamed.content[0].text
    assert named.structured_content["model"] == "other"


def test_it_waits_until_everything_is_compiled(retriever):
    model = small.model(retriever)
    compile = model.compile
    model.compile = lambda: (time.sleep(0.2), compile())
    (answer,) = called(api_of(model), {"query": QUERY})
    assert not answer.is_error and len(answer.structured_content["hits"]) == 10


def test_what_cannot_compile_says_so(retriever):
    def breaks():
        raise MemoryError("of the device")

    model = small.model(retriever)
    model.compile = breaks
    (answer,) = called(api_of(model), {"query": QUERY})
    assert answer.is_error
    assert "nothing is answered: MemoryError: of the device" in answer.content[0].text


# The command.


def test_the_package_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "mcp.server.mcpserver", None)
    with pytest.raises(ValueError, match=r"--mcp needs the extra 'dgr_jax\[mcp\]' .*: pip install"):
        serve.command([f"--model_dir={tmp_path}", "--mcp"])


def test_a_port_has_no_effect(tmp_path, capsys):
    with pytest.raises(SystemExit):
        serve.command([f"--model_dir={tmp_path}", "--mcp", "--port=1"])
    assert "--port has no effect with --mcp, which listens on no port" in capsys.readouterr().err


def test_a_folder_without_a_student_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="no trained student in "):
        serve.command([f"--model_dir={tmp_path}", "--mcp"])


@pytest.mark.slow
def test_over_standard_input_and_output(tmp_path):
    """The program as assistants start it, of a kept MODEL_DIR."""
    with tarfile.open(KEPT) as archive:
        archive.extractall(tmp_path, filter="data")
    flags = ["--mcp", f"--model_dir={tmp_path / 'model'}", "--system=generate", "--batch_size=1"]
    program = mcp.StdioServerParameters(
        command=sys.executable, args=["-m", "dgr_jax.serve", *flags], env=dict(os.environ), cwd=ROOT
    )

    async def work():
        async with mcp.Client(program) as client:
            return await client.call_tool("search", {"query": "Why do bees dance?", "k": 2})

    answer = asyncio.run(work())
    assert not answer.is_error and len(answer.structured_content["hits"]) == 2
