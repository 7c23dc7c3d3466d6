"""Processes for the tests of stacks: what they do, how they are started, and what stands in for py-spy."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mgpu_llm.adapters.engine.tree import all_stats

SLEEPING = """
import threading, time
def rest(): time.sleep(3600)
def nap(): time.sleep(3600)
threading.Thread(target=nap, name="Napper", daemon=True).start()
print("up", flush=True)
rest()
"""
BUSY = """
import json
def step(turn): return json.dumps({"turn": [turn, str(turn)]})
def work():
    turn = 0
    while True: turn += len(step(turn)) + sum(n * n for n in range(turn % 100))
print("up", flush=True)
work()
"""
#: Spins in C and never lets go of the interpreter's lock.
STUCK = """
import ctypes, threading, time
def nap(): time.sleep(3600)
threading.Thread(target=nap, name="Napper", daemon=True).start()
def spin():
    libc, flag = ctypes.PyDLL(None), ctypes.c_int()
    libc.pthread_spin_init(ctypes.byref(flag), 0)
    libc.pthread_spin_lock(ctypes.byref(flag))
    libc.pthread_spin_lock(ctypes.byref(flag))
print("up", flush=True)
spin()
"""
#: Polls as vLLM does for a peer: Python code that yields the processor, inside a context manager made of a generator.
POLLING = """
import contextlib, os
@contextlib.contextmanager
def acquire_read():
    while True:
        os.sched_yield()
        with contextlib.suppress(ValueError): continue
        yield
def dequeue():
    with acquire_read(): pass
print("up", flush=True)
dequeue()
"""


@contextmanager
def sleeping_program() -> Iterator[int]:
    """The pid of a program that is not Python's and sleeps."""
    with subprocess.Popen(["sleep", "3600"]) as process:
        try:
            wait_until("it sleeps", lambda: Path(f"/proc/{process.pid}/wchan").read_text() != "0")
            yield process.pid
        finally:
            process.kill()


@contextmanager
def running_python(folder: Path, code: str) -> Iterator[int]:
    """The pid of a Python that runs `code` from FOLDER/model/weights/load.py and has said "up"."""
    file = folder / "model/weights/load.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(code)
    with subprocess.Popen([sys.executable, "-S", str(file)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"up\n"
            yield process.pid
        finally:
            process.kill()


def stand_in(folder: Path, shell: str) -> Path:
    """A program in the place of py-spy: it is called with "dump --pid PID --json --nonblocking"."""
    program = folder / "py-spy"
    program.write_text(f"#!{sys.executable} -S\nimport os, sys, time\npid = int(sys.argv[3])\n{shell}\n")
    program.chmod(0o755)
    return program


def spies() -> list[str]:
    """The py-spies that are our children, zombies too."""
    return [str(stat) for stat in all_stats().values() if stat.name == "py-spy" and stat.parent == os.getpid()]


def wait_until(what: str, holds: Callable[[], bool], limit_s: float = 30.0) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {limit_s} s in vain until {what}")
        time.sleep(0.02)
