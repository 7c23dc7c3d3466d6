"""A process that asks the GPU adapter what it is told to: one JSON request a line on stdin, one JSON line in answer.

`{"id": 1, "ask": QUESTION, "deadline_s": 2, "uuids": [...]}` is answered, as soon as it can be, by `{"id": 1, "answer": ...}`
or `{"id": 1, "unobserved": reason}`; the questions are those of `_answer`. A ping is answered by the event loop itself;
`{"id": 2, "ask": "cancel", "of": 1}` cancels the task of a request, which then gets no answer. At the end of stdin the
process ends as a daemon does: it returns from main, whatever the driver is doing.
"""

import asyncio
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mgpu_llm.adapters.gpus import Gpus, GpusUnobserved


async def _answer(gpus: Gpus, request: dict[str, Any]) -> dict[str, Any]:
    match request["ask"]:
        case "inventory":
            return {"answer": [asdict(gpu) for gpu in await gpus.inventory(request["deadline_s"])]}
        case "read":
            return {"answer": [asdict(gpu) for gpu in await gpus.read(request["uuids"], request["deadline_s"])]}
        case "health":
            return {"answer": [asdict(gpu) for gpu in await gpus.health(request["uuids"], request["deadline_s"])]}
        case "details":
            return {"answer": asdict(await gpus.details(request["deadline_s"]))}
        case "nvlinked":
            pairs = await gpus.nvlinked(request["uuids"], request["deadline_s"])
            return {"answer": sorted(sorted(pair) for pair in pairs)}
        case "addresses":
            return {"answer": await gpus.addresses(request["uuids"], request["deadline_s"])}
        case "ping":
            return {"answer": "pong"}
        case unknown:
            raise ValueError(f"cannot ask {unknown!r}")


async def _serve_one(gpus: Gpus, request: dict[str, Any]) -> None:
    try:
        said = await _answer(gpus, request)
    except GpusUnobserved as unobserved:
        said = {"unobserved": unobserved.reason}
    print(json.dumps({"id": request["id"], **said}), flush=True)


async def _main() -> None:
    requests = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(requests), sys.stdin)
    gpus = Gpus(Path(os.environ["FAKE_DEVICES"])) if "FAKE_DEVICES" in os.environ else Gpus()
    serving: dict[int, asyncio.Task[None]] = {}
    async for line in requests:
        request = json.loads(line)
        if request["ask"] == "cancel":
            serving[request["of"]].cancel()
        else:
            serving[request["id"]] = asyncio.create_task(_serve_one(gpus, request))
    for task in serving.values():
        task.cancel()


if __name__ == "__main__":
    asyncio.run(_main())
