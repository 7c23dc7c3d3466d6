"""What watching a load costs: processor time of the daemon's own sampling path in percent of one core.

    python -m tests.bench.sampler_cost [--tree walked|cgroup] [--processes 24] [--threads 60] [--gpus 8] [--others 300]

The engine is real and idle: so many processes of so many threads, on a host with so many others. The GPUs are those of the
simulated driver, whose answers cost nothing, so that only our side of NVML is measured. The path is the daemon's: the
observer at the pace of a load, the queue, `supervisor.step` and the recorder. Needs gcc; --tree cgroup needs root.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import json
import os
import pstats
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from mgpu_llm.adapters.engine.process import EngineProcess
from mgpu_llm.adapters.gpus import Gpus
from mgpu_llm.adapters.recorder import Recorder
from mgpu_llm.core import recording, supervisor
from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.events import EngineSpawned, Event, LineRead, StartRequested, Ticked
from mgpu_llm.core.ladder import BASE, Ladder
from mgpu_llm.core.launch import Launch
from mgpu_llm.core.states import Policy, Starting, State, Stopped
from mgpu_llm.observer import Observer
from tests.support.fake_nvml import FakeGpu, FakeNvml, build
from tests.support.fake_nvml.asked import uuid

WARM_UP_S: Final = 3.0
TICK_S: Final = 0.5
#: The top process, whose children are the workers; each says that it is there.
ENGINE: Final = """
import os, sys, threading, time
threading.stack_size(1 << 16)
processes, threads = int(sys.argv[1]), int(sys.argv[2])
for _ in range(processes - 1):
    if os.fork() == 0: break
