"""mgpuctl gpus."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mgpu_llm.ctl.gpus_page import gpu_page
from mgpu_llm.ctl.topology import LABEL
from mgpu_llm.ctl.words import Page, cells
from tests.ctl.daemons import (
    DEADLINE_S,
    SampleBackend,
    command,
    daemon,
    environment,
    foreign,
    http_reply,
    mgpuctl,
    says,
    wait_for,
)
from tests.ctl.host_gpus import GIB, HOST_GPUS, gpu, host, lost, process
from tests.ctl.mgpuds import Mgpud
from tests.ctl.terminal import terminal
from tests.support.fake_nvml.asked import uuid

PIPE = Page(colour=False, width=None)
NARROW = Page(colour=False, width=80)
PAGE = [
    "  GPU  NAME            MEMORY          BUSY   POWER      TEMP   HEALTH",
    "* 0    H100 80GB HBM3   70.0/79.6 GiB  100 %  690/700 W  81 °C  ok",
    "     4711  mgpu-llm, this engine  70.0 GiB  VLLM::Worker_TP0",
    "* 1    H100 80GB HBM3    0.0/79.6 GiB    0 %   74/700 W  38 °C  3 ECC errors",
    "     errors of its memory that could not be corrected, since the driver was",
    "     loaded",
    "     4712  mgpu-llm, this engine  70.0 GiB  VLLM::Worker_TP0",
    "  2    H100 80GB HBM3    0.0/79.6 GiB    0 %   74/700 W  38 °C  needs reset",
    "     the driver asks for a reset of this GPU: end who uses it, then nvidia-smi",
    "     --gpu-reset -i 2",
    "     99  ann  compute+graphics, 2.0 GiB  python train.py",
    "+ 3    H100 80GB HBM3  -               -      -          -      LOST",
    "     GPU is lost (NVML error 15); its PCI address is 00000000:13:00.0",
    "* in use by this engine   + named in its config, and not in use",
    "      GPU0  GPU1  GPU2",
    "GPU0  X     NV    SYS!",
    "GPU1  NV    X     PHB!",
    "GPU2  SYS!  PHB!  X",
    "NV NVLink, PHB a host bridge, SYS the link between NUMA nodes",
    "! no peer-to-peer between GPU 0-2: the driver says not supported",
    "! no peer-to-peer between GPU 1-2: the driver says read: chipset not supported",
    "driver 580.159.04, CUDA 13.0",
]


def health(one: dict[str, Any]) -> str:
    line = gpu_page(host([one]), PIPE)[1]
    return line.split("  ")[-1].strip()


def matrix(document: dict[str, Any], page: Page = PIPE) -> list[list[str]]:
    """The cells of its rows, without the labels."""
    return [line[LABEL:].split() for line in gpu_page(document, page) if line.startswith("GPU")]


def test_a_terminal_of_80_columns_shows_gpus_who_uses_them_what_is_wrong_and_what_joins_them(tmp_path: Path) -> None:
    with daemon(tmp_path, SampleBackend()) as socket_path, terminal(width=80) as screen:
        subprocess.run(
            command("--socket", str(socket_path), "gpus"),
            env=environment(),
            stdout=screen.slave,
            check=True,
            timeout=DEADLINE_S,
        )
    assert screen.screen.lines == PAGE
    assert "\x1b[31m\x1b[1mLOST\x1b[0m" in screen.raw


def test_behind_a_pipe_nothing_is_coloured_cut_or_wrapped(tmp_path: Path) -> None:
    with daemon(tmp_path, SampleBackend()) as socket_path:
        done = mgpuctl(socket_path, "gpus")
    assert (done.returncode, done.stderr, "\x1b" in done.stdout) == (0, "", False)
    assert "     errors of its memory that could not be corrected, since the driver was loaded\n" in done.stdout


def test_json_is_the_whole_document(tmp_path: Path) -> None:
    with daemon(tmp_path, SampleBackend()) as socket_path:
        done = mgpuctl(socket_path, "gpus", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (0, HOST_GPUS)


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (gpu(0), "ok"),
        (gpu(0, recovery_action=None, ecc=None, ecc_uncorrected=None), "ok"),
        (gpu(0, ecc_uncorrected=1), "1 ECC error"),
        (gpu(0, ecc_uncorrected=2, recovery_action="drain-and-reset"), "drain, reset"),
        (gpu(0, recovery_action="drain-p2p"), "drain P2P"),
        (gpu(0, recovery_action="reboot"), "needs reboot"),
        (gpu(0, recovery_action="unknown-9"), "unknown-9"),
        (gpu(0, untold="the driver does not let this user ask it"), "no access"),
        (lost(0), "LOST"),
    ],
)
def test_health_is_a_word_or_two(one: dict[str, Any], words: str) -> None:
    assert health(one) == words


def test_what_is_not_told_is_a_dash_or_said_and_never_a_zero() -> None:
    keys = ("memory_used_bytes", "memory_total_bytes", "utilisation_percent", "power_mw", "temperature_c", "name")
    nobody = process(7, used_bytes=None, user=None, command=None)
    document = {**host([gpu(0, **dict.fromkeys(keys), processes=[nobody])]), "driver": None, "cuda": None}
    lines = gpu_page(document, PIPE)
    assert lines[1].split() == ["0", "-", "-", "-", "-", "-", "ok"]
    assert lines[2].strip() == "7  not told whose  size not told"
    assert lines[-1] == "driver not told, CUDA not told"
    assert gpu_page(host([gpu(0, power_limit_mw=None)]), PIPE)[1].split()[8:10] == ["74", "W"]


def test_slices_and_a_mode_that_keeps_others_out_are_told_below_their_gpu() -> None:
    slices = [
        {"uuid": "MIG-a", "memory_total_bytes": 10 * GIB, "configured": True, "in_use": True},
        {"uuid": "MIG-b", "memory_total_bytes": None},
        {"uuid": "MIG-c", "memory_total_bytes": 5 * GIB, "configured": True, "in_use": False},
    ]
    lines = gpu_page(host([gpu(0, mig=True, mig_slices=slices), gpu(1, compute_mode="exclusive-process")]), PIPE)
    assert lines[2] == "     MIG is on: *MIG-a (10.0 GiB), MIG-b (size not told), +MIG-c (5.0 GiB)"
    assert lines[4] == "     compute mode: exclusive-process"
    assert "MIG is on: it has no slices" in "\n".join(gpu_page(host([gpu(0, mig=True)]), PIPE))


def test_a_gpu_of_the_config_that_the_driver_does_not_list_is_missed() -> None:
    document = {**host([gpu(0)]), "missing": [uuid(1)]}
    assert f"{uuid(1)}, which the config names, is not among the GPUs that the driver lists" in gpu_page(document, PIPE)


def test_a_host_without_gpus_has_one_sentence_and_the_driver() -> None:
    assert gpu_page(host([]), PIPE) == [
        "this host has no GPU that the driver knows",
        "",
        "driver 580.159.04, CUDA 13.0",
    ]


@pytest.mark.parametrize(
    ("joined", "letters"),
    [
        ({"nvlink": True, "path": "system"}, "NV"),
        ({"path": "internal"}, "PIX"),
        ({"path": "single"}, "PIX"),
        ({"path": "multiple"}, "PXB"),
        ({"path": "hostbridge"}, "PHB"),
        ({"path": "node"}, "NODE"),
        ({"path": "system"}, "SYS"),
        ({"path": "unknown-7"}, "?"),
        ({"path": None, "nvlink": None, "p2p_read": None, "p2p_write": None}, "?"),
        ({"p2p_read": "not supported", "p2p_write": None}, "NODE!"),
    ],
)
def test_what_joins_two_is_in_the_letters_of_nvidia_smi(joined: dict[str, Any], letters: str) -> None:
    assert matrix(host([gpu(0), gpu(1)], {(0, 1): joined})) == [["X", letters], [letters, "X"]]


def test_where_no_two_reach_each_other_it_is_one_sentence() -> None:
    refused = {"p2p_read": "not supported", "p2p_write": "not supported"}
    document = host([gpu(0), gpu(1), gpu(2)], dict.fromkeys([(0, 1), (0, 2), (1, 2)], refused))
    said = [line for line in gpu_page(document, PIPE) if line.startswith("!")]
    assert said == ["! no peer-to-peer between any two: the driver says not supported"]


def test_sixteen_gpus_fit_into_80_columns_with_a_matrix_in_two_parts() -> None:
    busy = process(123_456, user="a-user-of-some-length", command="python -m vllm.entrypoints " + "x" * 300)
    named = "NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition"
    document = host([gpu(index, name=named, processes=[busy], ecc_uncorrected=index) for index in range(16)])
    lines = gpu_page(document, NARROW)
    assert max(map(cells, lines)) <= 80
    assert [len(row) for row in matrix(document, NARROW)] == [8] * 32
    assert [len(row) for row in matrix(document)] == [16] * 16


def test_the_words_of_processes_and_drivers_cannot_steer_the_terminal() -> None:
    evil = "\x1b[2J\n"
    one = process(1, user=evil, command=evil, kind=evil)
    told = gpu(0, name=evil, utilisation_percent=evil, temperature_c=evil, compute_mode=evil, processes=[one])
    other = lost(1, lost=evil, pci=evil)
    document = {
        **host([told, other, gpu(2, recovery_action=evil, untold=evil)], {(0, 2): {"p2p_read": evil}}),
        "driver": evil,
        "cuda": evil,
        "missing": [evil],
    }
    for page in (PIPE, NARROW):
        assert "".join(gpu_page(document, page)).isprintable()


@pytest.mark.parametrize("body", [b'{"gpus": [{}], "missing": []}', b'{"gpus": 3}'])
def test_an_answer_that_is_none_is_nonsense(tmp_path: Path, body: bytes) -> None:
    with foreign(tmp_path / "s", says(http_reply(body))) as socket_path:
        done = mgpuctl(socket_path, "gpus")
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.startswith("mgpuctl: what answers on")


def test_a_driver_that_is_silent_to_the_daemon_is_said_in_its_words(tmp_path: Path) -> None:
    backend = SampleBackend()
    backend.driver_silent = "the NVIDIA driver has not answered for 61 s"
    with daemon(tmp_path, backend) as socket_path:
        done = mgpuctl(socket_path, "gpus")
    assert (done.returncode, done.stdout) == (8, "")
    assert done.stderr == "mgpuctl: the NVIDIA driver has not answered for 61 s\n"


@pytest.fixture
def mgpud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mgpud:
    return Mgpud("gpus", tmp_path, monkeypatch)


def test_without_a_daemon_mgpud_looks_and_that_is_said(mgpud: Mgpud, capfd: pytest.CaptureFixture[str]) -> None:
    mgpud.prints(json.dumps(host([gpu(0)])))
    assert mgpud.ctl() == 0
    assert mgpud.asked == ["--gpus"]
    said = capfd.readouterr()
    assert said.out.splitlines()[1].endswith("  ok")
    assert said.err.startswith("mgpuctl: no daemon answers on /")
    assert said.err.endswith("/none; this is what mgpud sees by itself\n")


def test_what_mgpud_cannot_see_is_told_in_its_words(mgpud: Mgpud, capfd: pytest.CaptureFixture[str]) -> None:
    mgpud.prints("", complaint="cannot list the GPUs: Driver Not Loaded (NVML error 9)\n", status=75)
    assert mgpud.ctl("--json") == 8
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.splitlines()[1:] == [
        "cannot list the GPUs: Driver Not Loaded (NVML error 9)",
        "mgpuctl: cannot see the GPUs: mgpud --gpus ended with exit status 75",
    ]


def test_to_watch_a_document_is_a_wrong_command(tmp_path: Path) -> None:
    done = mgpuctl(tmp_path / "s", "gpus", "--watch", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--watch and --json exclude each other" in done.stderr


def test_watch_draws_over_itself_and_says_that_the_driver_fell_silent(tmp_path: Path) -> None:
    backend = SampleBackend()
    with daemon(tmp_path, backend) as socket_path, terminal(width=80) as screen:
        ctl = subprocess.Popen(
            command("--socket", str(socket_path), "gpus", "--watch"),
            env=environment(),
            stdout=screen.slave,
            stderr=subprocess.PIPE,
        )
        try:
            wait_for(lambda: screen.screen.lines == PAGE, "the page")
            backend.driver_silent = "the NVIDIA driver has not answered for 3 s"
            wait_for(lambda: "mgpuctl: the NVIDIA driver has not answered for 3 s" in screen.text, "its silence")
            assert "(asking again every 2 s, end with Ctrl-C)" in screen.text
            assert "H100" not in screen.text
            ctl.send_signal(signal.SIGINT)
            _, complaints = ctl.communicate(timeout=DEADLINE_S)
        finally:
            ctl.kill()
            ctl.communicate(timeout=DEADLINE_S)
    assert (ctl.returncode, complaints) == (0, b"")


def test_watch_behind_a_pipe_prints_page_after_page(tmp_path: Path) -> None:
    backend = SampleBackend()
    with daemon(tmp_path, backend) as socket_path:
        ctl = subprocess.Popen(
            command("--socket", str(socket_path), "gpus", "--watch"),
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            assert ctl.stdout is not None
            backend.driver_silent = ""
            assert ctl.stdout.readline().split()[0] == "GPU"
            backend.driver_silent = "silent"
            assert any(line == "mgpuctl: silent\n" for line in ctl.stdout)
        finally:
            ctl.kill()
            ctl.communicate(timeout=DEADLINE_S)
