"""What is said on a standard stream, whoever reads it or no longer does. The streams are those of a Python of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT_S = 20.0
SAY_TWICE = """
import sys
from mgpu_llm.adapters import streams
said = [streams.tell(text, sys.stdout) for text in ("one", "two")]
print(said, file=sys.stderr)
"""


def python(code: str, stdout: int, **environ: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environ},
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=LIMIT_S,
    )


def test_who_reads_gets_it_all() -> None:
    done = python(SAY_TWICE, subprocess.PIPE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "one\ntwo\n", "['', '']\n")


def test_a_reader_who_has_left_is_no_mistake_and_the_interpreter_s_end_says_nothing_either() -> None:
    read, write = os.pipe()
    os.close(read)
    done = python(SAY_TWICE, write)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "['', '']\n")


@pytest.mark.skipif(not os.access("/dev/full", os.W_OK), reason="needs /dev/full")
def test_a_full_disk_is_told_of_and_the_interpreter_s_end_says_nothing() -> None:
    with Path("/dev/full").open("wb") as full:
        done = python(SAY_TWICE, full.fileno())
    assert (done.returncode, done.stderr) == (0, "['no space left on device', '']\n")


def test_what_the_encoding_lacks_is_written_with_escapes() -> None:
    code = "import sys; from mgpu_llm.adapters import streams; streams.tell('/模型', sys.stdout)"
    done = python(code, subprocess.PIPE, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout, done.stderr) == (0, "/\\u6a21\\u578b\n", "")


def test_streams_that_were_closed_are_opened_and_nothing_is_read_or_shown_there() -> None:
    code = """
import os
os.closerange(0, 3)
from mgpu_llm.adapters import streams
streams.mend()
kept = os.open("/dev/zero", os.O_RDONLY)
os._exit(kept)
"""
    assert python(code, subprocess.PIPE).returncode == 3