for _ in range(threads - 1): threading.Thread(target=time.sleep, args=(86400,), daemon=True).start()
os.write(1, b"there\\n")
time.sleep(86400)
"""


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--tree", choices=("walked", "cgroup"), default="walked")
    options.add_argument("--processes", type=int, default=24)
    options.add_argument("--threads", type=int, default=60)
    options.add_argument("--gpus", type=int, default=8)
    options.add_argument("--others", type=int, default=300)
    options.add_argument("--seconds", type=float, default=20)
    options.add_argument("--profile", action="store_true", help="where the time goes, thread by thread, on stderr")
    given = options.parse_args()
    if "FAKE_NVML_CONTROL" not in os.environ:
        with _driver(given.gpus) as environment:
            sys.exit(subprocess.run([sys.executable, "-m", __spec__.name, *sys.argv[1:]], env=environment).returncode)
    with tempfile.TemporaryDirectory() as folder, _others(given.others), _cgroup(given.tree) as cgroup:
        print(json.dumps(asyncio.run(_measure(given, Path(folder), cgroup))))


@contextlib.contextmanager
def _driver(count: int) -> Iterator[dict[str, str]]:
    """The environment in which the real pynvml finds the simulated driver; each GPU computes for three processes."""
    with tempfile.TemporaryDirectory() as folder:
        nvml = FakeNvml(Path(folder), build(Path(folder)))
        busy = FakeGpu(
            used_bytes=70 << 30, utilisation_percent=50, processes=((11, 1 << 30), (12, 1 << 30), (13, None))
        )
        nvml.set([busy] * count)
        environment = {**os.environ, **nvml.environment()}
        del environment["FAKE_NVML_CALLS"]  # it would write a file at each call
        yield environment


@contextlib.contextmanager
def _others(count: int) -> Iterator[None]:
    """Processes of the host that are none of the engine's: children of a process that is no child of ours for long."""
    code = "import os, subprocess, sys\nfor _ in range(int(sys.argv[1])): subprocess.Popen(['sleep', '86400'])\n"
    code += "print('there', flush=True); sys.stdin.read(); os.killpg(0, 9)"
    with subprocess.Popen(
        [sys.executable, "-S", "-c", code, str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as crowd:
        assert crowd.stdout is not None
        crowd.stdout.readline()
        yield
        assert crowd.stdin is not None
        crowd.stdin.close()


@contextlib.contextmanager
def _cgroup(tree: str) -> Iterator[Path | None]:
    """A cgroup of version 2 for the engine, on a mount of our own."""
    if tree == "walked":
        yield None
        return
    with tempfile.TemporaryDirectory() as mount:
        subprocess.run(["mount", "-t", "cgroup2", "none", mount], check=True)
        parent = Path(mount) / f"mgpu-llm-bench-{os.getpid()}"
        try:
            parent.mkdir()
            yield parent
        finally:
            parent.rmdir()
            subprocess.run(["umount", mount], check=True)


async def _measure(given: argparse.Namespace, folder: Path, cgroup: Path | None) -> dict[str, Any]:
    events: asyncio.Queue[Event] = asyncio.Queue()
    uuids = {str(index): uuid(index) for index in range(given.gpus)}
    engine = EngineProcess(clock=time.monotonic, emit=events.put_nowait, runtime_dir=folder, cgroup=cgroup)
    observer = Observer(Gpus(), uuids, time.monotonic, events.put_nowait)
    recorder = Recorder(folder / "records", keep=20, max_bytes=200 << 20)
    profiles = _profiled() if given.profile else None
    await engine.spawn(1, (sys.executable, "-S", "-c", ENGINE, str(given.processes), str(given.threads)), os.environ)
    try:
        there = 0
        while there < given.processes:
            there += isinstance(event := await events.get(), LineRead) and event.text == "there"
        extra = (engine.pressure,) if hasattr(engine, "pressure") else ()
        watching = asyncio.create_task(observer.watch(1, tuple(uuids), engine.sample, lambda: True, *extra))
        await _loop(events, recorder, tuple(uuids), WARM_UP_S)
        before, began, threads = time.process_time(), time.monotonic(), _thread_times()
        counts = await _loop(events, recorder, tuple(uuids), given.seconds)
        used_s, took_s = time.process_time() - before, time.monotonic() - began
        shares = {name: (at_s - threads.get(name, 0.0)) / took_s for name, at_s in _thread_times().items()}
        watching.cancel()
    finally:
        await engine.kill(30)
        recorder.close(10)
    if profiles is not None:
        _tell(profiles)
    return {
        "tree": given.tree,
        "percent_of_a_core": round(100 * used_s / took_s, 2),
        "of_that": {name: round(100 * share, 2) for name, share in shares.items()},
        "a_second": {name: round(count / took_s, 2) for name, count in sorted(counts.items())},
        "processes": given.processes,
        "threads": given.threads,
        "gpus": given.gpus,
        "others": given.others,
        "recorded_bytes": sum(file.stat().st_size for file in (folder / "records").iterdir()),
    }


def _thread_times() -> dict[str, float]:
    """Processor seconds of our threads by name."""
    texts = {thread.name: Path(f"/proc/self/task/{thread.native_id}/schedstat") for thread in threading.enumerate()}
    return {name: int(file.read_text().split()[0]) / 1e9 for name, file in texts.items()}


async def _loop(events: asyncio.Queue[Event], recorder: Recorder, gpus: tuple[str, ...], for_s: float) -> Counter[str]:
    """The runner's way of an event, with a patience that does not end, and without effects."""
    launch = Launch(gpus=gpus, tensor_parallel=len(gpus), utilisation=0.9)
    policy = Policy(ladder=Ladder(base=launch), patience=dict.fromkeys(Phase, 1e6))
    now = time.monotonic()
    state, _ = supervisor.step(Stopped(), StartRequested(at=now), policy)
    state, _ = supervisor.step(state, EngineSpawned(at=now, attempt=1, pid=1), policy)
    recorder.begin(1, now, recording.note(0, "attempt", format=recording.FORMAT, rung=BASE.name))
    ticking, counts = asyncio.create_task(_tick(events)), Counter[str]()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(for_s):
            while True:
                event = await events.get()
                recorder.take(event)
                state = _stepped(state, event, policy)
                counts[type(event).__name__] += 1
    ticking.cancel()
    recorder.end("stopped", [])
    return counts


def _stepped(state: State, event: Event, policy: Policy) -> State:
    after, _ = supervisor.step(state, event, policy)
    if not isinstance(after, Starting):
        raise SystemExit(f"cannot measure: the load ended in {after} at {event}")
    return after


async def _tick(events: asyncio.Queue[Event]) -> None:
    while True:
        events.put_nowait(Ticked(at=time.monotonic()))
        await asyncio.sleep(TICK_S)


def _profiled() -> list[cProfile.Profile]:
    """A profile for this thread and for each one to come."""
    profiles = [cProfile.Profile(time.thread_time)]

    def begin(*_: object) -> None:
        profiles.append(cProfile.Profile(time.thread_time))
        profiles[-1].enable()

    threading.setprofile(begin)
    profiles[0].enable()
    return profiles


def _tell(profiles: list[cProfile.Profile]) -> None:
    for profile in profiles:
        profile.disable()
        with contextlib.suppress(TypeError):  # a thread that did nothing
            pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(14)


if __name__ == "__main__":
    main()
