"""The engine's environment: what is installed, and which variables get in its way."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mgpu_llm.adapters.host.engine_cuda import Built, built
from mgpu_llm.doctor import engine
from mgpu_llm.doctor.engine import Installed
from tests.doctor.hosts import Host

WHOLE = Installed(vllm="0.11.0", torch="2.8.0", nccl="2.27.3", cuda="12.8")
COMMAND = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]


def torch(folder: Path, text: str) -> dict[str, str]:
    """The environment of an engine whose PyTorch has this version file, and fails if it is imported."""
    (folder / "torch").mkdir()
    (folder / "torch/__init__.py").write_text("raise SystemExit('imported')\n")
    (folder / "torch/version.py").write_text(text)
    return {"PYTHONPATH": str(folder), "PATH": "/usr/bin:/bin"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "from typing import Optional\ncuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n",
            Built(cuda="12.8", hip=""),
        ),
        ("cuda = None\nhip = '6.3'\n", Built(cuda="", hip="6.3")),
        ("raise RuntimeError\n", None),
    ],
)
def test_pytorch_tells_its_cuda_without_being_imported(tmp_path: Path, text: str, told: Built | None) -> None:
    assert built(COMMAND, torch(tmp_path, text)) == told


def test_where_there_is_no_python_or_no_pytorch_nobody_tells(tmp_path: Path) -> None:
    bare = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path)}
    assert (
        built(["docker", "run", "vllm"], bare) is built([sys.executable, "-I", "-S"], bare) is built([], bare) is None
    )


@pytest.mark.parametrize(
    ("found", "level"),
    [
        (WHOLE, "ok"),
        (Installed(), "unknown"),
        (replace(WHOLE, torch="", cuda=""), "problem"),
        (replace(WHOLE, vllm=""), "problem"),
        (replace(WHOLE, cuda="", without_cuda=True), "problem"),
        (replace(WHOLE, nccl="2.27.3, 2.28.9"), "warning"),
    ],
)
def test_what_is_installed_is_judged(found: Installed, level: str) -> None:
    (told,) = engine.versions(found, wanted=True)
    assert told.level == level


def test_an_engine_without_gpus_may_do_without_cuda() -> None:
    (told,) = engine.versions(replace(WHOLE, cuda="", without_cuda=True), wanted=False)
    assert (told.level, told.seen) == ("ok", "vLLM 0.11.0, PyTorch 2.8.0, NCCL 2.27.3")


@pytest.mark.parametrize(
    ("environ", "level", "word"),
    [
        ({"LD_PRELOAD": "/usr/lib/libjemalloc.so"}, "warning", "libjemalloc"),
        ({"LD_LIBRARY_PATH": ":/usr/local/cuda/lib64/stubs"}, "problem", "stub"),
        ({"LD_LIBRARY_PATH": "/usr/local/cuda-11.8/lib64"}, "warning", "libcudart.so.11.0"),
        ({"NCCL_SHM_DISABLE": "1"}, "warning", "NCCL_SHM_DISABLE"),
        ({"CUDA_LAUNCH_BLOCKING": "1"}, "warning", "CUDA_LAUNCH_BLOCKING"),
        ({"NCCL_SOCKET_IFNAME": "eth0"}, "problem", "eno1, lo"),
        ({"GLOO_SOCKET_IFNAME": "=ib0"}, "problem", "=ib0"),
        ({"VLLM_HOST_IP": "192.0.2.7"}, "problem", "192.0.2.7"),
        ({"http_proxy": "http://proxy:3128"}, "warning", "no_proxy"),
    ],
)
def test_a_variable_that_gets_in_the_way_is_named(
    tmp_path: Path, environ: dict[str, str], level: str, word: str
) -> None:
    host = Host(tmp_path)
    host.has("/usr/local/cuda-11.8/lib64/libcudart.so.11.0")
    host.has("/sys/class/net/lo/mtu")
    host.has("/sys/class/net/eno1/mtu")
    (told,) = engine.variables(host.system, environ)
    assert (told.level, word in told.seen, told.fix != "") == (level, True, True)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"NCCL_P2P_DISABLE": "0", "NCCL_DEBUG": "INFO"},
        {"NCCL_SOCKET_IFNAME": "en,ib"},
        {"NCCL_SOCKET_IFNAME": "^docker0"},
        {"VLLM_HOST_IP": "127.0.0.1"},
        {"HTTP_PROXY": "http://proxy:3128", "NO_PROXY": "10.0.0.0/8, localhost"},
        {"LD_LIBRARY_PATH": "/opt/nothing"},
    ],
)
def test_variables_that_are_meant_are_well(tmp_path: Path, environ: dict[str, str]) -> None:
    host = Host(tmp_path)
    host.has("/sys/class/net/eno1/mtu")
    (told,) = engine.variables(host.system, environ)
    assert told.level == "ok"


def test_a_slice_needs_a_vllm_that_takes_its_name() -> None:
    (old,) = engine.versions(WHOLE, wanted=True, sliced=True)
    assert (old.level, "a MIG slice needs vLLM 0.24 or later" in old.seen) == ("problem", True)
    (new,) = engine.versions(replace(WHOLE, vllm="0.24.0"), wanted=True, sliced=True)
    assert new.level == "ok"
