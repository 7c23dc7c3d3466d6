"""What a careless parent hands down to mgpud: closed streams, and SIGCHLD ignored."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.daemon.lives import LIMIT_S, remains
from tests.support.daemons import MGPUD
from tests.support.fake_setup import FakeSetup

#: A parent that does what its first argument says and then becomes the rest.
PARENT = "import os, signal, sys; exec(sys.argv[1]); os.execv(sys.argv[2], sys.argv[2:])"


@pytest.mark.parametrize(
    "careless", ["os.closerange(0, 3)", "os.close(2)", "signal.signal(signal.SIGCHLD, signal.SIG_IGN)"]
)
def test_a_careless_parent_changes_nothing(tmp_path: Path, careless: str) -> None:
    setup = FakeSetup(folder=tmp_path, scenario="missing-model")
    done = subprocess.run(
        [sys.executable, "-c", PARENT, careless, MGPUD, "--config", setup.write()],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=LIMIT_S,
    )
    assert (done.returncode, done.stdout) == (65, b"")
    assert (setup.runtime_dir / "mgpud.lock").read_bytes().strip().isdigit()
    assert remains(setup) == []
