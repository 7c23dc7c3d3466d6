"""Record one start of an unmodified vLLM, without judging it, as docs/recordings.md has it.

    python -m tests.bench.record_start --out FILE.jsonl.gz --url http://127.0.0.1:PORT [options] -- COMMAND...

Runs on the daemon's dependencies alone, also as `PYTHONPATH=daemon:. python3 -m tests.bench.record_start` on a GPU host. The
recording ends when /health answers, the engine exits, --limit is over, or nothing has moved for --still seconds. Then every
process of the engine is killed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from mgpu_llm.adapters.engine.process import EngineProcess
from mgpu_llm.adapters.engine.stacks import take as take_stacks
from mgpu_llm.adapters.gpus import Gpus
from mgpu_llm.adapters.health import Probes
from mgpu_llm.core import progress as heart
from mgpu_llm.core import recording
from mgpu_llm.core.endpoint import Endpoint
from mgpu_llm.core.events import (
    EngineExited,
    EngineSpawned,
    EngineSpawnFailed,
    EngineStuck,
    Event,
    GpusSampled,
    GpusUnobserved,
    LineRead,
    ProcessesSampled,
    StacksTaken,
)
from mgpu_llm.observer import Observer
from tests.bench import faults
from tests.bench.faults import Fault
from tests.bench.tape import SECRET, Tape, secrets

#: Once nothing has moved for so long, it is worth a look at the stacks: healthy starts stand still for less.
QUIET_S: Final = 3.0
STACKS_DEADLINE_S: Final = 4.0
PROBE_EVERY_S: Final = 0.5
KILL_S: Final = 30.0
HARMLESS: Final = re.compile(r"NCCL|VLLM|TORCH|MGPU|CUDA_VISIBLE_DEVICES$")
ATTEMPT: Final = 1


class RecordError(Exception):
    """Nothing could be recorded; the text says why."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to record, and until when. `gpus` are NVML's indices; `rewrites` are pairs of texts, done in every row."""

    out: Path
    url: str
    command: tuple[str, ...]
    gpus: tuple[str, ...] = ()
    limit_s: float = 300.0
    still_s: float | None = None
    stacks_every_s: float = 5.0
    fault: str = ""
    note: str = ""
    rewrites: tuple[tuple[str, str], ...] = ()


class Recorder:
    """Everything about the one start. `emit` takes the adapters' events; `ended` becomes the note that ends it."""

    def __init__(self, options: Options, env: Mapping[str, str], runtime_dir: Path) -> None:
        self._options = options
        self._env = env
        self._tape = Tape(
            options.out, (*options.rewrites, *((secret, "***") for secret in secrets(options.command, env)))
        )
        self._fault = Fault(options.fault) if options.fault else None
        self._spawned_at = 0.0
        self._failed = ""
        self._progress = heart.begin(0.0)
        self._asides = set[asyncio.Task[None]]()
        self.ended: asyncio.Future[recording.Row] = asyncio.get_running_loop().create_future()
        self.engine = EngineProcess(clock=time.monotonic, emit=self.emit, runtime_dir=runtime_dir)

    async def run(self) -> recording.Row:
        """Record until the end; returns the note that ended it. Raises RecordError."""
        gpus, uuids = Gpus(), dict[str, str]()
        if self._options.gpus:
            uuids = {str(gpu.index): gpu.uuid for gpu in await gpus.inventory(60)}
        if missing := [index for index in self._options.gpus if index not in uuids]:
            raise RecordError(f"cannot watch GPU {', '.join(missing)}: this host has {', '.join(uuids) or 'none'}")
        shown = {name: value for name, value in self._env.items() if HARMLESS.match(name) and not SECRET.search(name)}
        self._note("cmd", cmd=list(self._options.command), env=shown)
        if self._options.note:
            self._note("about", text=self._options.note)
        await self.engine.spawn(ATTEMPT, self._options.command, self._env)
        if self._failed:
            raise RecordError(self._failed)
        observer = Observer(gpus, uuids, time.monotonic, self.emit)
        watching = observer.watch(ATTEMPT, self._options.gpus, self.engine.sample, lambda: True, self.engine.pressure)
        async with contextlib.AsyncExitStack() as stack:
            probes = Probes(Endpoint(url=self._options.url), health_timeout_s=1.0, completion_timeout_s=60.0)
            stack.push_async_callback(probes.close)
            watchers = [
                asyncio.create_task(work) for work in (watching, self._watch_stacks(), self._watch_health(probes))
            ]
            stack.push_async_callback(_end, watchers)
            waited: list[asyncio.Future[Any]] = [self.ended, *watchers]
            await asyncio.wait(waited, timeout=self._options.limit_s, return_when=asyncio.FIRST_COMPLETED)
            for watcher in watchers:
                if watcher.done():
                    watcher.result()  # one that ends by itself has failed: this raises
            self._end("limit")  # unless it has ended
            end = self.ended.result()
            self._tape.write(end)
            if end["what"] == "healthy":
                asked_at = self._now()
                answer = await probes.completion()
                self._note("completion", served=answer.good, detail=answer.detail, s=round(self._now() - asked_at, 3))
        return end

    async def close(self) -> None:
        """Kill what is left of the engine and close the file."""
        await _end(list(self._asides))
        self._tape.close()
        await self.engine.kill(KILL_S)

    def emit(self, event: Event) -> None:
        if isinstance(event, EngineStuck):
            print(f"still there after SIGKILL: {', '.join(event.holders)}", file=sys.stderr)
        if self.ended.done():
            return
        match event:
            case EngineSpawned():
                self._spawned_at = event.at
                self._progress = heart.begin(event.at)
            case EngineSpawnFailed():
                self._failed = event.reason
            case EngineExited():
                self._end("exit", rc=event.status)
            case _:
                if row := recording.to_row(event, self._spawned_at):
                    self._tape.write(row)
                self._fold(event)

    def _fold(self, event: Event) -> None:
        match event:
            case LineRead():
                self._progress = heart.after_line(self._progress, event)
                if self._fault is not None and self._fault.is_due(event.text):
                    self._asides.add(asyncio.create_task(self._fault.do(self.engine.pids, self._note)))
            case ProcessesSampled():
                self._progress = heart.after_processes(self._progress, event)
            case GpusSampled():
                self._progress = heart.after_gpus(self._progress, event)
            case GpusUnobserved():
                self._progress = heart.after_gpus_unobserved(self._progress, event)
            case _:
                return
        if self._options.still_s is not None and self._progress.quiet_s >= self._options.still_s:
            self._end("limit", still_s=round(self._progress.quiet_s, 1))

    def _now(self) -> float:
        return time.monotonic() - self._spawned_at if self._spawned_at else 0.0

    def _note(self, what: str, **more: object) -> None:
        self._tape.write(recording.note(self._now(), what, **more))

    def _end(self, what: str, **more: object) -> None:
        if not self.ended.done():
            self.ended.set_result(recording.note(self._now(), what, **more))

    async def _watch_health(self, probes: Probes) -> None:
        while True:
            if (await probes.health()).good:
                self._end("healthy")
            await asyncio.sleep(PROBE_EVERY_S)

    async def _watch_stacks(self) -> None:
        while True:
            if self._progress.quiet_s >= QUIET_S:
                stacks, unobserved = await take_stacks(self.engine.pids(), STACKS_DEADLINE_S)
                self.emit(StacksTaken(at=time.monotonic(), attempt=ATTEMPT, stacks=stacks, unobserved=unobserved))
                await asyncio.sleep(self._options.stacks_every_s)
            else:
                await asyncio.sleep(PROBE_EVERY_S)


