"""The completion probe against servers that answer oddly."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest

from mgpu_llm.adapters.health import Answer, Probes
from mgpu_llm.core.endpoint import Endpoint
from tests.support.engine_run import until

#: One name in the list of models as vLLM writes it, with its permissions.
PERMISSION = {f"allow_{what}": True for what in ("create_engine", "sampling", "logprobs", "search_indices", "view")}


@dataclass(kw_only=True)
class Server:
    """Answers GET with the parts of `models`, one after the other, and takes every POST; `asked` are the POSTs."""

    models: Sequence[bytes]
    asked: list[bytes] = field(default_factory=list)
    open: list[asyncio.StreamWriter] = field(default_factory=list)

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open.append(writer)
        head = await reader.readuntil(b"\r\n\r\n")
        parts = self.models
        if head.startswith(b"POST"):
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            self.asked.append(await reader.readexactly(int(length.partition(b":")[2])))
            parts = (b"{}",)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % sum(map(len, parts)))
        for part in parts:
            writer.write(part)
            await writer.drain()
            await asyncio.sleep(0.05)  # so that the parts arrive apart
        writer.close()
        await writer.wait_closed()
        self.open.remove(writer)


async def prove(server: Server) -> Answer:
    listener = await asyncio.start_server(server.answer, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    endpoint = Endpoint(url=f"http://127.0.0.1:{port}", uds=None, api_key=None, served_name="toy")
    probes = Probes(endpoint, health_timeout_s=30, completion_timeout_s=30)
    try:
        return await probes.completion()
    finally:
        await probes.close()
        listener.close()
        await until("every connection is closed", lambda: not server.open)


@pytest.mark.parametrize(
    "models", [b'{"data":5}', b'{"data":true}', b'{"data":"toy"}', b"[]", b'{"data":[5,{"id":5}]}']
)
def test_a_list_of_models_that_is_none_costs_nothing_but_the_name(models: bytes) -> None:
    server = Server(models=[models])
    assert asyncio.run(prove(server)).good
    assert json.loads(server.asked[0])["model"] == "toy"


@pytest.mark.parametrize("models", [b"[" * 60_000, b"no JSON", b"\xff"])
def test_an_answer_that_is_no_json_fails_the_probe_and_nothing_else(models: bytes) -> None:
    answer = asyncio.run(prove(Server(models=[models])))
    assert not answer.good
    assert not answer.hopeless


def test_a_list_of_hundreds_of_adapters_that_comes_in_pieces_is_read_whole() -> None:
    names = [*(f"adapter-{number}" for number in range(400)), "toy"]
    models = json.dumps({"data": [{"id": name, "permission": [PERMISSION] * 3} for name in names]}).encode()
    assert len(models) > 100_000
    server = Server(models=[models[:1000], models[1000:90_000], models[90_000:]])
    assert asyncio.run(prove(server)).good
    assert json.loads(server.asked[0])["model"] == "toy"


def test_other_timeouts_hold_from_the_next_probe_on() -> None:
    async def probed() -> list[str]:
        async def never(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await over.wait()
            writer.close()

        over = asyncio.Event()
        listener = await asyncio.start_server(never, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        endpoint = Endpoint(url=url, uds=None, api_key=None, served_name="toy")
        probes = Probes(endpoint, health_timeout_s=600, completion_timeout_s=600)
        probes.allow(health_timeout_s=0.02, completion_timeout_s=0.03)
        told = [(await probes.health()).detail, (await probes.completion()).detail]
        await probes.close()
        over.set()
        listener.close()
        return told

    assert asyncio.run(probed()) == ["no answer within 0.02 s", "no answer within 0.03 s"]
