"""The tool `search` of the Model Context Protocol, for assistants that look up passages."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from pydantic import Field

import dgr_jax
from dgr_jax.serving.app import Api
from dgr_jax.serving.requests import Refused, SearchBody

_LOOK = 0.05  # seconds between two looks whether everything is compiled


def server(api: Api) -> MCPServer:
    """The server of an Api that is running. What a request may hold is as over HTTP."""
    tools = MCPServer("dgr_jax", version=dgr_jax.__version__, log_level="WARNING")
    systems = {name: ", ".join(model.served.systems) for name, model in api.models.items()}
    served = "; ".join(f"model {name}: systems {names}" for name, names in systems.items())

    @tools.tool(description=f"Find the passages of a collection that answer a question. {served}")
    async def search(
        query: Annotated[str, Field(description="a question")],
        k: Annotated[int | None, Field(description="passages to find, by default 10")] = None,
        model: Annotated[
            str | None, Field(description="which model; needed where several are served")
        ] = None,
        system: Annotated[str | None, Field(description="which system of the model")] = None,
    ) -> dict[str, Any]:
        while not (api.is_ready or api.failure):
            await asyncio.sleep(_LOOK)
        if api.failure:
            raise ToolError(f"nothing is answered: {api.failure}")
        asked = {"query": query, "k": k, "model": model, "system": system}
        try:
            answer = await api.search(SearchBody.model_validate(asked))
        except Refused as refused:
            raise ToolError(refused.message) from None
        (result,) = answer.pop("results")
        return answer | result

    return tools


async def run(api: Api) -> None:
    """Serves over standard input and output until the input ends."""
    async with api.running():
        await server(api).run_stdio_async()
