from __future__ import annotations

import asyncio
import os
from pathlib import Path

from mgpu_llm.core.events import EngineExited, ProcessSample
from tests.support.engine_run import Run, running, until

FAMILY = """
import ctypes, os, sys, time
def name(text): ctypes.CDLL(None).prctl(15, text, 0, 0, 0)
if os.fork() == 0:
    name(b"Worker 1) S (x")
    while True: time.sleep(3600)
if os.fork() == 0:
    if os.fork(): os._exit(0)
    name(b"stray")
    print("stray is there", flush=True)
    while True: time.sleep(3600)
os.wait()
kept = []
with open(sys.executable, "rb") as file:
    for line in sys.stdin:
        pass
    print("family is there", flush=True)
    while True:
        time.sleep(0.05)
        kept.append(os.urandom(1 << 20))
        file.seek(0)
        file.read(1 << 16)
        if len(kept) > 100: kept.clear()
"""


def names(run: Run) -> dict[str, ProcessSample]:
    return {sample.name: sample for sample in run.engine.sample()}


def test_a_sample_has_every_process_with_odd_names_and_those_that_lost_their_parent(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as run:
            assert run.engine.sample() == ()
            await run.python(FAMILY)
            await run.line("family is there")
            await until("all three are seen", lambda: {"Worker 1) S (x", "stray"} < set(names(run)))
            first = run.engine.sample()
            assert len(first) == 3
            assert [sample.pid for sample in first] == sorted(sample.pid for sample in first)
            for sample in first:
                assert sample.rss_bytes > 1 << 20
                assert sample.started > 0
                assert sample.state in "RSD"

    asyncio.run(story())


def test_what_a_process_uses_and_reads_is_seen_to_grow(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as run:
            await run.python(FAMILY)
            await run.line("family is there")
            top = run.engine.sample()[0]

            def grown() -> bool:
                now = run.engine.sample()[0]
                assert now.pid == top.pid
                assert now.started == top.started
                assert now.read_chars is not None
                assert top.read_chars is not None
                return (
                    now.rss_bytes > top.rss_bytes + (2 << 20)
                    and now.read_chars >= top.read_chars + (1 << 17)
                    and now.cpu_s > top.cpu_s
                )

            await until("memory, reads and processor time have grown", grown)

    asyncio.run(story())


def test_a_process_that_ended_is_no_longer_sampled(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as run:
            await run.python("pass")
            await run.first(EngineExited)
            assert run.engine.sample() == ()

    asyncio.run(story())


def test_sampling_while_processes_come_and_go_never_fails(tmp_path: Path) -> None:
    code = """
import os
print("busy", flush=True)
while True:
    for _ in range(8):
        if os.fork() == 0: os._exit(0)
    for _ in range(8): os.wait()
"""

    async def story() -> None:
        async with running(tmp_path) as run:
            await run.python(code)
            await run.line("busy")
            top = os.getpid()
            for _ in range(50):
                assert top not in {sample.pid for sample in run.engine.sample()}
                await asyncio.sleep(0)

    asyncio.run(story())