async def _end(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def record(options: Options, env: Mapping[str, str]) -> recording.Row:
    """Record one start with `env` as the engine's environment; returns the note that ended it. Raises RecordError."""
    with tempfile.TemporaryDirectory(prefix="mgpu-record-") as runtime_dir:
        recorder = Recorder(options, env, Path(runtime_dir))
        # Killed by SIGTERM as by Ctrl-C: the engine would go on without us.
        me = asyncio.current_task()
        assert me is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, me.cancel)
        try:
            return await recorder.run()
        finally:
            await recorder.close()


def options_of(argv: Sequence[str]) -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where to write: FILE.jsonl.gz")
    parser.add_argument("--url", required=True, help="where the engine will serve")
    parser.add_argument("--gpus", default="", help="NVML indices with commas between them; the engine sees these alone")
    parser.add_argument("--limit", type=float, default=300.0, help="stop watching after so many seconds")
    parser.add_argument("--still", type=float, help="stop watching once nothing has moved for so many seconds")
    parser.add_argument("--stacks-every", type=float, default=5.0, help="seconds between stacks while nothing moves")
    parser.add_argument("--fault", default="", help="done once, when a line matches LINE:\n" + faults.FORMS)
    parser.add_argument("--note", default="", help="a text for people")
    parser.add_argument(
        "--rewrite", action="append", default=[], metavar="FROM=TO", help="in every row; may be repeated"
    )
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    given = parser.parse_args(argv)
    try:
        if given.fault:
            Fault(given.fault)
    except ValueError as error:
        parser.error(str(error))
    return Options(
        out=given.out,
        url=given.url.rstrip("/"),
        command=tuple(given.command),
        gpus=tuple(filter(None, given.gpus.split(","))),
        limit_s=given.limit,
        still_s=given.still,
        stacks_every_s=given.stacks_every,
        fault=given.fault,
        note=given.note,
        rewrites=tuple((pair.partition("=")[0], pair.partition("=")[2]) for pair in given.rewrite),
    )


def main() -> int:
    options = options_of(sys.argv[1:])
    env = dict(os.environ)
    if options.gpus:
        env |= {"CUDA_VISIBLE_DEVICES": ",".join(options.gpus), "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    try:
        end = asyncio.run(record(options, env))
    except RecordError as error:
        print(f"cannot record {shlex.join(options.command)}: {error}", file=sys.stderr)
        return os.EX_UNAVAILABLE
    print(f"{options.out}: {json.dumps(end)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
