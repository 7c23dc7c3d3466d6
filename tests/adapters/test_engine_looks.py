"""Looks at a walked tree that do not read every process of the host, and yet miss nobody for long."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mgpu_llm.adapters.engine.process import adopt_orphans
from mgpu_llm.adapters.engine.tree import LIST_EVERY, WHOLE_EVERY, WalkedTree, read_stat

#: At each line that it reads it forks a child, in a session of its own, and says its pid.
FORKING = """
import os, sys, time
for line in sys.stdin:
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.setsid()
        os.write(write, b"x")
        time.sleep(600)
    os.read(read, 1)
    print(child, flush=True)
"""


class Forking:
    """A process that forks when it is told to, and the tree below it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", FORKING],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        top = read_stat(self.process.pid)
        assert top is not None
        self.tree = WalkedTree(top, lambda _: False)

    def fork(self) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def pids(self, *, whole: bool = False) -> set[int]:
        return {stat.pid for stat in self.tree.members(whole=whole)}

    def __enter__(self) -> Forking:
        return self

    def __exit__(self, *_: object) -> None:
        while self.tree.kill():
            pass
        self.process.communicate()


def test_a_new_process_is_seen_within_a_few_looks_and_at_once_by_a_whole_one() -> None:
    with Forking() as engine:
        assert engine.pids() == {engine.process.pid}
        first = engine.fork()
        seen = [engine.pids() for _ in range(LIST_EVERY)]
        assert seen[-1] == {engine.process.pid, first}
        second = engine.fork()
        assert engine.pids(whole=True) == {engine.process.pid, first, second}


def test_a_kill_finds_those_that_no_look_has_seen() -> None:
    with Forking() as engine:
        engine.pids()
        child = engine.fork()
        assert {stat.pid for stat in engine.tree.kill()} == {engine.process.pid, child}


def test_a_process_that_lost_its_parent_stays_in_sight_whatever_kind_of_look_it_is() -> None:
    adopt_orphans(True)
    try:
        with Forking() as engine:
            child = engine.fork()
            assert child in engine.pids(whole=True)
            engine.process.kill()
            for _ in range(2 * WHOLE_EVERY):
                assert child in engine.pids()
    finally:
        adopt_orphans(False)


def test_strangers_are_not_read_again_until_a_whole_look(tmp_path: Path) -> None:
    with Forking() as engine:
        engine.pids()
        assert str(os.getpid()) in engine.tree._strangers
        for _ in range(2 * WHOLE_EVERY):
            assert engine.pids() == {engine.process.pid}


LAST_PID = Path("/proc/sys/kernel/ns_last_pid")


@pytest.mark.skipif(not os.access(LAST_PID, os.W_OK), reason="needs root, to choose a pid")
def test_a_process_that_gets_the_pid_of_a_stranger_is_seen_by_the_next_whole_look() -> None:
    with Forking() as engine:

        def reused() -> int | None:
            with subprocess.Popen(["/bin/sleep", "600"]) as stranger:
                engine.pids(whole=True)
                assert str(stranger.pid) in engine.tree._strangers
                stranger.kill()
            LAST_PID.write_text(str(stranger.pid - 1))
            return stranger.pid if engine.fork() == stranger.pid else None

        reused_pid = next(
            filter(None, (reused() for _ in range(100)))
        )  # unless somebody else takes it, again and again
        assert any(reused_pid in engine.pids() for _ in range(WHOLE_EVERY + 1))
