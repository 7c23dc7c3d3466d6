"""One engine at a time: a process tree that is spawned, watched, ended and cleaned up after, told in events."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mgpu_llm.adapters.engine import at_death, command, leftovers, pressure, tags
from mgpu_llm.adapters.engine.aside import aside
from mgpu_llm.adapters.engine.cgroup import CgroupTree
from mgpu_llm.adapters.engine.output import Output, Tail
from mgpu_llm.adapters.engine.pressure import Pressure
from mgpu_llm.adapters.engine.sampler import sample
from mgpu_llm.adapters.engine.tree import Stat, Tree, WalkedTree, read_stat
from mgpu_llm.core.events import (
    EngineEvent,
    EngineExited,
    EngineGone,
    EngineSpawned,
    EngineSpawnFailed,
    EngineStuck,
    LineRead,
    LinesDropped,
    ProcessSample,
)
from mgpu_llm.core.redaction import Redactor, secrets_of

#: Looking at what processes have mapped may wait on one that is stuck: this long, then we do without.
LOOK_S = 2.0
CLEAN_S = 10.0
#: What is kept of an engine's words at its death.
WORDS_BYTES = 2 << 20
PASS_S = 0.02
SLOW_PASS_S = 0.1
PR_SET_CHILD_SUBREAPER = 36


@dataclass(kw_only=True)
class _Attempt:
    number: int
    popen: subprocess.Popen[bytes]
    pidfd: int
    tree: Tree
    output: Output
    memory: leftovers.SharedMemory
    sockets: Path | None
    exited: bool = False
    rendezvous: set[str] = field(default_factory=set)


class EngineProcess:
    """Spawns engines, one at a time, and tells `emit` what becomes of them. All methods belong to the loop's thread,
    except `sample`.

    `clock` gives monotonic seconds. `runtime_dir` is the daemon's own folder: it names the daemon in the engines'
    environment and holds their sockets. `cgroup` is the daemon's own, delegated one (`cgroup.find_delegated`); without
    one the tree is found by walking, and the daemon becomes the parent of orphans. `before_gone(attempt)` is awaited
    when no process is left and before EngineGone, to which its remarks are added; it must not raise.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        emit: Callable[[EngineEvent], None],
        runtime_dir: Path,
        cgroup: Path | None = None,
        before_gone: Callable[[int], Awaitable[tuple[str, ...]]] | None = None,
    ) -> None:
        self._clock = clock
        self._emit = emit
        self._runtime_dir = runtime_dir
        self._cgroup = cgroup
        self._before_gone = before_gone
        self._attempt: _Attempt | None = None
        self._one_at_a_time = asyncio.Lock()
        self.tail = Tail()

    async def spawn(self, attempt: int, argv: tuple[str, ...], env: Mapping[str, str], cwd: Path | None = None) -> None:
        """Answered by EngineSpawned or EngineSpawnFailed. Raises RuntimeError while an engine is not yet gone."""
        async with self._one_at_a_time:
            if self._attempt is not None:
                raise RuntimeError(f"cannot spawn attempt {attempt}: attempt {self._attempt.number} is not gone")
            if why := command.problem(argv, env, cwd):
                self._emit(EngineSpawnFailed(at=self._clock(), attempt=attempt, reason=why, hopeless=True))
                return
            try:
                await self._spawn(attempt, argv, env, cwd)
            except (OSError, ValueError) as error:
                why, hopeless = command.spawn_problem(error)
                self._emit(EngineSpawnFailed(at=self._clock(), attempt=attempt, reason=why, hopeless=hopeless))

    async def _spawn(self, number: int, argv: tuple[str, ...], env: Mapping[str, str], cwd: Path | None) -> None:
        self.tail.begin_anew()
        tag = tags.new(self._runtime_dir, number)
        memory = leftovers.SharedMemory()
        with contextlib.ExitStack() as undo:
            group = self._make_cgroup(number)
            if group is not None:
                undo.callback(group.remove)
            adopt_orphans(group is None)
            sockets = None if tags.SOCKETS in env else leftovers.make_socket_folder(self._runtime_dir)
            if sockets is not None:
                undo.callback(leftovers.remove_folder, sockets)
            redactor = Redactor(secrets_of(env, argv))
            output = Output(number, self._clock, self._on_line, self.tail, redactor)
            undo.callback(output.close)
            popen = await asyncio.to_thread(
                subprocess.Popen,
                argv if group is None else group.enter(argv),
                stdin=subprocess.DEVNULL,
                stdout=output.write_fd,
                stderr=output.write_fd,
                env=tags.marked(env, tag, sockets),
                cwd=cwd,
                start_new_session=True,
            )
            undo.pop_all()
        output.close_write_end()
        _first_to_go_without_memory(popen.pid)
        pidfd = os.pidfd_open(popen.pid)
        tree = group or WalkedTree(_stat_of_child(popen.pid), lambda pid: tags.is_marked(pid, tag))
        self._attempt = _Attempt(
            number=number, popen=popen, pidfd=pidfd, tree=tree, output=output, memory=memory, sockets=sockets
        )
        self._emit(EngineSpawned(at=self._clock(), attempt=number, pid=popen.pid))
        output.begin()
        asyncio.get_running_loop().add_reader(pidfd, self._notice_exit, self._attempt)

    def terminate(self) -> None:
        """SIGTERM to the top process: a serving vLLM then finishes or aborts what it does and ends. One that loads swallows
        it (0.11 to 0.33) and has nothing to finish: kill it. Never to the group: without its workers a loading API server
        waits for 600 s."""
        attempt = self._attempt
        if attempt is not None and not attempt.exited:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(attempt.pidfd, signal.SIGTERM)

    async def abort(self, limit_s: float) -> tuple[str, ...]:
        """What its processes print as they die of SIGABRT, which is nothing of an engine that has ended; `at_death` says how.
        The rest of it stands still from then on: to be followed by `kill`."""
        async with self._one_at_a_time:
            attempt = self._attempt
            if attempt is not None:
                self._notice_exit(attempt)
            if attempt is None or attempt.exited:
                return ()
            with attempt.output.kept_apart(WORDS_BYTES) as words:

                def say(line: str) -> None:
                    attempt.output.drain()
                    words.append(line)

                await at_death.abort(attempt.tree.members(whole=True), limit_s, say)
            return tuple(words.lines)

    async def kill(self, deadline_s: float) -> None:
        """End every process and remove what they left. Answered by EngineGone, or by EngineStuck when some outlive
        SIGKILL by `deadline_s`; then it may be called again. Does nothing without an engine."""
        async with self._one_at_a_time:
            attempt = self._attempt
            if attempt is None:
                return
            pids = [stat.pid for stat in attempt.tree.members(whole=True)]
            await aside(lambda: attempt.memory.see_holders(pids), LOOK_S)
            left = await self._kill_all(attempt, self._clock() + deadline_s)
            if left:
                holders = tuple(str(stat) for stat in left)
                self._emit(EngineStuck(at=self._clock(), attempt=attempt.number, holders=holders))
                return
            self._notice_exit(attempt)
            attempt.output.close()
            remarks = await self._before_gone(attempt.number) if self._before_gone else ()
            remarks += await self._clean_up(attempt)
            self._attempt = None
            self._emit(EngineGone(at=self._clock(), attempt=attempt.number, remarks=remarks))

    def marked(self, environment: Mapping[str, str], attempt: int) -> dict[str, str]:
        """The environment of a process that works for an attempt without being of its engine: a sweep finds it too."""
        return tags.marked(environment, tags.new(self._runtime_dir, attempt), None)

    def abandon(self) -> None:
        """Go on without an engine whose processes outlive SIGKILL: it is not waited for any more, and stays as it is."""
        attempt, self._attempt = self._attempt, None
        if attempt is None:
            return
        self._notice_exit(attempt)
        if not attempt.exited:
            asyncio.get_running_loop().remove_reader(attempt.pidfd)
        os.close(attempt.pidfd)
        attempt.output.close()

    @property
    def running(self) -> bool:
        """Whether there is an engine that is not yet gone."""
        return self._attempt is not None

    def sample(self) -> tuple[ProcessSample, ...]:
        """The engine's processes now; empty without an engine. Plain and synchronous, for a worker thread."""
        attempt = self._attempt
        return () if attempt is None else sample(attempt.tree)

    def pressure(self) -> Pressure:
        """Of the engine's cgroup where it has one, else of the host. Plain and synchronous, for a worker thread."""
        tree = None if self._attempt is None else self._attempt.tree
        return pressure.read(tree.path if isinstance(tree, CgroupTree) else None)

    def pids(self) -> tuple[int, ...]:
        """The engine's living processes now, for whoever takes their stacks."""
        attempt = self._attempt
        return () if attempt is None else tuple(stat.pid for stat in attempt.tree.members(whole=True))

    def _make_cgroup(self, attempt: int) -> CgroupTree | None:
        if self._cgroup is None:
            return None
        try:
            return CgroupTree(self._cgroup, attempt)
        except OSError:  # not delegated after all, or an old one is still busy: walking finds the tree as well
            return None

    def _on_line(self, event: LineRead | LinesDropped) -> None:
        if self._attempt is not None and isinstance(event, LineRead):
            self._attempt.rendezvous.update(leftovers.RENDEZVOUS.findall(event.text))
        self._emit(event)

    def _notice_exit(self, attempt: _Attempt) -> None:
        """The top process has ended. Its zombie stays until the attempt is over, so that its pid stays its own."""
        if attempt.exited:
            return
        ended = os.waitid(os.P_PIDFD, attempt.pidfd, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if ended is None:
            return
        attempt.exited = True
        asyncio.get_running_loop().remove_reader(attempt.pidfd)
        attempt.output.drain()
        status = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        self._emit(EngineExited(at=self._clock(), attempt=attempt.number, status=status))

    async def _kill_all(self, attempt: _Attempt, deadline: float) -> tuple[Stat, ...]:
        pause_s = PASS_S
        while left := attempt.tree.kill():
            if self._clock() >= deadline:
                return left
            await asyncio.sleep(pause_s)
            pause_s = min(SLOW_PASS_S, pause_s * 1.5)
        return ()

    async def _clean_up(self, attempt: _Attempt) -> tuple[str, ...]:
        os.close(attempt.pidfd)
        attempt.popen.wait()
        remarks = await aside(attempt.memory.remove, CLEAN_S)
        if remarks is None:
            remarks = ("left /dev/shm as it is: a process that cannot be looked at may use what the engine left there",)
        if attempt.sockets is not None:
            remarks += leftovers.remove_folder(attempt.sockets)
        leftovers.remove_rendezvous(attempt.rendezvous)
        problem = attempt.tree.remove()
        return (*remarks, problem) if problem else remarks


def adopt_orphans(wanted: bool) -> None:
    """While wanted, a process below us that loses its parent becomes our child, not init's (PR_SET_CHILD_SUBREAPER)."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def _first_to_go_without_memory(pid: int) -> None:
    """A unit may protect the daemon from the kernel's OOM killer (OOMScoreAdjust); the engine must not inherit that: it
    has the memory, and the daemon is what brings it back."""
    own = int(Path("/proc/self/oom_score_adj").read_text())
    if own < 0:
        with contextlib.suppress(OSError):  # it has ended already
            Path(f"/proc/{pid}/oom_score_adj").write_text("0")


def _stat_of_child(pid: int) -> Stat:
    stat = read_stat(pid)
    if stat is None:  # a child that was not waited for is at least a zombie
        raise RuntimeError(f"cannot find our own child {pid}: somebody else waited for it")
    return stat
