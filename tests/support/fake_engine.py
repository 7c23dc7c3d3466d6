"""A fast stand-in for vLLM: a real tree of processes that loads in a second, serves, and breaks on request.

Run as a script with vLLM's arguments (`COMMAND`, then the model and options); it starts in about 0.1 s. An API server,
an EngineCore and one worker per tensor-parallel rank print what a recorded vLLM printed (tests/data/fake_engine), move
memory and reads while they load, hold a psm_fake<port>_* file in /dev/shm, and then answer HTTP on --host and --port:
/health, /v1/models, /v1/completions, /v1/embeddings, /metrics (see fake_engine_http). As vLLM does, it binds the port at
once and listens only when loaded, swallows the first SIGTERM of a load and dies of SIGINT by the second, ends with 0 on
SIGTERM while serving, with 1 when a process dies during the load and with 0 when one dies while serving; and when the
API server is killed, the others live on.

What it does wrong is told by the environment variable FAKE_ENGINE: see fake_engine_scenario.
"""

from __future__ import annotations

import argparse
import errno
import mmap
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

# As a script it must find the tests first.
from tests.support.fake_engine_process import MB, Process, Setup, name_process  # noqa: E402
from tests.support.fake_engine_scenario import WORKER_ERRORS, parse_scenario  # noqa: E402

COMMAND = (sys.executable, "-S", str(Path(__file__).resolve()))
CHATTER = "INFO 11-22 10:23:01 [shm_broadcast.py:681] No available shared memory broadcast block found in 60 seconds."
NCCL_LINE = b"host:71:71 [0] NCCL INFO Channel 00/24 : 0[0] -> 1[1] via P2P/CUMEM, sequence number and more padding\n"


def parse_args(argv: list[str]) -> argparse.Namespace:
    """vLLM's command line as far as tests use it; an unknown option ends with status 2, as in vLLM."""
    parser = argparse.ArgumentParser(prog="vllm serve")
    parser.add_argument("model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--served-model-name")
    parser.add_argument("--api-key", default=os.environ.get("VLLM_API_KEY", ""))
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--dtype")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--disable-custom-all-reduce", action="store_true")
    return parser.parse_args(argv[1:] if argv[:1] == ["serve"] else argv)


