"""Whose unit a process is in, and what opens a place to it."""

from __future__ import annotations

import pytest

from mgpu_llm.core import sandbox


@pytest.mark.parametrize(
    ("control_groups", "unit"),
    [
        ("0::/system.slice/mgpu-llm.service\n", "mgpu-llm"),
        ("0::/system.slice/mgpu-llm.service/daemon\n", "mgpu-llm"),
        ("0::/system.slice/system-mgpu\\x2dllm.slice/mgpu-llm@small.service\n", "mgpu-llm@small"),
        ("0::/system.slice/my\\x2dllm.service\n", "my-llm"),
        ("4:memory:/\n1:name=systemd:/system.slice/mgpu-llm.service\n0::/\n", "mgpu-llm"),
        ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/run-1.scope\n", ""),
        ("0::/docker/1\n", ""),
        ("", ""),
    ],
)
def test_the_unit_of_a_process_is_in_the_name_of_its_control_group(control_groups: str, unit: str) -> None:
    assert sandbox.unit_of(control_groups) == unit


def test_a_place_is_opened_by_a_setting_of_the_unit_and_by_what_else_it_takes() -> None:
    edit = "sudo systemctl edit mgpu-llm@a: "
    assert sandbox.opened("mgpu-llm@a", "/data/hf") == f"{edit}ReadWritePaths=/data/hf under [Service]"
    with_more = sandbox.opened("mgpu-llm@a", "/home/u", "ProtectHome=read-only")
    assert with_more == f"{edit}ProtectHome=read-only, ReadWritePaths=/home/u under [Service]"


def test_a_path_in_a_unit_has_its_blanks_in_quotes_and_its_percent_signs_twice() -> None:
    assert sandbox.written("/data/100 %") == '"/data/100 %%"'
    assert sandbox.written("/data/100%") == "/data/100%%"
