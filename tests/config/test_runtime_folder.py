"""Where the daemon shall keep its socket and its lock, as far as it can be judged beforehand."""

from __future__ import annotations

from pathlib import Path

from tests.config.loading import checked, unprivileged

FITTING = "engine.command = ['/bin/sh']\nmodel.path = 'org/name'\ndaemon.runtime_dir = "


def test_a_runtime_folder_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = f'cannot be a folder: "{tmp_path}/file" is none'
    assert checked(f"{FITTING}'{tmp_path}/file/run'") == [f"a.toml: daemon.runtime_dir: {found}"]
    assert checked(f"{FITTING}'{tmp_path}/new/run'") == []


def test_a_runtime_folder_that_this_user_may_not_see_is_left_to_who_runs_the_daemon(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o000)
    with unprivileged():
        assert checked(f"{FITTING}'{closed}/below/run'") == []
