"""The host around a failed engine, as far as it tells."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from mgpu_llm.adapters.host import kernel_log, surroundings
from mgpu_llm.adapters.host.program import Unanswered, ask


def program(folder: Path, name: str, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of this name on the PATH."""
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_a_program_is_asked_in_english_and_its_answer_has_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, "teller", "echo $LC_ALL; head -c 9999 /dev/zero", monkeypatch)
    assert ask(["teller"], limit_s=30, most_bytes=10) == "C\n" + "\0" * 8


def test_it_runs_in_the_environment_it_is_given_and_in_english_all_the_same(tmp_path: Path) -> None:
    teller = tmp_path / "teller"
    teller.write_text('#!/bin/sh\necho "$LC_ALL $A $HOME."\n')
    teller.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "A": "x", "LC_ALL": "de_DE.UTF-8"}
    assert ask(["teller"], limit_s=30, environment=environment) == "C x .\n"


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("sleep 3600", "teller has not answered within 0.2 s"),
        ("echo no rights >&2; exit 3", "teller ended with 3: no rights"),
        ("exit 4", "teller ended with 4"),
        ("kill -9 $$", "teller ended with -9"),
    ],
)
def test_one_that_does_not_tell_is_named_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, why: str
) -> None:
    program(tmp_path, "teller", script, monkeypatch)
    with pytest.raises(Unanswered) as silence:
        ask(["teller"], limit_s=0.2 if "sleep" in script else 30)
    assert str(silence.value) == why


def test_one_that_is_not_there_or_no_program_is_named_too(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("x")
    for argv, why in (
        (["no-such-program"], "there is no no-such-program"),
        ([str(tmp_path / "text")], "permission denied"),
    ):
        with pytest.raises(Unanswered, match=why):
            ask(argv, limit_s=30)


@pytest.mark.parametrize(
    "line",
    [
        "NVRM: Xid (PCI:0000:17:00): 79, pid=1234, name=python3, GPU has fallen off the bus.",
        "nvidia-nvswitch0: SXid (PCI:0000:c3:00.0): 20034, Fatal, Link 32 LTSSM Fault Up",
        "AMD-Vi: Event logged [IO_PAGE_FAULT device=41:00.0 domain=0x0022 address=0x39ffff00000 flags=0x0030]",
        "DMAR: [DMA Write NO_PASID] Request device [3b:00.0] fault addr 0xffdf000",
        "oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,task=VLLM::EngineCor,pid=29240,uid=0",
        "Memory cgroup out of memory: Killed process 29240 (VLLM::EngineCor) total-vm:1603296kB",
        "INFO: task VLLM::Worker_TP:412 blocked for more than 120 seconds.",
        "blk_update_request: I/O error, dev nvme0n1, sector 12345",
        "nvme nvme0: I/O 12 QID 3 timeout, aborting",
        "nfs: server 10.0.0.7 not responding, still trying",
        "pcieport 0000:16:01.0: AER: Corrected error received: 0000:17:00.0",
        "python3[4711]: segfault at 0 ip 00007f rsp 00007f error 4 in libcuda.so",
        "mce: [Hardware Error]: Machine check events logged",
    ],
)
def test_a_line_that_may_explain_a_failure_matters(line: str) -> None:
    assert kernel_log.MATTERS.search(line)


@pytest.mark.parametrize(
    "line", ["docker0: port 1(veth1) entered blocking state", "usb 1-1: new device", "audit: type=1400"]
)
def test_one_of_everyday_does_not(line: str) -> None:
    assert not kernel_log.MATTERS.search(line)


def refuse() -> list[str]:
    raise Unanswered("nobody may look")


def test_the_first_source_that_tells_is_taken_and_what_matters_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["2026-11-24T21:05:00Z NVRM: Xid 79", "2026-11-24T21:05:01Z usb 1-1"]
    monkeypatch.setattr(kernel_log, "SOURCES", {"a": refuse, "b": lambda: lines, "c": refuse})
    assert kernel_log.read() == f"# b: 1 of the 2 lines of the last 15 minutes matter\n{lines[0]}\n"
    monkeypatch.setattr(kernel_log, "SOURCES", {"a": refuse, "b": refuse})
    with pytest.raises(Unanswered, match="nobody may look; nobody may look"):
        kernel_log.read()


def test_the_journal_without_a_line_of_the_kernel_tells_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path, "journalctl", "true", monkeypatch)
    with pytest.raises(Unanswered, match="no line of the kernel"):
        list(kernel_log.SOURCES["journalctl -k"]())


def test_the_kernels_buffer_is_read_to_its_end_with_the_time_of_each_line() -> None:
    try:
        lines = list(kernel_log.SOURCES["/dev/kmsg"]())
    except Unanswered:
        pytest.skip("this user may not read /dev/kmsg")
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ", line) for line in lines)


def test_memory_pressure_and_disks_are_told(tmp_path: Path) -> None:
    host = surroundings.read()
    assert host["meminfo"]["MemTotal"].endswith(" kB")
    assert len(host["loadavg"].split()) == 5
    free = surroundings.free(tmp_path / "not" / "there")
    assert free["path"] == str(tmp_path)
    assert 0 <= free["free_bytes"] <= free["total_bytes"]


def test_what_lies_in_shared_memory_is_listed_the_largest_first() -> None:
    file = surroundings.SHM / f"psm_test_{os.getpid()}"
    file.write_bytes(b"x" * 12345)
    try:
        seen = surroundings.shared_memory()
    finally:
        file.unlink()
    assert {"name": file.name, "bytes": 12345, "uid": os.getuid()} in seen["entries"]
    sizes = [entry["bytes"] for entry in seen["entries"]]
    assert sizes == sorted(sizes, reverse=True)


def test_the_engines_own_caches_are_looked_at_where_it_has_them() -> None:
    found = surroundings.places(
        {"HOME": "/home/x", "HF_HOME": "/big/hf", "VLLM_CACHE_ROOT": ""}, "/models/m", "org/name"
    )
    assert found["HF_HOME"] == "/big/hf"
    assert found["VLLM_CACHE_ROOT"] == "/home/x/.cache/vllm"
    assert found["/models/m"] == "/models/m"
    assert "org/name" not in found
    assert "TRITON_CACHE_DIR" in found
    assert "HF_HUB_CACHE" not in found


def test_the_topology_is_nvidia_smis_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(
        tmp_path, "nvidia-smi", '[ "$*" = "topo -m" ] && printf "\\t\\033[4mGPU0\\033[0m\\nGPU0\\t X\\n"', monkeypatch
    )
    assert surroundings.topology() == ["\tGPU0", "GPU0\t X"]
