"""What an entry of the journal carries beside its line: fields that can be asked for, and the id by which journald finds what
packaging/systemd/mgpu-llm.catalog says of it. docs/journal.md has them for operators.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

#: Who spoke: "engine" or "daemon". journalctl matches what a field is, not what it is not.
SOURCE: Final = "MGPU_SOURCE"
ENGINE: Final = "engine"
DAEMON: Final = "daemon"
#: The dotted name of what the daemon tells; lines of the engine have none.
EVENT: Final = "MGPU_EVENT"
#: Of a line of the engine: which process spoke, as vLLM calls it ("Worker_TP1"), and of a worker its rank among those of its
#: tensor parallel group.
PROCESS: Final = "MGPU_PROCESS"
RANK: Final = "MGPU_RANK"

#: By event. An id, once given, stays: scripts and alerts ask for it. The catalogue has an entry for each.
MESSAGE_IDS: Final[Mapping[str, str]] = {
    "engine.stalled": "10df0560829f49629ff54debe0cc292a",
    "engine.crashed": "4d22d0bceab54cf08f282004fdcc4431",
    "engine.refused": "bc4f4606ca3b438ebd5c9e7149665930",
    "engine.died": "8df277ffd8a24571a469574e5510c550",
    "engine.averted": "c84d582e14b04deebb420aaf930f76cb",
    "engine.ready": "3d0a1aadf8e04e8a98b27bfb11af7bcc",
    "engine.degraded": "59535a3755944702bb34e128e403d26c",
    "engine.unhealthy": "a40295d6d9524f6ea9dd0b1b43bacd80",
    "engine.unkillable": "7d67478e4d9a45f2ba3ca71b7b05081e",
    "engine.left": "95751e47c55f4447a86a29ed3cd1ca70",
    "engine.orphan": "88fcdfe8fe234e1ea2597a16cf86a13c",
    "engine.lines-dropped": "810f592cb7e649ec88764589133baf58",
    "journal.lines-dropped": "8f642bce77ab40998f96d5f42dcfbecb",
    "gpu.out": "a0dd3ae4996e4b3f972bf8f578b1acaa",
    "gpu.fault": "d889a4f4cf184b3bac8fa672a099e825",
    "gpu.lost": "708e428915b741509b24bc2de8a278f8",
    "gpus.taken": "e4a6eec7bf5841c4aac239daacfd0a32",
    "gpus.unobserved": "40fe4bdc57a249cc9e708e1ae9441236",
    "gpus.locks-unusable": "f169326cf743440a98116f3b7bcf91ac",
    "preflight.failed": "28d4ff737cee448db9f32ea4a51b0cd9",
    "preflight.unobserved": "72facd7300744e3781e135612ba79513",
    "stacks.inconclusive": "8d0aa0aac24248df9d72ce13daf94025",
    "processes.unobserved": "6bef72b6cd84412c8037727b45d45383",
    "kernel.unobserved": "00c7093515f04265b7ed920a2fd761a0",
    "incident.failed": "0ea9f9949a6d4630934df956c89a5727",
    "record.failed": "4970af4c5b6f40b19154af5a576a0256",
    "state.unusable": "2578be1eb5c44773b82492f8b5198dd8",
    "state.failed": "d1a2319f35fa47e898b816cc219a4c08",
    "state.broken": "cdba5caa17f04ec5a536cc98930500b9",
    "systemd.unreachable": "a09ad6b8479e4f3b8f803e16314b00b6",
    "control.answer.failed": "7134e1d4eee64de8af37d5ea29fc4c47",
    "metrics.unavailable": "e1adde842f174986bd98f545e098831f",
    "config.wrong": "ac1b1741f3a24e158389454fc45055ff",
    "config.reloaded": "ea75b3ebc2d14b8d99330139b8ff2e12",
    "config.reload-failed": "3b642c902bb149e6ad22f72b3e5f9fba",
    "daemon.waiting": "d060a0d5385d4fb59ec9b0c14356baf5",
    "daemon.not-started": "8c88a8f90e8c4215a44089193dc4e67f",
    "daemon.gave-up": "6625e93e7374409bbca290bdf159ccd3",
    "daemon.fault": "f7195a4a242a473cabac88f54f0be1d5",
}

_NO_FIELD: Final = re.compile(r"[^A-Z0-9_]")
#: vLLM 0.32.0, v1/executor/multiproc_executor.py: "Worker", then each group of more than one, "_DP0_PP1_TP3_EP3".
_WORKER: Final = re.compile(r"Worker(?:_[A-Z]+\d{1,6})*")
_TENSOR_PARALLEL: Final = re.compile(r"_TP(\d+)")


def field(fact: str) -> str:
    """The field of an event's fact: "retry_in_s" is MGPU_RETRY_IN_S. journald takes names of at most 64 characters."""
    return f"MGPU_{_NO_FIELD.sub('_', fact.upper())}"[:64]


def rank(process: str) -> str:
    """The rank of the worker of this name in its tensor parallel group, "0" of one that is alone; "" of what is no worker."""
    if _WORKER.fullmatch(process) is None:
        return ""
    found = _TENSOR_PARALLEL.search(process)
    return str(int(found[1])) if found else "0"
