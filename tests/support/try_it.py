"""`make run` and `make demo`: the daemon in the foreground with a toy model on the real vLLM for CPU, until Ctrl-C.

Once it says READY, one completion is asked of the server through its OpenAI API and printed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.support.toy_setup import ROOT, Setup, make_checkpoint

MGPUD = ROOT / ".venv/bin/mgpud"
MGPUCTL = ROOT / ".venv/bin/mgpuctl"
POLL_S = 0.5
PROMPT = "The load hung because"


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--fault", default="", help="MGPU_FAULT of the engine, such as p2p-hang")
    options.add_argument("--port", type=int, default=int(os.environ.get("PORT", "8000")))
    given = options.parse_args()
    make_checkpoint()
    # Under /tmp: a Unix socket's path is short, and a checkout's may be long.
    folder = Path(f"/tmp/mgpu-llm-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    setup = Setup(folder=folder, port=given.port, env={"MGPU_FAULT": given.fault} if given.fault else {})
    setup.write()
    print(f"config: {setup.config_file}\nstatus: MGPU_LLM_SOCKET={setup.socket} {MGPUCTL} status", flush=True)
    # Ctrl-C reaches the whole foreground group: the daemon ends the engine, and we wait for the daemon.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    daemon = subprocess.Popen([MGPUD, "--config", setup.config_file], preexec_fn=_default_interrupt)
    if _wait_until_ready(daemon, setup):
        # The daemon's live line stands at the bottom of a terminal: what is printed takes its place.
        clear = "\r\x1b[2K" if sys.stdout.isatty() else ""
        print(f"{clear}READY", flush=True)
        answer = _completion(setup.url)
        print(f"{clear}asked: {PROMPT}\nanswered: {answer}", flush=True)
        subprocess.run([MGPUCTL, "--socket", setup.socket, "status"], check=False)
    return daemon.wait()


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