class Worker(Process):
    def run(self, rank: int, core: int) -> NoReturn:
        """Like vLLM's, a worker ends with its EngineCore, but not while it is stuck in a call."""
        tp = self.args.tensor_parallel_size
        self.name = f"Worker_TP{rank}" if tp > 1 else "Worker"
        name_process("VLLM::" + self.name)
        self.on_sigterm(lambda: os._exit(0))
        if rank == 0:
            self.stray()
            self.flood()

        def follow_core() -> None:
            if os.getppid() != core:
                os._exit(0)

        if not self.load(f"w{min(rank, 1)}", follow_core):
            self.break_down(rank)
        after_s = self.scenario.number("worker-dies-serving")
        if after_s is not None and rank == tp - 1:
            time.sleep(after_s)
            os.kill(os.getpid(), signal.SIGKILL)
        while True:
            follow_core()
            time.sleep(0.05)

    def stray(self) -> None:
        for _ in range(int(self.faults.get("grandchildren", "0"))):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    os.setsid()
                    name_process("astray (1) x")
                    while True:
                        time.sleep(3600)
                os._exit(0)
            os.wait()

    def flood(self) -> None:
        lines = NCCL_LINE * (MB // 8 // len(NCCL_LINE))
        for _ in range(int(self.faults.get("flood", "0")) * 8):
            view = memoryview(lines)
            while view:
                view = view[os.write(1, view) :]

    def break_down(self, rank: int) -> None:
        stop = self.scenario.stop
        if stop in WORKER_ERRORS and rank == self.args.tensor_parallel_size - 1:
            for text in ("WorkerProc failed to start.", "Traceback (most recent call last):", WORKER_ERRORS[stop]):
                self.say("ERROR 11-22 10:28:14 [multiproc_executor.py:901] " + text)
            os._exit(1)
        if stop == "worker-dies" and rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        while stop.startswith("hang"):
            until = time.thread_time() + (0.002 if self.faults.get("hang-init") == "spin" else 0)
            while time.thread_time() < until:
                pass
            time.sleep(0.018)


class Core(Process):
    name = "EngineCore"

    def run(self) -> NoReturn:
        name_process("VLLM::EngineCore")
        self.memory = Path("/dev/shm") / f"psm_fake{self.args.port}_{os.urandom(4).hex()}"
        descriptor = os.open(self.memory, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)  # the workers hold it as well
        os.ftruncate(descriptor, MB)
        self.workers: list[int] = []
        core = os.getpid()
        for rank in range(self.args.tensor_parallel_size):
            pid = os.fork()
            if pid == 0:
                Worker(self.setup).run(rank, core)
            self.workers.append(pid)
        self.on_sigterm(self.end)
        self.load("core", self.look_after_workers)
        said_s = time.monotonic()
        while True:
            self.look_after_workers()
            if "chatter" in self.faults and time.monotonic() - said_s >= 1:
                said_s = time.monotonic()
                self.say(CHATTER)
            time.sleep(0.05)

    def look_after_workers(self) -> None:
        for pid in list(self.workers):
            if os.waitpid(pid, os.WNOHANG)[0] == pid:
                self.workers.remove(pid)
                self.say(f"ERROR 11-22 10:28:23 [core.py:1330] Worker proc VllmWorker (pid {pid}) died unexpectedly.")
                self.end()

    def end(self) -> None:
        for pid in self.workers:
            os.kill(pid, signal.SIGKILL)
        self.memory.unlink(missing_ok=True)
        os._exit(1)


class ApiServer(Process):
    name = "APIServer"

    def run(self) -> NoReturn:
        self.refuse()
        self.socket = self.bind()
        self.core = os.fork()
        if self.core == 0:
            self.socket.close()
            Core(self.setup).run()
        self.serving = False
        self.sigterms = 0
        self.on_sigterm(self.terminate)
        if not self.load("api", self.look_after_core):
            self.break_down()
        self.serve()

    def refuse(self) -> None:
        if "bad-flag" in self.faults:
            os.write(2, b"usage: vllm serve [model_tag] [options]\nvllm: error: unrecognized arguments: --no-such\n")
            os._exit(2)
        if "missing-model" in self.faults:
            path = self.args.model
            self.say(f"OSError: Repo id must be in the form 'repo_name' or 'namespace/repo_name': '{path}'.", "-")
            os._exit(1)

    def bind(self) -> socket.socket:
        """At once, and listening only when loaded: until then connections are refused."""
        bound = socket.socket(socket.AF_INET6 if ":" in self.args.host else socket.AF_INET)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            bound.bind((self.args.host, self.args.port))
        except OSError as error:
            self.say(f"OSError: [Errno {error.errno}] {os.strerror(error.errno or errno.EADDRINUSE)}", "-")
            os._exit(1)
        return bound

    def look_after_core(self) -> None:
        if os.waitpid(self.core, os.WNOHANG)[0] != self.core:
            return
        if self.serving:
            self.say("ERROR 11-22 10:30:01 [async_llm.py:708] AsyncLLM output_handler failed: EngineDeadError")
            os._exit(0)
        self.say("RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}", "-")
        os._exit(1)

    def terminate(self) -> None:
        if self.serving:
            self.say("INFO 11-22 10:22:04 [launcher.py:100] [shutdown] API server: shutdown triggered")
            self.end(0)
        self.sigterms += 1
        if self.sigterms == 2:
            self.end_core()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)

    def end_core(self) -> None:
        os.kill(self.core, signal.SIGTERM)
        os.waitpid(self.core, 0)

    def end(self, status: int) -> NoReturn:
        self.end_core()
        os._exit(status)

    def break_down(self) -> None:
        if self.scenario.stop == "exit":
            self.say("ERROR 11-22 10:25:00 [entry.py:99] RuntimeError: something went wrong")
            self.end(int(self.faults["exit"]))
        if self.scenario.stop == "sigkill":
            os.kill(os.getpid(), signal.SIGKILL)
        while True:
            self.look_after_core()
            time.sleep(0.05)

    def serve(self) -> NoReturn:
        from tests.support import fake_engine_http  # here, because it takes 50 ms

        self.serving = True
        server = fake_engine_http.make(self.socket, self.args, self.scenario)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        after_s = self.scenario.number("exit-serving")
        ends_at = float("inf") if after_s is None else time.monotonic() + after_s
        while time.monotonic() < ends_at:
            self.look_after_core()
            time.sleep(0.02)
        self.end(0)


def main() -> NoReturn:
    started = time.monotonic()
    args = parse_args(sys.argv[1:])
    scenario = parse_scenario(os.environ.get("FAKE_ENGINE", ""), args)
    ApiServer(Setup(args, scenario, started, mmap.mmap(-1, 4))).run()


if __name__ == "__main__":
    main()
