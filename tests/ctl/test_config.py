"""mgpuctl config."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from mgpu_llm.ctl.config_page import config_lines
from tests.ctl.mgpuds import Mgpud

SHIPPED = Path(__file__).parents[2] / "etc" / "mgpu-llm.toml"


def setting(key: str, value: Any, file: str | None = None, origin: str = "default") -> dict[str, Any]:
    return {"key": key, "value": value, "origin": "file" if file else origin, "file": file}


def document(*settings: dict[str, Any], problems: tuple[str, ...] = (), instance: str = "") -> dict[str, Any]:
    return {"config": "/etc/a.toml", "instance": instance, "problems": list(problems), "settings": list(settings)}


@pytest.fixture
def mgpud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mgpud:
    return Mgpud("config", tmp_path, monkeypatch)


def test_each_value_has_behind_it_where_it_is_from() -> None:
    told = document(
        setting("gpus.use", [2, "GPU-5e"], "/etc/a.toml"),
        setting("gpus.shared", value=False),
        setting("daemon.runtime_dir", "/run/mgpu-llm@big", origin="instance"),
        setting("ladder.rungs", None),
        instance="big",
    )
    assert config_lines(told) == [
        "# /etc/a.toml, instance big",
        "",
        "[gpus]",
        'use = [2, "GPU-5e"]  # /etc/a.toml',
        "shared = false       # default",
        "",
        "[daemon]",
        'runtime_dir = "/run/mgpu-llm@big"  # the instance\'s name',
        "",
        "[ladder]",
        "# rungs: what is built in  # default",
    ]


def test_the_page_is_toml_that_says_the_same() -> None:
    values = {
        "a": ['"', "\\", "ü", "\x7f", "\n"],
        "b": 0.5,
        "c": [{"name": "x", "env": {"A": "1"}}],
        "d": [{"env": {}}],
    }
    told = document(*(setting(f"ladder.{key}", value) for key, value in values.items()))
    assert tomllib.loads("\n".join(config_lines(told)))["ladder"] == values


def test_it_cannot_steer_a_terminal() -> None:
    told = document(setting("model.path", "\x1b[2J", "/etc/\x1b[0m.toml"))
    assert "\x1b" not in "\n".join(config_lines(told))


def test_mgpud_is_asked_for_the_instances_file_or_the_one_that_was_given(
    mgpud: Mgpud, capfd: pytest.CaptureFixture[str]
) -> None:
    mgpud.prints(json.dumps(document(setting("engine.port", 8000))))
    assert mgpud.ctl("show", socket=Path("/run/mgpu-llm@big/control.sock")) == 0
    assert mgpud.asked == ["--show-config", "--config", "/etc/mgpu-llm/big.toml"]
    assert capfd.readouterr().out == "# /etc/a.toml\n\n[engine]\nport = 8000  # default\n"
    assert mgpud.ctl("show", "--config", "b.toml", "--json") == 0
    assert mgpud.asked == ["--show-config", "--config", "b.toml"]
    assert json.loads(capfd.readouterr().out) == document(setting("engine.port", 8000))


def test_problems_go_to_stderr_and_into_the_exit_status(mgpud: Mgpud, capfd: pytest.CaptureFixture[str]) -> None:
    mgpud.prints(json.dumps(document(setting("engine.port", 8000), problems=("a: wrong",))), status=78)
    assert mgpud.ctl("show") == 8
    told = capfd.readouterr()
    assert "port = 8000" in told.out
    assert told.err == "a: wrong\n"


@pytest.mark.parametrize(
    "printed", ["{}", '{"config": "a", "instance": "", "problems": [], "settings": [{"key": "a.b"}]}']
)
def test_another_document_is_one_line(mgpud: Mgpud, capfd: pytest.CaptureFixture[str], printed: str) -> None:
    mgpud.prints(printed)
    assert mgpud.ctl("show") == 5
    err = "mgpuctl: cannot show the config: mgpud --show-config printed another document\n"
    assert capfd.readouterr().err == err


def test_the_real_mgpud_tells_config_and_schema(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    mgpud = Mgpud("config", tmp_path, monkeypatch)
    assert mgpud.ctl("show", "--config", str(SHIPPED)) == 0
    written = tomllib.loads(SHIPPED.read_text())
    assert tomllib.loads(capfd.readouterr().out) == written
    (tmp_path / "bad.toml").write_text("engine.port = 0")
    assert mgpud.ctl("show", "--config", str(tmp_path / "bad.toml")) == 8
    assert "engine.port: found 0" in capfd.readouterr().err
    assert mgpud.ctl("schema") == 0
    assert set(json.loads(capfd.readouterr().out)["properties"]) == set(written)
