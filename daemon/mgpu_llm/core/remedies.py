"""What can be done against a cause: named changes of settings, what they give up, and who must allow them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from mgpu_llm.core import launch as launches
from mgpu_llm.core.launch import Launch


class Want(StrEnum):
    """What may cure a cause. A cause lists them in the order in which they are worth trying; `plain-retry` as often as it is
    worth a try, `stop` where nothing after it helps."""

    PLAIN_RETRY = "plain-retry"
    TRANSPORT = "transport"
    CUSTOM_ALL_REDUCE = "custom-all-reduce"
    NVLS = "nvls"
    CUMEM = "cumem"
    SHM = "shm"
    NETWORK_INTERFACE = "network-interface"
    MEMORY_LOWER = "memory-lower"
    MEMORY_RAISE = "memory-raise"
    CONTEXT_LENGTH = "context-length"
    DTYPE = "dtype"
    EAGER = "eager"
    FEWER_GPUS = "fewer-gpus"
    OTHER_GPU = "other-gpu"
    STOP = "stop"


#: For causes that nobody knows.
DEFAULT_ORDER: Final = (Want.TRANSPORT, Want.MEMORY_LOWER, Want.FEWER_GPUS)


class Area(StrEnum):
    """What a remedy changes, as an admin allows it or forbids it."""

    TRANSPORTS = "transports"
    UTILISATION = "utilisation"
    GPUS = "gpus"
    GRAPH_CAPTURE = "graph-capture"
    CONTEXT_LENGTH = "context-length"
    DTYPE = "dtype"


#: What clients see is changed only where the admin has released it: a shorter context refuses requests, another number
#: format answers otherwise.
SEEN_BY_CLIENTS: Final = frozenset({Area.CONTEXT_LENGTH, Area.DTYPE})
BY_DEFAULT: Final = frozenset(Area) - SEEN_BY_CLIENTS


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """One named change. None leaves a setting alone; `gpus` are entries of CUDA_VISIBLE_DEVICES, `area` is None for the
    admin's own. Of two that set the same thing ("utilisation-0.85", "utilisation-0.80") the later replaces the earlier."""

    name: str
    area: Area | None = None
    cost: str = field(default="", compare=False)
    env: Mapping[str, str] = field(default_factory=dict)
    args: tuple[str, ...] = ()
    utilisation: float | None = None
    tensor_parallel: int | None = None
    gpus: tuple[str, ...] | None = None

    def over(self, launch: Launch) -> Launch:
        """The launch with this change laid over it."""
        gpus = self.gpus
        if gpus is None and self.tensor_parallel is not None and launch.gpus is not None:
            gpus = launch.gpus[: self.tensor_parallel]
        return launches.with_changes(
            launch,
            env=self.env,
            args=self.args,
            utilisation=self.utilisation,
            tensor_parallel=self.tensor_parallel,
            gpus=gpus,
        )

    def replaces(self, other: Remedy) -> bool:
        """Whether nothing of the other would be left."""
        same = self.area is not None and self.area is other.area
        return same and self.area in (Area.UTILISATION, Area.GPUS, Area.CONTEXT_LENGTH)


#: vLLM's own all-reduce does peer access too, and since 0.11.0 it does not test it first: NCCL's switch alone is not enough.
_OWN_ALL_REDUCE_OFF: Final = ("--disable-custom-all-reduce",)

