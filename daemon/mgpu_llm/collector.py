"""Evidence of a failed attempt, gathered before its engine is ended, and put away without secrets.

Everything asked may be stuck, as the engine is: each source has a deadline of its own, they run side by side, and what has not
come by then is named as not observed.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import structlog

import mgpu_llm
from mgpu_llm.adapters import nccl_debug, nccl_ras
from mgpu_llm.adapters.engine import at_death, close_up, py_spy, stacks
from mgpu_llm.adapters.engine.aside import answered, aside
from mgpu_llm.adapters.engine.process import EngineProcess
from mgpu_llm.adapters.engine.tree import read_proc
from mgpu_llm.adapters.gpus import Gpus, GpusUnobserved
from mgpu_llm.adapters.host import kernel_log, surroundings
from mgpu_llm.adapters.host.program import Unanswered
from mgpu_llm.adapters.incidents import DOCUMENT, Incidents
from mgpu_llm.core import incident, redaction
from mgpu_llm.core.effects import KeepIncident
from mgpu_llm.core.events import StacksTaken

#: All of it within ten seconds: the slowest source, a second for a py-spy to end, and the writing.
ALL_S: Final = 9.8
STACKS_S: Final = 6.7
LOOK_S: Final = 2.0
BETWEEN_LOOKS_S: Final = 0.5
SOURCE_S: Final = 3.0
#: Programs have 4 s of their own, and 2 s each.
PROGRAM_S: Final = 5.0
WRITE_S: Final = 3.0
RAS_S: Final = 2.0
#: Of what is left then, so much for the engine's words at its death; with less than the least it is not asked for them.
AT_DEATH_S: Final = 2.0
AT_DEATH: Final = "stacks-at-death.txt"
LEAST_S: Final = 0.3
LINES: Final = 500
MOST_PROCESSES: Final = 64
#: A source's part of an incident; all files together have room in one (`Incidents.most_bytes`).
MOST_BYTES_OF_A_FILE: Final = 2 << 20
CUT: Final = "\n[cut here]\n"

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Launched:
    """What the attempt was begun with, and the looks at its stacks that were taken for the judgement, oldest first."""

    argv: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    looks: tuple[StacksTaken, ...] = ()


@dataclass(kw_only=True)
class _Gathered:
    """`files` are texts or JSON documents by name, `sources` says why one is not observed, "" if it is. `blind`: there are
    Python threads, and nothing could be seen of any."""

    files: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    blind: bool = False


class Collector:
    """`recording` names the recording of an attempt; `model` and `state_dir` are paths whose disks are looked at."""

    def __init__(
        self,
        *,
        engine: EngineProcess,
        gpus: Gpus,
        incidents: Incidents,
        recording: Callable[[int], str],
        model: str,
        state_dir: str,
        find_py_spy: Callable[[], Path | None] = py_spy.find,
    ) -> None:
        self._engine = engine
        self._gpus = gpus
        self._incidents = incidents
        self._recording = recording
        self._model = model
        self._state_dir = state_dir
        self._find_py_spy = find_py_spy

    async def keep(self, keep: KeepIncident, launched: Launched) -> bool:
        """Whether the incident is kept now; where not, that was said. Takes at most ten seconds. Raises nothing."""
        try:
            return await self._keep(keep, launched)
        except Exception as fault:  # noqa: BLE001 - told, and no reason to keep the engine alive
            why = f"a fault of the collector: {type(fault).__name__}: {fault}"
            log.warning("incident.failed", incident=keep.incident, reason=why)
            return False

    async def _keep(self, keep: KeepIncident, launched: Launched) -> bool:
        clock = asyncio.get_running_loop().time
        begun, at = clock(), datetime.now(UTC)
        found = await self._gather(keep, launched)
        if found.blind:
            # Last, because it ends the engine.
            left_s = ALL_S - WRITE_S - (clock() - begun)
            await self._observe(found, AT_DEATH, self._at_death(launched, min(AT_DEATH_S, left_s)), ALL_S)
        more = {
            "at": at.isoformat(timespec="milliseconds"),
            "gathered_in_s": round(clock() - begun, 2),
            "recording": self._recording(keep.attempt),
            "model": self._model,
        }
        # A host that thrashes is slow at this too: it may have what is left of the ten seconds.
        limit_s = max(WRITE_S, ALL_S - (clock() - begun))
        try:
            return await answered(lambda: self._put_away(keep, launched, found, more), limit_s)
        except TimeoutError:
            why = f"the disk has not answered for {limit_s:.0f} s"
            log.warning("incident.failed", incident=keep.incident, reason=why)
            return False

    async def _gather(self, keep: KeepIncident, launched: Launched) -> _Gathered:
        found = _Gathered()
        lines = self._engine.tail.last_of_this(LINES)
        found.files["engine.log"] = "".join(f"{line}\n" for line in lines)
        found.versions = {
            "mgpu-llm": mgpu_llm.__version__,
            "python": platform.python_version(),
            "kernel": platform.release(),
            **incident.versions_in(self._engine.tail.last_of_this(1_000_000)),
        }
        pids = await aside(self._engine.pids, SOURCE_S) or ()
        await asyncio.gather(
            self._observe(found, "stacks.txt", self._stacks(found, launched, pids), STACKS_S),
            self._observe(found, "processes.json", self._processes(pids), SOURCE_S),
            self._observe(found, "gpus.json", self._see_gpus(found, keep, pids), SOURCE_S),
            self._observe(
                found, "topology.txt", answered(lambda: _text(surroundings.topology()), PROGRAM_S), PROGRAM_S + 1
            ),
            self._observe(found, "kernel.log", answered(kernel_log.read, PROGRAM_S), PROGRAM_S + 1),
            self._observe(found, "host.json", self._host(launched.environment), SOURCE_S),
            self._observe(found, "nccl-ras.txt", answered(lambda: _ras(launched, pids), SOURCE_S), SOURCE_S + 1),
            self._observe(
                found, "nccl", answered(lambda: nccl_debug.read(launched.environment), SOURCE_S), SOURCE_S + 1
            ),
        )
        for name, text in found.files.pop("nccl", {}).items():
            found.files[f"{name}.log"] = text
        return found

    async def _observe(self, found: _Gathered, name: str, source: Coroutine[Any, Any, Any], limit_s: float) -> None:
        try:
            async with asyncio.timeout(limit_s):
                found.files[name] = await source
            found.sources[name] = ""
        except TimeoutError:
            found.sources[name] = "no answer in time"
        except (Unanswered, GpusUnobserved) as silence:
            found.sources[name] = str(silence)
        except Exception as fault:  # noqa: BLE001 - a fault in one source must cost neither the others nor the kill
            found.sources[name] = f"a fault of the collector: {type(fault).__name__}: {fault}"

    async def _stacks(self, found: _Gathered, launched: Launched, pids: Sequence[int]) -> str:
        looks = [("taken before the verdict", look.stacks, look.unobserved) for look in launched.looks]
        for turn in range(1 if looks else 2):
            if turn:
                await asyncio.sleep(BETWEEN_LOOKS_S)
            seen, unobserved = await stacks.take(pids, LOOK_S, self._find_py_spy)
            looks.append(("taken after the verdict", seen, unobserved))
            found.blind = bool(unobserved) and not any(stack.frames for _, taken, _ in looks for stack in taken)
            if not seen or found.blind:
                break
        if not any(seen for _, seen, _ in looks):
            raise Unanswered("no process of the engine is left")
        heads = [f"# look {number}, {when}" for number, (when, _, _) in enumerate(looks, start=1)]
        return "\n".join(f"{head}\n{stacks.text(seen, why)}" for head, (_, seen, why) in zip(heads, looks, strict=True))

    async def _at_death(self, launched: Launched, limit_s: float) -> str:
        if not at_death.is_asked_for(launched.environment):
            raise Unanswered(f"the engine runs without {at_death.VARIABLE}")
        if limit_s < LEAST_S:
            raise Unanswered("no time was left for it")
        lines = await self._engine.abort(limit_s)
        if all(line.startswith("#") for line in lines):
            raise Unanswered("; ".join(lines) or "the engine has ended")
        return _text(lines)

    async def _processes(self, pids: Sequence[int]) -> list[dict[str, Any]]:
        looked = await asyncio.gather(*(self._process(pid) for pid in pids[:MOST_PROCESSES]))
        return [process for process in looked if process]

    async def _process(self, pid: int) -> dict[str, Any]:
        limit_s = SOURCE_S - 0.5
        process, words = await asyncio.gather(
            aside(lambda: close_up.close_up(pid, self._model), limit_s),
            aside(lambda: close_up.command_line(pid), limit_s),
        )
        if process is None:
            return {"pid": pid, "unobserved": f"no answer within {limit_s:g} s"}
        argv: object = redaction.argv(words) if words is not None else "unobserved: it may be stuck in the driver"
        return {**process, "argv": argv} if process else {}

    async def _see_gpus(self, found: _Gathered, keep: KeepIncident, pids: Sequence[int]) -> dict[str, Any]:
        inventory = await self._gpus.inventory(SOURCE_S - 1)
        found.versions |= await self._gpus.versions(1.0)
        told = list[dict[str, Any]]()
        for gpu in inventory:
            one: dict[str, Any] = {"index": gpu.index, "uuid": gpu.uuid, "name": gpu.name}
            one["of_the_launch"] = str(gpu.index) in (keep.launch.gpus or ())
            if gpu.lost:
                told.append({**one, "unobserved": gpu.lost})
                continue
            try:
                (reading,) = await self._gpus.read((gpu.uuid,), 1.0)
            except GpusUnobserved as silence:
                told.append({**one, "unobserved": silence.reason})
                continue
            one |= {"used_bytes": reading.memory_used_bytes, "total_bytes": reading.memory_total_bytes}
            one |= {"utilisation_percent": reading.utilisation_percent, "power_mw": reading.power_mw}
            holders = reading.processes
            one["processes"] = holders and [
                {"pid": pid, "name": _name(pid), "used_bytes": used, "of_the_engine": pid in pids}
                for pid, used in holders
            ]
            told.append(one)
        return {"gpus": told}

    async def _host(self, environment: Mapping[str, str]) -> dict[str, Any]:
        places = surroundings.places(environment, self._model, self._state_dir)
        limit_s = SOURCE_S - 0.5
        host, shared, *disks = await asyncio.gather(
            aside(surroundings.read, limit_s),
            aside(surroundings.shared_memory, limit_s),
            *(aside(lambda path=path: surroundings.free(Path(path)), limit_s) for path in places.values()),  # type: ignore[misc]
        )
        silent = {"unobserved": f"no answer within {limit_s:g} s"}
        return {
            **(host or silent),
            "shared_memory": shared or silent,
            "disks": {what: disk or silent for what, disk in zip(places, disks, strict=True)},
        }

    def _put_away(self, keep: KeepIncident, launched: Launched, found: _Gathered, more: Mapping[str, object]) -> bool:
        """Take the secrets out and write. Blocks, and belongs to a thread."""
        document = incident.document(
            keep,
            argv=launched.argv,
            environment=launched.environment,
            versions=found.versions,
            sources=found.sources,
            more=more,
        )
        redactor = redaction.Redactor(redaction.secrets_of({**os.environ, **launched.environment}, launched.argv))
        files = sealed({DOCUMENT: document, **found.files}, redactor, self._incidents.most_bytes)
        return self._incidents.keep(keep.incident, files)


def sealed(files: Mapping[str, Any], redactor: redaction.Redactor, most_bytes: int) -> dict[str, bytes]:
    """Texts and documents as they may be written: without secrets, and `most_bytes` in all. What has no room is cut, the
    beginning of a text first; a document is left out."""
    done = dict[str, bytes]()
    for name, content in files.items():
        room = min(MOST_BYTES_OF_A_FILE, most_bytes - sum(map(len, done.values())))
        if isinstance(content, str):
            # Cut before it is searched for secrets, at a line's end: half a secret would not be known for one.
            text = content[-room:]
            text = text if len(text) == len(content) else CUT + text.partition("\n")[2]
            done[name] = redactor.text(text).encode("utf-8", "replace")[-room:] if room > len(CUT) else b""
        else:
            packed = json.dumps(redactor.tree(content), indent=1).encode()
            done[name] = packed if len(packed) < room else b'{"unobserved": "it has no room in an incident"}'
    return {name: content for name, content in done.items() if content}


def _ras(launched: Launched, pids: Sequence[int]) -> str:
    answer, why = nccl_ras.ask(launched.environment, pids, RAS_S)
    if not answer:
        raise Unanswered(why)
    return answer


def _name(pid: int) -> str:
    return read_proc(f"{pid}/comm").decode("utf-8", "replace").strip()


def _text(lines: Sequence[str]) -> str:
    return "".join(f"{line}\n" for line in lines)
