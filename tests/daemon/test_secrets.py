"""An engine that prints secrets: nothing that the daemon keeps or shows has them."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

from tests.daemon.lives import living
from tests.support.fake_engine import COMMAND
from tests.support.fake_setup import FakeSetup

#: As older vLLM prints its arguments, and as libraries complain.
TALKATIVE = """
import os, sys
print("(APIServer pid=1) INFO 11-22 11:08:01 [api_utils.py:273] non-default args: {'model': 'm', "
      "'api_key': ['sk-sesame1', 'sesame2'], 'hf_token': 'hf_sesame3'}", flush=True)
print("(APIServer pid=1) ERROR 11-22 11:08:02 [core.py:1] RuntimeError: https://me:sesame4@hub/m refused "
      + os.environ["HUB_TOKEN"] + ", Authorization: Bearer sesame6.abcdefgh", flush=True)
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_planted_secrets_are_in_no_recording_journal_log_or_status(tmp_path: Path) -> None:
    program = tmp_path / "talkative.py"
    program.write_text(TALKATIVE)
    settings = {
        "engine.command": [sys.executable, str(program), *COMMAND, "serve"],
        "engine.env.HUB_TOKEN": "sesame5",
    }
    with living(FakeSetup(folder=tmp_path, scenario="exit=3 unless attempt>=2", settings=settings)) as life:
        life.ready()
        asked = [life.ctl("logs", "-n", "1000"), life.ctl("status"), life.ctl("status", "--json"), life.ctl("attempts")]
        assert life.stop() == 0
    kept = [gzip.decompress(file.read_bytes()).decode() for file in (life.setup.state_dir / "records").iterdir()]
    assert len(kept) == 2
    assert all(
        "non-default args" in text and "Authorization: ..." in text for text in [*kept, asked[0].stdout, life.log()]
    )
    evidence = [file.read_text() for file in (life.setup.state_dir / "incidents").glob("*/*")]
    everything = "\n".join([*kept, *evidence, life.log(), *(done.stdout + done.stderr for done in asked)])
    assert "exit code 3" in everything
    assert [line for line in everything.splitlines() if "sesame" in line] == []
