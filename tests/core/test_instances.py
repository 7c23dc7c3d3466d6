"""What an instance has by its name."""

from __future__ import annotations

from pathlib import PurePath

import pytest

from mgpu_llm.core import instances


@pytest.mark.parametrize("name", ["a", "qwen2.5-72b", "Qwen_2", "7b", "x" * 64])
def test_a_name_is_one_that_systemd_and_paths_leave_as_it_is(name: str) -> None:
    assert instances.is_name(name)
    assert instances.of_config(PurePath(f"/etc/mgpu-llm/{name}.toml")) == name
    assert instances.of_socket(instances.socket(name)) == name
    assert instances.unit(name) == f"mgpu-llm@{name}"
    assert instances.config_file(name) == PurePath(f"/etc/mgpu-llm/{name}.toml")
    assert instances.state_dir(name) == PurePath(f"/var/lib/mgpu-llm@{name}")


@pytest.mark.parametrize(
    "name", ["", "mgpu-llm", "mgpu-llm.bak", "conf", "../a", "a/b", ".a", "-a", "a b", "a@b", "ä", "x" * 65, "a\n"]
)
def test_any_other_is_refused(name: str) -> None:
    assert not instances.is_name(name)


def test_the_usual_one_has_the_names_without_an_at_sign() -> None:
    told = (instances.unit(""), instances.config_file(""), instances.socket(""), instances.state_dir(""))
    assert tuple(map(str, told)) == (
        "mgpu-llm",
        "/etc/mgpu-llm/mgpu-llm.toml",
        "/run/mgpu-llm/control.sock",
        "/var/lib/mgpu-llm",
    )


@pytest.mark.parametrize(
    "file", ["/etc/mgpu-llm/mgpu-llm.toml", "/etc/mgpu-llm/a.toml.new", "/etc/mgpu-llm/a.d/b.toml", "/srv/a.toml"]
)
def test_other_files_are_no_instances(file: str) -> None:
    assert instances.of_config(PurePath(file)) == ""


@pytest.mark.parametrize(
    "socket",
    ["/run/mgpu-llm/control.sock", "/run/mgpu-llm@/control.sock", "/run/a/control.sock", "/srv/mgpu-llm@a/c.sock"],
)
def test_other_sockets_are_the_usual_one_s(socket: str) -> None:
    assert instances.of_socket(PurePath(socket)) == ""
