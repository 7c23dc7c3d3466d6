"""`make run` and `make demo`: the daemon in the foreground with a toy model on the real vLLM for CPU, until Ctrl-C.

Once it says READY, one completion is asked of the server through its OpenAI API and printed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from mgpu_llm.adapters import instance_lock
from mgpu_llm.config.listener import port_trouble
from tests.support.toy_setup import ROOT, Setup, make_checkpoint

MGPUD = ROOT / ".venv/bin/mgpud"
MGPUCTL = ROOT / ".venv/bin/mgpuctl"
RECORDINGS = ROOT / "build/recordings"
#: Under /tmp: a Unix socket's path is short, and a checkout's may be long. By name, so that mgpuctl can be told where.
FOLDER = Path(f"/tmp/mgpu-llm-{os.getuid()}")
PORT = os.environ.get("PORT", "8000")
#: vLLM remembers what it has seen of a model; a trial leaves nothing in the home directory.
CACHES = {"VLLM_CACHE_ROOT": str(ROOT / "build/vllm-cache")}
POLL_S = 0.5
PROMPT = "The load hung because"


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--fault", default="", help="MGPU_FAULT of the engine, such as p2p-hang")
    options.add_argument("--port", type=int, default=PORT, help="also by PORT=")
    given = options.parse_args()
    make_checkpoint()
    env = {**CACHES, **({"MGPU_FAULT": given.fault} if given.fault else {})}
    setup = Setup(folder=FOLDER, port=given.port, env=env)
    if why := trouble(setup):
        print(why, file=sys.stderr)
        return os.EX_TEMPFAIL
    setup.write()
    print(
        f"config: {setup.config_file}\nin another terminal, for mgpuctl status and the rest:\n"
        f"  export MGPU_LLM_SOCKET={setup.socket} PATH={MGPUCTL.parent}:$PATH",
        flush=True,
    )
    # Ctrl-C reaches the whole foreground group: the daemon ends the engine, and we wait for the daemon.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    daemon = subprocess.Popen([MGPUD, "--config", setup.config_file], preexec_fn=_default_interrupt)
    if _wait_until_ready(daemon, setup):
        # The daemon's live line stands at the bottom of a terminal: what is printed takes its place.
        clear = "\r\x1b[2K" if sys.stdout.isatty() else ""
        print(f"{clear}READY", flush=True)
        answer = _completion(setup.url)
        asked = subprocess.run(
            [MGPUCTL, "--socket", setup.socket, "status"], check=False, capture_output=True, text=True
        )
        print(
            f"{clear}asked: {PROMPT}\nanswered (nonsense: the weights are random): {answer}\n{asked.stdout}", flush=True
        )
    status = daemon.wait()
    keep_recordings(setup)
    shutil.rmtree(setup.folder)
    return status if status >= 0 else 128 - status


def keep_recordings(setup: Setup) -> None:
    """The trial's folder goes, what was recorded stays."""
    if (records := setup.state_dir / "records").is_dir():
        shutil.copytree(records, RECORDINGS, dirs_exist_ok=True)
        print(f"its loads are recorded in {RECORDINGS}; judge one again: {MGPUCTL} replay FILE", flush=True)


def trouble(setup: Setup) -> str:
    """Why no trial can run now, "" if one can. Makes its folder."""
    setup.folder.mkdir(mode=0o700, exist_ok=True)
    found = setup.folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        return f"cannot use '{setup.folder}': it must be a folder that is yours alone; remove it"
    if pid := instance_lock.holder(setup.runtime_dir):
        return f"cannot start: a trial runs already (mgpud has pid {pid}); end it first"
    if why := port_trouble("127.0.0.1", setup.port):
        return f"cannot use port {setup.port}: {why}; choose another with PORT=, as in: make run PORT=8001"
    return ""


def _default_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _wait_until_ready(daemon: subprocess.Popen[bytes], setup: Setup) -> bool:
    """True once the daemon says that the engine serves; false when it ended before."""
    while daemon.poll() is None:
        asked = subprocess.run(
            [MGPUCTL, "--socket", setup.socket, "status", "--json"], check=False, capture_output=True, text=True
        )
        if asked.returncode == 0 and json.loads(asked.stdout)["state"] == "ready":
            return True
        time.sleep(POLL_S)
    return False


def _completion(url: str) -> str:
    body = json.dumps({"model": "toy", "prompt": PROMPT, "max_tokens": 24, "temperature": 0}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        text: str = json.load(answer)["choices"][0]["text"]
        return text


if __name__ == "__main__":
    sys.exit(main())
