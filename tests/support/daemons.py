"""A real mgpud in a process of its own, and what a test wants to know of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from mgpu_llm.adapters.engine import tags
from mgpu_llm.ctl.client import Client, Failure
from tests.support.toy_setup import ROOT

MGPUD: Final = ROOT / ".venv/bin/mgpud"
MGPUCTL: Final = ROOT / ".venv/bin/mgpuctl"
POLL_S: Final = 0.1


class Daemon:
    """mgpud under `config`; its log is a file, so that nobody has to read along."""

    def __init__(self, config: Path, socket: Path, log: Path, environ: Mapping[str, str] | None = None) -> None:
        self.socket = socket
        self.log_file = log
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                [MGPUD, "--config", config],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env={**os.environ, **(environ or {})},
            )

    def status(self) -> dict[str, Any]:
        """What `mgpuctl status --json` says, without a process for each question; empty while nobody answers."""
        try:
            return Client(str(self.socket)).status_document()
        except Failure:
            return {}

    def ctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        command: list[str | Path] = [MGPUCTL, "--socket", self.socket, *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    def wait_for(self, what: Callable[[dict[str, Any]], bool], deadline_s: float) -> dict[str, Any]:
        """The first status for which `what` holds. Fails with the daemon's log when it ends, or at the deadline."""
        give_up_at = time.monotonic() + deadline_s
        while time.monotonic() < give_up_at:
            status = self.status()
            if status and what(status):
                return status
            if self.process.poll() is not None:
                break
            time.sleep(POLL_S)
        raise AssertionError(f"it never came, exit status {self.process.poll()}; the log ends:\n{self.log()[-6000:]}")

    def wait_until(self, state: str, deadline_s: float) -> dict[str, Any]:
        return self.wait_for(lambda status: status["state"] == state, deadline_s)

    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def events(self) -> list[str]:
        """The daemon's own lines (not the engine's), without time and level."""
        own = [line.split(" ", 3)[3] for line in self.log().splitlines() if line[:2] == "20" and line.count(" ") > 2]
        return [line for line in own if not line.startswith(("engine[", "engine "))]

    def stop(self, number: signal.Signals = signal.SIGTERM, deadline_s: float = 90) -> int:
        """Ask the daemon to end and return its exit status."""
        self.process.send_signal(number)
        return self.process.wait(deadline_s)


@contextmanager
def running(config: Path, socket: Path, log: Path, environ: Mapping[str, str] | None = None) -> Iterator[Daemon]:
    """A daemon that is ended with the test, whatever happens in between."""
    daemon = Daemon(config, socket, log, environ)
    try:
        yield daemon
    finally:
        if daemon.process.poll() is None:
            daemon.process.terminate()
            try:
                daemon.process.wait(90)
            except subprocess.TimeoutExpired:
                daemon.process.kill()
                daemon.process.wait()


def processes_of(runtime_dir: Path) -> list[str]:
    """Every living process that an engine of this daemon has left, as "pid name"."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environ = (entry / "environ").read_bytes()
                name = (entry / "comm").read_text().strip()
            except OSError:
                continue
            if f"{tags.VARIABLE}={tags.prefix(runtime_dir)}".encode() in environ:
                found.append(f"{entry.name} {name}")
    return found


def complete(url: str, prompt: str = "Hello") -> str:
    """One completion through the engine's OpenAI API."""
    body = json.dumps({"model": "toy", "prompt": prompt, "max_tokens": 4, "temperature": 0}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        text: str = json.load(answer)["choices"][0]["text"]
        return text
