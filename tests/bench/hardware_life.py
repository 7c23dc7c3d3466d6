"""One life of mgpud, or of vLLM alone, under the hardware bench: how long until it serves, what it said, what it left."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from mgpu_llm.adapters.engine import tags
from mgpu_llm.adapters.gpus import Gpu
from mgpu_llm.adapters.health import Probes
from mgpu_llm.config import launching, parse
from mgpu_llm.config.endpoint import endpoint
from mgpu_llm.control_api import SOCKET_NAME
from mgpu_llm.core.launch import argv, environment
from mgpu_llm.ctl.client import Client, Failure
from tests.bench.hardware_watch import MARK, Watch, clean_after
from tests.support.toy_setup import ROOT, free_port

#: How often the daemon asks a starting engine for a completion, and how long each answer may take (its defaults).
PROBE_EVERY_S: Final = 0.5
HEALTH_S: Final = 5.0
COMPLETION_S: Final = 30.0
STOP_S: Final = 60.0
ALONE_STOP_S: Final = 20.0
#: A vLLM that hangs ignores SIGTERM; it is asked all the same.
HUNG_STOP_S: Final = 1.0
POLL_S: Final = 0.1
#: An attempt has come to nothing, and the first that is said of it.
FAILURES: Final = ("engine.stalled", "engine.crashed", "engine.refused", "engine.averted")
VERDICTS: Final = (*FAILURES, "preflight.failed")
#: From a verdict until one of these the host is looked at closely.
CLEAN_BY: Final = ("engine.phase", "engine.ready")
#: A line of the daemon's own, at a file: date, time, level, event.
OWN: Final = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (\w+) ([a-z]+\.[a-z_.-]+(?: .*)?)$")
#: What vLLM says of its memory (0.26.0 and 0.32.0).
SAID: Final[Mapping[str, re.Pattern[str]]] = {
    "weights_gib": re.compile(r"Model loading took ([\d.]+) GiB"),
    "available_kv_gib": re.compile(r"Available KV cache memory: ([\d.]+) GiB"),
    "total_gib": re.compile(r"\(\d[\d.]*/(\d[\d.]*) GiB\) on startup"),
    "kv_tokens": re.compile(r"GPU KV cache size: ([\d,]+) tokens"),
}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all lives have in common. `python` is the engine's, `env` is set for it, `cards` are empty without GPUs."""

    out: Path
    model: Path
    python: str
    cards: tuple[Gpu, ...]
    args: tuple[str, ...]
    env: Mapping[str, str]
    tensor_parallel: int
    utilisation: float = 0.9


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One life: under mgpud with `preflight` in that mode, or alone with "" there."""

    name: str
    preflight: str
    fault: str = ""
    utilisation: float | None = None


@dataclass
class Said:
    """Lines of a process, each with the monotonic second in which it came; written to `log` as they come."""

    log: Path
    on_own: Callable[[str], None] = lambda _: None
    own: list[tuple[float, str, str]] = field(default_factory=list)
    memory: dict[str, list[float]] = field(default_factory=dict)

    def read(self, stream: IO[str]) -> None:
        """Until the stream ends, which may be long after the process has: its children hold it too."""
        with self.log.open("w", encoding="utf-8") as log:
            for line in stream:
                at = time.monotonic()
                log.write(line)
                log.flush()
                if found := OWN.fullmatch(line.rstrip()):
                    self.own.append((at, found[1], found[2]))
                    self.on_own(found[2].split(" ", 1)[0])
                for what, pattern in SAID.items():
                    if number := pattern.search(line):
                        self.memory.setdefault(what, []).append(float(number[1].replace(",", "")))

    def reading(self, process: subprocess.Popen[str]) -> threading.Thread:
        """Read what it says in a thread."""
        assert process.stdout is not None
        reader = threading.Thread(target=self.read, args=(process.stdout,), daemon=True)
        reader.start()
        return reader

    def first(self, event: str) -> float | None:
        """When the daemon first said so."""
        return next((at for at, _, line in list(self.own) if line.split(" ", 1)[0] == event), None)


def write_config(bench: Bench, wanted: Wanted, folder: Path) -> Path:
    """The config of one life in `folder`; returns its path."""
    env = {**bench.env, **({"MGPU_FAULT": wanted.fault} if wanted.fault else {})}
    use = [card.index for card in bench.cards] or "none"
    lines = [
        f'[model]\npath = {json.dumps(str(bench.model))}\nserved_name = "m"',
        f"[engine]\npython = {json.dumps(bench.python)}\nport = {free_port()}\nargs = {json.dumps(list(bench.args))}",
        "[engine.env]",
        *(f"{name} = {json.dumps(value)}" for name, value in env.items()),
        f"[gpus]\nuse = {json.dumps(use)}\ntensor_parallel = {bench.tensor_parallel}",
        f"memory_utilisation = {wanted.utilisation or bench.utilisation}\nlock_dirs = {json.dumps([str(folder)])}",
        f"[daemon]\nruntime_dir = {json.dumps(str(folder / 'run'))}\nstate_dir = {json.dumps(str(folder / 'state'))}",
    ]
    if wanted.preflight:
        # Nothing remembered: each start shall really check.
        lines.append(f'[preflight]\nmode = "{wanted.preflight}"\nremember = false')
    file = folder / "mgpu-llm.toml"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def _environ() -> dict[str, str]:
    return {**os.environ, MARK: str(os.getpid()), "PYTHONUNBUFFERED": "1"}


@dataclass
class Daemon:
    """A life of mgpud that has begun: what a series may look at and do meanwhile."""

    process: subprocess.Popen[str]
    client: Client
    said: Said
    watch: Watch
    began: float
    status: dict[str, Any] = field(default_factory=dict)
    screens: list[dict[str, Any]] = field(default_factory=list)

    def screen(self, words: str = "status") -> None:
        """Keep what `mgpuctl` shows now."""
        command = [sys.executable, "-m", "mgpu_llm.ctl", "--socket", self.client.path, *words.split()]
        shown = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30, env=_environ())
        at_s = round(time.monotonic() - self.began, 1)
        self.screens.append({"at_s": at_s, "command": f"mgpuctl {words}", "text": shown.stdout or shown.stderr})


def under_mgpud(
    bench: Bench,
    wanted: Wanted,
    folder: Path,
    before: tuple[int, ...],
    limit_s: float,
    meanwhile: Callable[[Daemon], None] = lambda _: None,
) -> dict[str, Any]:
    """One life of the daemon, until it serves, gives up, or `limit_s` is over. `meanwhile` is called again and again."""
    config = write_config(bench, wanted, folder)
    watch = Watch(tag=tags.prefix(folder / "run"), cards=bench.cards, before=before)
    with watch.looking():
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "mgpu_llm", "--config", str(config)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", cwd=ROOT, env=_environ(),
        )  # fmt: skip
        said = Said(bench.out / f"{wanted.name}.log", lambda event: _look_closely(watch, event))
        reader = said.reading(process)
        daemon = Daemon(process, Client(str(folder / "run" / SOCKET_NAME)), said, watch, began)
        try:
            _follow(daemon, limit_s, meanwhile)
        finally:
            stopped = _stop(daemon)
            reader.join(5)
    return {**_told(daemon, bool(bench.cards)), **stopped}


def _look_closely(watch: Watch, event: str) -> None:
    if event in VERDICTS:
        watch.close.set()
    elif event in CLEAN_BY:
        watch.close.clear()


def _follow(daemon: Daemon, limit_s: float, meanwhile: Callable[[Daemon], None]) -> None:
    while daemon.process.poll() is None and time.monotonic() - daemon.began < limit_s:
        if daemon.said.first("engine.ready") is not None:
            break
        with suppress(Failure):
            daemon.status = daemon.client.status_document()
        meanwhile(daemon)
        time.sleep(POLL_S)
    with suppress(Failure):
        daemon.status = daemon.client.status_document()
    meanwhile(daemon)


def _stop(daemon: Daemon) -> dict[str, Any]:
    """Ask it to end, as `systemctl stop` does."""
    gave_up = daemon.process.poll()
    asked = time.monotonic()
    daemon.process.terminate()
    try:
        status = daemon.process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        daemon.process.kill()
        return {"exit_status": daemon.process.wait(), "had_to_be_killed": True}
    stop_s = None if gave_up is not None else round(time.monotonic() - asked, 2)
    return {"exit_status": status, "gave_up": gave_up is not None, "stop_s": stop_s}


def _told(daemon: Daemon, watching_gpus: bool) -> dict[str, Any]:
    began, own = daemon.began, daemon.said.own
    ready = daemon.said.first("engine.ready")
    failures = [(at, line) for at, _, line in own if line.split(" ", 1)[0] in FAILURES]
    verdicts = [at for event in VERDICTS if (at := daemon.said.first(event)) is not None]
    kills = []
    for at, line in failures:
        clean_s = clean_after(daemon.watch.looks, at, watching_gpus)
        nexts = [then for then, _, said in own if then > at and said.startswith("engine.starting")]
        kills.append(
            {
                "verdict": line,
                "verdict_s": round(at - began, 2),
                "clean_s": None if clean_s is None else round(clean_s, 2),
                "next_start_s": round(nexts[0] - at, 2) if nexts else None,
            }
        )
    return {
        "ready_s": None if ready is None else round(ready - began, 2),
        "first_verdict_s": round(min(verdicts) - began, 2) if verdicts else None,
        "state": daemon.status.get("state", ""),
        "rung": daemon.status.get("rung", ""),
        "attempts": daemon.status.get("attempts", []),
        "kills": kills,
        "journal": [f"{at - began:7.1f} {level} {line}" for at, level, line in own],
        "screens": daemon.screens,
        "memory": daemon.said.memory,
    }


def alone(bench: Bench, wanted: Wanted, folder: Path, limit_s: float) -> dict[str, Any]:
    """vLLM by itself with the command line that the daemon would give it, until a completion has come or `limit_s` is over."""
    config = parse.load(write_config(bench, wanted, folder)).config
    environ = _environ()
    server = launching.to_server(config, launching.engine_command(config.engine, environ))
    gpus = tuple(str(card.index) for card in bench.cards) if bench.cards else None
    launch = launching.to_base_launch(config, gpus)
    command = argv(server, launch)
    # Without SPT_NOENV its processes would overwrite the mark by which they are found afterwards.
    env = {**environment(environ, launch), "SPT_NOENV": "1"}
    began = time.monotonic()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", cwd=folder, env=env,
    )  # fmt: skip
    said = Said(bench.out / f"{wanted.name}.log")
    said.reading(process)
    probes = Probes(endpoint(config, environ), health_timeout_s=HEALTH_S, completion_timeout_s=COMPLETION_S)
    ready = asyncio.run(_served(process, probes, began + limit_s))
    waited, ended = time.monotonic() - began, process.poll()
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(ALONE_STOP_S if ready is not None else HUNG_STOP_S)
    process.kill()
    process.wait()
    return {
        "ready_s": None if ready is None else round(ready - began, 2),
        "waited_s": round(waited, 1),
        "exit_status": ended,
        "memory": said.memory,
    }


async def _served(process: subprocess.Popen[str], probes: Probes, until: float) -> float | None:
    """When the first completion came, None if the engine ended or `until` came before."""
    try:
        while process.poll() is None and time.monotonic() < until:
            if (await probes.health()).good and (await probes.completion()).good:
                return time.monotonic()
            await asyncio.sleep(PROBE_EVERY_S)
        return None
    finally:
        await probes.close()
