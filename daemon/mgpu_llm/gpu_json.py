"""The GPUs of the host and who uses them, as one JSON document: for `mgpud --gpus` and for the control socket."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any, Final

from mgpu_llm.adapters.engine.aside import aside
from mgpu_llm.adapters.gpus import GpuDetails, GpuPair, Gpus, HostGpus
from mgpu_llm.adapters.gpus.owner import Owner, command_line, owner
from mgpu_llm.core import redaction

#: /proc answers within milliseconds, unless a process is stuck or a directory service is down.
OWNERS_S: Final = 0.5
#: So many processes are looked at, and so much is told of a command.
MOST_PROCESSES: Final = 256
MOST_CHARACTERS: Final = 400


class GpuReport:
    """Keep it: of a process whose command line could not be read in time, nobody tries again while that try still waits."""

    def __init__(self, driver: Gpus) -> None:
        self._driver = driver
        self._waited_for: set[int] = set()

    async def document(
        self,
        deadline_s: float,
        *,
        configured: Collection[str] = (),
        in_use: Collection[str] = (),
        engine: Collection[int] = (),
    ) -> dict[str, Any]:
        """{"driver", "cuda", "nvml", "gpus": [GPU], "pairs": [PAIR], "missing": [UUID]}, None for what is not told.

        A GPU is a told.GpuDetails with {"configured": bool, "in_use": bool}, by itself or by a slice, and each of its
        `mig_slices` has the two as well; each of its processes is {"pid", "kind", "used_bytes", "user", "command",
        "of_the_engine": bool}. A pair is {"gpus": [index, index], "path", "nvlink", "p2p_read", "p2p_write"}, as told.GpuPair has
        them. Missing are those of `configured` that the driver does not list.
        `configured` and `in_use` are UUIDs, or indices of GPUs that do not tell theirs; `engine` are the pids of this engine.
        Raises GpusUnobserved.
        """
        host = await self._driver.details(deadline_s)
        pids = {process.pid for gpu in host.gpus for process in gpu.processes or ()}
        owners, commands = await self._owners(sorted(pids)[:MOST_PROCESSES])
        listed = {name for gpu in host.gpus for name in _names(gpu)}
        return {
            "driver": host.driver,
            "cuda": host.cuda,
            "nvml": host.nvml,
            "gpus": [
                {
                    **_gpu(gpu, owners, commands, engine),
                    **_roles(gpu, configured, in_use),
                }
                for gpu in host.gpus
            ],
            "pairs": [_pair(pair) for pair in host.pairs],
            "missing": sorted(set(configured) - listed) if not _nameless(host) else [],
        }

    async def _owners(self, pids: Collection[int]) -> tuple[Mapping[int, Owner], Mapping[int, str]]:
        owners = aside(lambda: {pid: who for pid in pids if (who := owner(pid)) is not None}, OWNERS_S)
        found, texts = await asyncio.gather(owners, asyncio.gather(*(self._command(pid) for pid in pids)))
        return found or {}, dict(zip(pids, texts, strict=True))

    async def _command(self, pid: int) -> str:
        if pid in self._waited_for:
            return ""
        self._waited_for.add(pid)

        def read() -> list[str]:
            words = command_line(pid)
            self._waited_for.discard(pid)
            return words

        words = await aside(read, OWNERS_S)
        return " ".join(redaction.argv(words or ()))[:MOST_CHARACTERS]


def _gpu(
    gpu: GpuDetails, owners: Mapping[int, Owner], commands: Mapping[int, str], engine: Collection[int]
) -> dict[str, Any]:
    document = asdict(gpu)
    for process in document["processes"] or ():
        pid = process["pid"]
        who = owners.get(pid)
        process["user"] = who and who.user
        process["command"] = commands.get(pid) or (who and who.name) or None
        process["of_the_engine"] = pid in engine
    return document


def _roles(gpu: GpuDetails, configured: Collection[str], in_use: Collection[str]) -> dict[str, Any]:
    mine = set(_names(gpu))
    slices = gpu.mig_slices and [
        {**asdict(part), "configured": part.uuid in configured, "in_use": part.uuid in in_use}
        for part in gpu.mig_slices
    ]
    return {
        "mig_slices": slices,
        "configured": not mine.isdisjoint(configured),
        "in_use": not mine.isdisjoint(in_use),
    }


def _names(gpu: GpuDetails) -> tuple[str, ...]:
    return (str(gpu.index), *([gpu.uuid] if gpu.uuid else []), *_parts(gpu))


def _parts(gpu: GpuDetails) -> list[str]:
    """The UUIDs of its MIG slices."""
    return [part.uuid for part in gpu.mig_slices or () if part.uuid is not None]


def _pair(pair: GpuPair) -> dict[str, Any]:
    document = asdict(pair)
    return {"gpus": [document.pop("one"), document.pop("other")], **document}


def _nameless(host: HostGpus) -> bool:
    """A GPU whose UUID is not told may be any that is missing."""
    return any(gpu.uuid is None for gpu in host.gpus)
