"""`mgpuctl status` and the faults of GPUs with which an engine goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.ctl.daemons import SampleBackend, daemon, mgpuctl
from tests.ctl.samples import SERVING

FAULTS = (
    "GPU 3: broken memory will be remapped at the next reset (Xid 63)",
    "GPU 1: a copy has failed \x1b[31m(Xid 39)",
)


def test_each_fault_has_a_line_and_without_any_there_is_none(tmp_path: Path) -> None:
    with daemon(tmp_path, SampleBackend(replace(SERVING, gpu_faults=FAULTS))) as socket_path:
        page = mgpuctl(socket_path, "status").stdout
    assert f"GPU fault: {FAULTS[0]}\n           GPU 1: a copy has failed" in page
    assert "\x1b" not in page
    (tmp_path / "sound").mkdir()
    with daemon(tmp_path / "sound", SampleBackend(SERVING)) as socket_path:
        assert "GPU fault" not in mgpuctl(socket_path, "status").stdout


def test_a_gpu_that_is_out_is_shown_with_why_and_what_to_do(tmp_path: Path) -> None:
    out = ("GPU 1 is out: it still holds 5.00 GB; reset it", "GPU 3 is out: gone")
    with daemon(tmp_path, SampleBackend(replace(SERVING, gpus_out=out))) as socket_path:
        page = mgpuctl(socket_path, "status").stdout
    assert "  GPU out: GPU 1 is out: it still holds 5.00 GB; reset it\n           GPU 3 is out: gone" in page
