"""mgpuctl without a verb: the instances of this host."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mgpu_llm.core import instances
from mgpu_llm.ctl import main as main_module
from tests.ctl.daemons import SampleBackend, daemon, mgpuctl
from tests.ctl.samples import STARTING


class Host:
    """What stands for /run and /etc/mgpu-llm, and mgpuctl in this process."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.run, self.configs = folder / "run", folder / "etc"
        for path in (self.configs, self.run / "mgpu-llm", self.run / "mgpu-llm@big"):
            path.mkdir(parents=True)
        self._monkeypatch, self._capsys = monkeypatch, capsys
        monkeypatch.setattr(instances, "RUNTIME", self.run)
        monkeypatch.setattr(instances, "CONFIGS", self.configs)
        monkeypatch.setattr(main_module, "_drop_stdout", lambda: None)
        for name in ("MGPU_LLM_SOCKET", "MGPU_LLM_INSTANCE"):
            monkeypatch.delenv(name, raising=False)

    def ctl(self, *words: str) -> tuple[int, list[str], str]:
        """The exit status, the lines and the remarks of mgpuctl."""
        self._monkeypatch.setattr(sys, "argv", ["mgpuctl", *words])
        status = main_module.main()
        said = self._capsys.readouterr()
        return status, said.out.splitlines(), said.err


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Host:
    return Host(tmp_path, monkeypatch, capsys)


def test_each_daemon_and_each_config_is_a_row(host: Host) -> None:
    for name in ("mgpu-llm", "idle", "big"):
        (host.configs / f"{name}.toml").touch()
    serving = SampleBackend(replace(STARTING, state="ready", degraded=True, model="qwen", rung="p2p-off"))
    with daemon(host.run / "mgpu-llm", SampleBackend()), daemon(host.run / "mgpu-llm@big", serving):
        status, lines, _ = host.ctl()
    assert status == 0
    usual, big, idle = (line.split("  ") for line in lines[1:4])
    assert (usual[0], usual[-1]) == ("mgpu-llm", STARTING.url)
    assert [word.strip() for word in big if word] == [
        "mgpu-llm@big",
        "ready, degraded",
        "p2p-off",
        "qwen",
        STARTING.url,
    ]
    assert [word.strip() for word in idle if word] == ["mgpu-llm@idle", "not running"]
    assert "  mgpuctl -i big status" in lines


def test_what_is_no_config_and_no_socket_is_no_row(host: Host) -> None:
    for name in ("only.toml", "a.toml.new", "notes"):
        (host.configs / name).touch()
    _, lines, _ = host.ctl()
    assert [line.split() for line in lines[1:3]] == [["mgpu-llm@only", "not", "running"], []]


def test_where_there_is_none_the_help_says_what_there_is_to_ask(host: Host) -> None:
    status, lines, _ = host.ctl()
    assert (status, lines[0]) == (0, "Usage: mgpuctl [OPTIONS] [COMMAND] [ARGS]...")


def test_the_instance_is_asked_and_named_in_what_to_do(host: Host) -> None:
    with daemon(host.run / "mgpu-llm@big", SampleBackend()):
        status, lines, _ = host.ctl("-i", "big", "status")
    assert (status, STARTING.model in lines[0]) == (1, True)
    status, _, said = host.ctl("-i", "big", "status")
    assert status == 3
    assert said.endswith("start it with: systemctl start mgpu-llm@big\n")


def test_a_name_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    done = mgpuctl(tmp_path / "s", "--instance", "../etc", "status")
    assert done.returncode == 2
    assert "'../etc' is no name of an instance: letters, digits, _, . and -" in done.stderr


def test_what_stands_on_the_command_line_counts_more_than_a_variable(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    with daemon(host.run / "mgpu-llm", SampleBackend()) as usual, daemon(host.run / "mgpu-llm@big", SampleBackend()):
        monkeypatch.setenv("MGPU_LLM_SOCKET", str(usual))
        assert "mgpu-llm@gone" in host.ctl("-i", "gone", "status")[2]
        assert host.ctl("status")[0] == 1
        monkeypatch.setenv("MGPU_LLM_INSTANCE", "gone")
        assert host.ctl("--socket", str(usual), "status")[0] == 1
        assert host.ctl("status")[0] == 2
        status, _, said = host.ctl("-i", "big", "--socket", str(usual), "status")
    assert (status, "exclude each other" in said) == (2, True)