P2P_OFF: Final = Remedy(
    name="p2p-off",
    area=Area.TRANSPORTS,
    cost="GPUs talk through host memory: about a tenth of the all-reduce bandwidth on NVLink "
    "(255 -> 25.6 GiB/s on two H200s), less loss on PCIe",
    env={"NCCL_P2P_DISABLE": "1"},
    args=_OWN_ALL_REDUCE_OFF,
)
NVLINK_GENTLE: Final = Remedy(
    name="nvlink-gentle",
    area=Area.TRANSPORTS,
    cost="NVLink stays, without what NCCL and vLLM build on top of it: a few percent of decode latency",
    env={"NCCL_NVLS_ENABLE": "0", "NCCL_CUMEM_ENABLE": "0"},
    args=_OWN_ALL_REDUCE_OFF,
)
P2P_NVLINK_ONLY: Final = Remedy(
    name="p2p-nvlink-only",
    area=Area.TRANSPORTS,
    cost="GPUs without NVLink between them talk through host memory",
    env={"NCCL_P2P_LEVEL": "NVL"},
    args=_OWN_ALL_REDUCE_OFF,
)
CUSTOM_ALL_REDUCE_OFF: Final = Remedy(
    name="custom-all-reduce-off",
    area=Area.TRANSPORTS,
    cost="a few percent of decode latency on NVLink",
    args=_OWN_ALL_REDUCE_OFF,
)
NVLS_OFF: Final = Remedy(
    name="nvls-off",
    area=Area.TRANSPORTS,
    cost="some all-reduce bandwidth on NVSwitch",
    env={"NCCL_NVLS_ENABLE": "0"},
)
CUMEM_OFF: Final = Remedy(
    name="cumem-off",
    area=Area.TRANSPORTS,
    cost="no NVLS and no registered buffers; NCCL needs /dev/shm instead",
    env={"NCCL_CUMEM_ENABLE": "0", "NCCL_CUMEM_HOST_ENABLE": "0"},
)
SHM_OFF: Final = Remedy(
    name="shm-off",
    area=Area.TRANSPORTS,
    cost="GPUs without peer access between them talk through sockets: many times slower",
    env={"NCCL_SHM_DISABLE": "1"},
)
SOCKETS: Final = Remedy(
    name="sockets",
    area=Area.TRANSPORTS,
    cost="GPUs talk through the host's network stack: many times slower",
    env={"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"},
    args=_OWN_ALL_REDUCE_OFF,
)
LOOPBACK: Final = Remedy(
    name="loopback",
    area=Area.TRANSPORTS,
    cost="none on one host",
    env={
        "NCCL_SOCKET_IFNAME": "lo",
        "GLOO_SOCKET_IFNAME": "lo",
        "VLLM_HOST_IP": "127.0.0.1",
        "NCCL_IB_DISABLE": "1",
    },
)
EAGER: Final = Remedy(
    name="eager",
    area=Area.GRAPH_CAPTURE,
    cost="no graphs and no compiled kernels: slower decoding, the more so for small models",
    args=("--enforce-eager",),
)
FLOAT16: Final = Remedy(
    name="float16",
    area=Area.DTYPE,
    cost="other numbers than the model was made for: answers may differ",
    args=("--dtype", "float16"),
)
#: Those that are the same on every host, by name.
FIXED: Final[Mapping[str, Remedy]] = {
    remedy.name: remedy
    for remedy in (
        P2P_OFF,
        NVLINK_GENTLE,
        P2P_NVLINK_ONLY,
        CUSTOM_ALL_REDUCE_OFF,
        NVLS_OFF,
        CUMEM_OFF,
        SHM_OFF,
        SOCKETS,
        LOOPBACK,
        EAGER,
        FLOAT16,
    )
}


def utilisation(value: float, *, raises: bool) -> Remedy:
    """Another part of each GPU's memory."""
    cost = "less GPU memory for what is beside vLLM" if raises else "less GPU memory for the KV cache"
    cost += ": graphs may not fit" if raises else ": fewer tokens in flight"
    named = f"{value:.2f}" if round(value, 2) == round(value, 4) else f"{value:.4f}".rstrip("0")
    return Remedy(name=f"utilisation-{named}", area=Area.UTILISATION, cost=cost, utilisation=round(value, 4))


def context(tokens: int) -> Remedy:
    """A shorter context."""
    return Remedy(
        name=f"context-{tokens}",
        area=Area.CONTEXT_LENGTH,
        cost=f"requests of more than {tokens} tokens are refused",
        args=("--max-model-len", str(tokens)),
    )


def gpus(chosen: tuple[str, ...] | None, ranks: int, base: Launch) -> Remedy:
    """`ranks` for the tensors, on the GPUs chosen; None where there are no GPUs."""
    first = None if chosen is None or base.gpus is None else base.gpus[: len(chosen)]
    cost = f"{ranks} of {base.tensor_parallel} ranks do all the work: slower, and less room for the KV cache"
    if ranks == base.tensor_parallel:
        cost = "none, where the GPUs are alike"
    return Remedy(
        name=f"tp-{ranks}" if chosen == first else f"gpus-{','.join(chosen or ())}",
        area=Area.GPUS,
        cost=cost,
        tensor_parallel=ranks,
        gpus=chosen,
    )
