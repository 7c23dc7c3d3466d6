"""`make demo-ladder`: three faults, three rungs, and a second start that begins where the first one ended.

The daemon runs the real vLLM on CPU with faults injected until it serves, is started again with the same state folder, and
beside that with a config that has the same settings from the beginning. What it said and how long that took becomes a page.
Ends with 1 if the second start takes more than a tenth longer than one that never failed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tests.ctl.terminal import terminal
from tests.daemon.notified import notified
from tests.support.daemons import MGPUCTL, Daemon, complete, running
from tests.support.demo_ladder_page import GOAL, WIDTH, Story, Times, journal, neutral, page, table
from tests.support.toy_setup import Setup, make_checkpoint
from tests.support.try_it import CACHES, FOLDER, PORT, PROMPT, keep_recordings, trouble

FAULTS: Final = ("p2p-hang", "exit-in-capture", "broken-gpu")
#: (rung, outcome, cause) of every attempt; the cause of the one that serves is "".
STORY: Final = (
    ("base", "stalled", "stalled-in-distributed-init"),
    ("p2p-off", "crashed", "cuda-out-of-memory"),
    ("p2p-off+eager", "crashed", "gpu-fault"),
    ("p2p-off+eager+tp-1", "ready", ""),
)
START_S: Final = 600.0
POLL_S: Final = 0.02
LOOK_S: Final = 0.5


def main() -> int:
    options = argparse.ArgumentParser(prog="demo_ladder", description=__doc__)
    options.add_argument("--port", type=int, default=PORT, help="also by PORT=")
    options.add_argument("--rounds", type=int, default=5, help="of second start and start that never failed")
    options.add_argument("--write", type=Path, help="the page")
    given = options.parse_args()
    make_checkpoint()
    env = {**CACHES, "MGPU_FAULT": ",".join(FAULTS)}
    setup = Setup(folder=FOLDER, port=given.port, env=env, eager=False)
    if why := trouble(setup):
        print(why, file=sys.stderr)
        return os.EX_TEMPFAIL
    # So that the daemon is ended with us, as it is by Ctrl-C.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        story = tell(setup)
        times = measure(setup, given.rounds)
    finally:
        keep_recordings(setup)
        shutil.rmtree(FOLDER)
    print(f"\n{table(times)}\n\nratio {times.ratio:.3f}, to be {GOAL:.2f} at most")
    if given.write is not None:
        given.write.write_text(page(setup, story, times), encoding="utf-8")
        print(f"written: {given.write}")
    return 0 if times.ratio <= GOAL else 1


def tell(setup: Setup) -> Story:
    """The start that meets every fault; printed as it goes. Raises SystemExit where it went another way than it should."""
    screens, printed = dict[str, str](), list[str]()

    def look(daemon: Daemon) -> None:
        new = journal(daemon.log()).splitlines()[len(printed) :]
        for line in new:
            print(line, flush=True)
        printed.extend(new)
        if any("engine.starting attempt=3" in line for line in new):
            screens["mgpuctl ladder     # while the third attempt loads"] = screen(daemon, "ladder")

    with serving(setup, "first", look) as (daemon, ready_s):
        look(daemon)
        print(f"READY after {ready_s:.1f} s\nasked: {PROMPT}\nanswered: {complete(setup.url, PROMPT)}", flush=True)
        attempts = daemon.status()["attempts"]
        for words in ("status", "attempts", "plan --cause cuda-out-of-memory"):
            screens[f"mgpuctl {words}"] = screen(daemon, *words.split())
        said = journal(daemon.log())
    found = tuple((attempt["rung"], attempt["outcome"], attempt["cause"]) for attempt in attempts)
    if found != STORY:
        raise SystemExit(f"it went another way: {found}\nand should have gone: {STORY}")
    return Story(said=said, attempts=attempts, screens=screens, ready_s=ready_s)


def measure(setup: Setup, rounds: int) -> Times:
    """The second start and one that never failed, in turn."""
    again, smooth, said = list[float](), list[float](), ""
    for number in range(1, rounds + 1):
        with serving(setup, f"again-{number}") as (daemon, ready_s):
            _in_one_attempt(daemon, STORY[-1][0])
            again.append(ready_s)
            said = said or journal(daemon.log())
        with serving(never_failed(setup, number), f"never-failed-{number}") as (daemon, ready_s):
            _in_one_attempt(daemon, "base")
            smooth.append(ready_s)
        print(f"second start {again[-1]:.1f} s, one that never failed {smooth[-1]:.1f} s", flush=True)
    return Times(again=again, smooth=smooth, said=said)


def _in_one_attempt(daemon: Daemon, rung: str) -> None:
    status = daemon.status()
    if (status["attempt"], status["rung"]) != (1, rung):
        raise SystemExit(
            f"it serves in attempt {status['attempt']} on rung {status['rung']}, not in the first on {rung}"
        )


def never_failed(setup: Setup, number: int) -> Setup:
    """Without faults, with nothing remembered, and with the last rung's settings as its own."""
    return Setup(
        folder=setup.folder / f"never-failed-{number}",
        port=setup.port,
        env={**CACHES, "NCCL_P2P_DISABLE": "1"},
        args=("--disable-custom-all-reduce",),
        tensor_parallel=1,
    )


@contextmanager
def serving(setup: Setup, name: str, look: Callable[[Daemon], None] | None = None) -> Iterator[tuple[Daemon, float]]:
    """A daemon that serves, and after how many seconds it told systemd so. Meanwhile `look` is called again and again."""
    setup.write()
    log = FOLDER / f"{name}.log"
    with (
        notified(log.with_suffix(".notify")) as manager,
        running(setup.config_file, setup.socket, log, manager.environ(watchdog_s=60)) as daemon,
    ):
        begun = time.monotonic()
        while not manager.has("READY=1"):
            if daemon.process.poll() is not None or time.monotonic() > begun + START_S:
                raise SystemExit(f"it never served; the log ends:\n{daemon.log()[-6000:]}")
            if look is not None:
                look(daemon)
            time.sleep(POLL_S if look is None else LOOK_S)
        yield daemon, time.monotonic() - begun


def screen(daemon: Daemon, *words: str) -> str:
    """What mgpuctl shows on a terminal."""
    with terminal(WIDTH) as shown:
        command: list[str | Path] = [MGPUCTL, "--socket", daemon.socket, *words]
        subprocess.run(command, stdout=shown.slave, check=True, env={**os.environ, "NO_COLOR": "1"})
    return neutral(shown.raw.replace("\r\n", "\n").rstrip())


if __name__ == "__main__":
    sys.exit(main())
