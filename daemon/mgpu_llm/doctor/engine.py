"""The engine's own environment: what is installed in it, and variables that get in its way."""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mgpu_llm.core import slices
from mgpu_llm.doctor import account
from mgpu_llm.doctor.account import Account
from mgpu_llm.doctor.finding import Finding, Subject, listed
from mgpu_llm.doctor.system import System

SUBJECT: Final = Subject("engine")
#: Libraries of CUDA's that PyTorch brings by itself; other ones before them on the search path break it.
_CUDA_LIBRARY: Final = re.compile(r"lib(cudart|nccl|cublas|cublasLt|cudnn|nvrtc)\.so(\.\d+)*")
_WHERE: Final = "in the environment that engine.python or engine.command is of"
_PROXIES: Final = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")
#: What each of these, if it is "1", does to a start.
_SWITCHES: Final = {
    "NCCL_SHM_DISABLE": "without shared memory NCCL has only the network where peer-to-peer does not work",
    "CUDA_LAUNCH_BLOCKING": "every kernel is waited for, which is many times slower and may hang collectives",
    "NCCL_P2P_DISABLE": "GPUs talk through host memory; right where peer-to-peer is broken, slow elsewhere",
}


@dataclass(frozen=True, kw_only=True)
class Installed:
    """What the engine's Python has, "" where it does not tell. `cuda` is what PyTorch was built for: "" also for a build
    without; `without_cuda` says that it is one. `program` is the first word of
    the engine's command, by its absolute path."""

    vllm: str = ""
    torch: str = ""
    nccl: str = ""
    cuda: str = ""
    without_cuda: bool = False
    program: str = ""


def versions(found: Installed, *, wanted: bool, sliced: bool = False) -> Iterator[Finding]:
    """`wanted`: whether the config uses GPUs; `sliced`: whether one is a MIG slice."""
    if not found.vllm and not found.torch:
        why = "the command is no Python whose packages could be asked for, or that Python did not answer"
        yield SUBJECT.unknown("engine-versions", why)
        return
    named = {"vLLM": found.vllm, "PyTorch": found.torch, "NCCL": found.nccl, "CUDA": found.cuda}
    seen = ", ".join(f"{name} {version}" for name, version in named.items() if version)
    if not found.vllm or not found.torch:
        missing = "vLLM" if not found.vllm else "PyTorch"
        yield SUBJECT.problem("engine-versions", f"{seen}: no {missing} beside it", f"install vLLM {_WHERE}")
    elif found.without_cuda and wanted:
        cure = f'install vLLM and PyTorch for CUDA {_WHERE}; for an engine without GPUs write gpus.use = "none"'
        yield SUBJECT.problem("engine-versions", f"{seen}: this PyTorch is built without CUDA", cure)
    elif sliced and slices.too_old(found.vllm):
        yield SUBJECT.problem(
            "engine-versions", f"{seen}: a MIG slice needs {slices.least_vllm()}", "install a newer vLLM"
        )
    elif ", " in found.nccl:
        cure = "pip uninstall the one that PyTorch does not ask for (pip check)"
        yield SUBJECT.warning("engine-versions", f"{seen}: there are several NCCLs", cure)
    else:
        yield SUBJECT.ok("engine-versions", seen)


def access(found: Installed, who: Account) -> Iterator[Finding]:
    """Whether the user may run it: an environment in the home folder of root's is closed to others."""
    if not found.program or (may := account.access(who, [Path(found.program)])) is None or "x" in may[0]:
        return
    seen = f"{who.name} may not run {found.program}"
    cure = f"namei -lx {found.program} shows what is closed; an environment below /opt is open to all"
    yield SUBJECT.problem("engine-access", seen, cure)


def variables(system: System, environ: Mapping[str, str]) -> Iterator[Finding]:
    """`environ` is the engine's, whole."""
    found = [
        *_preloads(environ),
        *_library_path(system, environ.get("LD_LIBRARY_PATH", "")),
        *_switches(environ),
        *_network(system, environ),
        *_proxy(environ),
    ]
    yield from found
    if not found:
        own = sorted(name for name in environ if name.startswith(("NCCL_", "VLLM_", "TORCH_NCCL_")))
        yield SUBJECT.ok("engine-environment", "nothing in its way" + (f"; set are {listed(own)}" if own else ""))


def _preloads(environ: Mapping[str, str]) -> Iterator[Finding]:
    if preloaded := environ.get("LD_PRELOAD", "").strip():
        seen = f"LD_PRELOAD puts {preloaded[:80]} into every process of the engine"
        yield SUBJECT.warning("engine-environment", seen, "remove it, or set it to what vLLM needs alone in engine.env")


def _library_path(system: System, value: str) -> Iterator[Finding]:
    for folder in filter(None, value.split(":")):
        if Path(folder).name == "stubs":
            seen = f"LD_LIBRARY_PATH has {folder}: its libcuda is a stub without a driver behind it"
            yield SUBJECT.problem("engine-environment", seen, f"take {folder} out of LD_LIBRARY_PATH")
        elif others := [name for name in system.names(folder) if _CUDA_LIBRARY.fullmatch(name)]:
            seen = f"LD_LIBRARY_PATH has {folder} with {listed(others, 2)}: these come before PyTorch's own"
            yield SUBJECT.warning("engine-environment", seen, 'set env.LD_LIBRARY_PATH = "" under [engine]')


def _switches(environ: Mapping[str, str]) -> Iterator[Finding]:
    for name, effect in _SWITCHES.items():
        if environ.get(name, "0").strip() not in ("", "0"):
            yield SUBJECT.warning("engine-environment", f"{name} is set: {effect}", "unset it if that is not meant")


def _network(system: System, environ: Mapping[str, str]) -> Iterator[Finding]:
    """NCCL_SOCKET_IFNAME: beginnings of names, "=" before whole ones, "^" before those that are not meant (NCCL's user guide)."""
    interfaces = system.names("/sys/class/net")
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        value = environ.get(name, "")
        wanted = [one for one in value.removeprefix("=").split(",") if one]
        if not wanted or value.startswith("^") or not interfaces:
            continue
        if not any(interface.startswith(one) for one in wanted for interface in interfaces):
            seen = f"{name} is {value}, and the interfaces are {listed(interfaces)}"
            yield SUBJECT.problem("engine-environment", seen, f"{name}=lo in engine.env, or unset it")
    if (address := environ.get("VLLM_HOST_IP", "")) and not _own(address):
        seen = f"VLLM_HOST_IP is {address}, which is no address of this host: the ranks would wait for each other there"
        yield SUBJECT.problem("engine-environment", seen, "VLLM_HOST_IP=127.0.0.1 in engine.env, or unset it")


def _own(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as trial:
        try:
            trial.bind((address, 0))
        except OSError as error:
            return error.errno != errno.EADDRNOTAVAIL
    return True


def _proxy(environ: Mapping[str, str]) -> Iterator[Finding]:
    proxy = next((name for name in _PROXIES if environ.get(name)), None)
    spared = f"{environ.get('no_proxy', '')},{environ.get('NO_PROXY', '')}".replace(" ", "").split(",")
    if proxy and not {"127.0.0.1", "localhost", "*", "127.0.0.0/8"} & set(spared):
        seen = f"{proxy} is set, and no_proxy does not spare 127.0.0.1: requests to this host go to the proxy"
        yield SUBJECT.warning("engine-environment", seen, "no_proxy=127.0.0.1,localhost in engine.env and for clients")
