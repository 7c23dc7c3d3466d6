from __future__ import annotations

import asyncio
import errno
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from mgpu_llm.adapters.engine.command import spawn_problem
from mgpu_llm.adapters.engine.process import EngineProcess
from mgpu_llm.core.events import EngineExited, EngineGone, EngineSpawned, EngineSpawnFailed
from tests.support.engine_run import Run, running

SLEEP = "import time; time.sleep(600)"


def test_an_engine_is_spawned_told_of_read_and_its_exit_status_noticed_after_its_last_line(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as run:
            await run.python("print('hello'); print('last words', end=''); raise SystemExit(7)", attempt=3)
            exited = await run.first(EngineExited)
            assert (exited.attempt, exited.status) == (3, 7)
            assert [type(event).__name__ for event in run.events] == [
                "EngineSpawned",
                "LineRead",
                "LineRead",
                "EngineExited",
            ]
            assert run.lines == ["hello", "last words"]
            assert run.engine.tail.last(5) == ("hello", "last words")
            await run.engine.kill(10)
            assert run.events[-1] == EngineGone(at=run.events[-1].at, attempt=3, remarks=())

    asyncio.run(story())


def test_death_by_a_signal_is_minus_its_number_and_is_noticed_at_once(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as run:
            await run.python(SLEEP)
            spawned = await run.first(EngineSpawned)
            killed_at = time.monotonic()
            os.kill(spawned.pid, signal.SIGKILL)
            exited = await run.first(EngineExited)
            assert exited.status == -signal.SIGKILL
            assert exited.at - killed_at < 0.5

    asyncio.run(story())


def test_the_engine_has_a_session_of_its_own_no_stdin_and_the_environment_it_was_given(tmp_path: Path) -> None:
    code = (
        "import os, sys; print(os.getsid(0) == os.getpid() == os.getpgid(0)); print(repr(sys.stdin.read()));"
        "print(os.environ['ASKED'], os.environ['VLLM_RPC_BASE_PATH'], os.environ['SPT_NOENV']); print(os.getcwd());"
        "print(oct(os.stat(os.environ['VLLM_RPC_BASE_PATH']).st_mode & 0o777))"
    )

    async def story() -> None:
        async with running(tmp_path) as run:
            await run.engine.spawn(1, (sys.executable, "-S", "-c", code), {"ASKED": "for"}, tmp_path)
            await run.first(EngineExited)
            assert run.lines[:2] == ["True", "''"]
            asked, sockets, keep = run.lines[2].split()
            assert (asked, keep) == ("for", "1")
            assert len(sockets) + 1 + 36 <= 107
            assert run.lines[3:] == [str(tmp_path), "0o700"]
            folders.append(Path(sockets))

    folders: list[Path] = []
    asyncio.run(story())
    assert not folders[0].exists()


def spawn_failure(tmp_path: Path, command: tuple[str, ...], env: dict[str, str] | None = None) -> EngineSpawnFailed:
    async def story() -> EngineSpawnFailed:
        run = Run(tmp_path)
        await run.engine.spawn(4, command, os.environ if env is None else env)
        (failed,) = run.all(EngineSpawnFailed)
        assert run.events == [failed]
        await run.engine.kill(1)
        assert run.events == [failed]
        return failed

    before = set(Path("/proc/self/fd").iterdir())
    failed = asyncio.run(story())
    assert set(Path("/proc/self/fd").iterdir()) == before
    assert failed.attempt == 4
    assert failed.reason.startswith("cannot start the engine: ")
    return failed


def script(path: Path, content: bytes, mode: int = 0o755) -> str:
    path.write_bytes(content)
    path.chmod(mode)
    return str(path)


@pytest.mark.parametrize(
    ("content", "mode", "why"),
    [
        (None, 0, "does not exist"),
        (b"#!/bin/sh\n", 0o644, "may not be executed"),
        (b"#!/opt/gone/bin/python3\n", 0o755, "wants the interpreter '/opt/gone/bin/python3', which does not exist"),
        (b"just words", 0o755, "neither a program nor a script"),
    ],
)
def test_a_command_that_cannot_run_is_hopeless_and_named(
    tmp_path: Path, content: bytes | None, mode: int, why: str
) -> None:
    name = str(tmp_path / "vllm") if content is None else script(tmp_path / "vllm", content, mode)
    failed = spawn_failure(tmp_path, (name, "serve"))
    assert name in failed.reason
    assert why in failed.reason
    assert failed.hopeless


def test_a_command_that_is_not_in_the_path_is_hopeless_and_the_path_is_told(tmp_path: Path) -> None:
    failed = spawn_failure(tmp_path, ("vllm-nowhere", "serve"), {"PATH": str(tmp_path)})
    assert "no 'vllm-nowhere' in PATH" in failed.reason
    assert str(tmp_path) in failed.reason
    assert failed.hopeless


def test_a_full_disk_is_worth_another_try_and_named() -> None:
    why = spawn_problem(OSError(errno.ENOSPC, "No space left on device", "/run/mgpu-llm/zmq-x"))
    assert why == ("cannot start the engine: '/run/mgpu-llm/zmq-x': No space left on device", False)


def test_too_long_a_command_line_is_hopeless_and_says_so(tmp_path: Path) -> None:
    failed = spawn_failure(tmp_path, (sys.executable, *["x" * 100_000] * 40))
    assert "command line and environment together are too long" in failed.reason
    assert failed.hopeless


def test_a_nul_character_in_an_argument_is_hopeless(tmp_path: Path) -> None:
    failed = spawn_failure(tmp_path, (sys.executable, "-c", "\0"))
    assert "null byte" in failed.reason
    assert failed.hopeless


def test_terminate_asks_the_top_process_alone(tmp_path: Path) -> None:
    code = """
import os, signal, time
def on_term(*_):
    print("asked", flush=True)
    raise SystemExit(5)
if os.fork() == 0:
    signal.signal(signal.SIGTERM, lambda *_: print("child asked", flush=True))
    print("child is there", flush=True)
    while True: time.sleep(1)
signal.signal(signal.SIGTERM, on_term)
print("ready", flush=True)
while True: time.sleep(1)
"""

    async def story() -> None:
        async with running(tmp_path) as run:
            await run.python(code)
            await run.line("ready")
            await run.line("child is there")
            run.engine.terminate()
            exited = await run.first(EngineExited)
            assert exited.status == 5
            assert [line for line in run.lines if "asked" in line] == ["asked"]

    asyncio.run(story())


def test_asking_an_engine_that_has_ended_does_nothing(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as run:
            await run.python("import time; print('up', flush=True); time.sleep(600)")
            await run.line("up")
            run.engine.terminate()
            exited = await run.first(EngineExited)
            assert exited.status == -signal.SIGTERM
            run.engine.terminate()
            await run.engine.kill(10)
            run.engine.terminate()
            assert len(run.all(EngineExited)) == 1

    asyncio.run(story())


def test_what_orphans_print_after_the_exit_is_still_read(tmp_path: Path) -> None:
    code = """
import os, time
top = os.getpid()
if os.fork() == 0:
    while os.getppid() == top: time.sleep(0.01)
    time.sleep(0.2)
    print("orphan speaks", flush=True)
    time.sleep(600)
print("bye", flush=True)
os._exit(3)
"""

    async def story() -> None:
        async with running(tmp_path) as run:
            await run.python(code)
            assert (await run.first(EngineExited)).status == 3
            await run.line("orphan speaks")
            assert len(run.engine.pids()) == 1
            await run.engine.kill(10)
            assert run.engine.pids() == ()

    asyncio.run(story())


def test_there_is_one_engine_at_a_time_and_the_next_may_come_when_it_is_gone(tmp_path: Path) -> None:
    async def story() -> None:
        async with running(tmp_path) as run:
            await run.python(SLEEP, attempt=1)
            with pytest.raises(RuntimeError, match="attempt 1 is not gone"):
                await run.python(SLEEP, attempt=2)
            await run.engine.kill(10)
            await run.python(SLEEP, attempt=2)
            await run.engine.kill(10)
            assert [(type(event).__name__, event.attempt) for event in run.events] == [
                ("EngineSpawned", 1),
                ("EngineExited", 1),
                ("EngineGone", 1),
                ("EngineSpawned", 2),
                ("EngineExited", 2),
                ("EngineGone", 2),
            ]

    asyncio.run(story())


def test_what_is_awaited_before_gone_comes_after_the_last_process_and_its_remarks_are_passed_on(tmp_path: Path) -> None:
    async def story() -> None:
        run = Run(tmp_path)
        seen: list[tuple[int, tuple[int, ...]]] = []

        async def before_gone(attempt: int) -> tuple[str, ...]:
            seen.append((attempt, engine.pids()))
            return ("GPU memory stayed",)

        engine = EngineProcess(
            clock=time.monotonic, emit=run.events.append, runtime_dir=tmp_path, before_gone=before_gone
        )
        await engine.spawn(1, (sys.executable, "-S", "-c", SLEEP), os.environ)
        await engine.kill(10)
        assert seen == [(1, ())]
        assert (await run.first(EngineGone)).remarks == ("GPU memory stayed",)

    asyncio.run(story())
