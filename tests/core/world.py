"""A model of the world around the core: it keeps the books on what effects asked for, and tells when a rule is broken.

The rules that hold for every story: never two engines, never two checks of GPUs, attempts only grow, an attempt is spawned
once, READY only on a served completion, KillEngine before the next SpawnEngine, nothing after an Exit, and only the daemon's
own exit statuses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

from mgpu_llm.core import progress, remedies
from mgpu_llm.core.diagnosis import Diagnosis
from mgpu_llm.core.effects import (
    Announce,
    BeginPreflight,
    Effect,
    EndPreflight,
    Exit,
    KeepIncident,
    KillEngine,
    NotifyReady,
    ProbeCompletion,
    ProbeHealth,
    SpawnEngine,
    TakeStacks,
    TerminateEngine,
)
from mgpu_llm.core.events import (
    CompletionProbed,
    EngineExited,
    EngineGone,
    EngineSpawned,
    Event,
    GpuSample,
    GpusSampled,
    HealthProbed,
    LineRead,
    Preflighted,
    ProcessesSampled,
    ProcessSample,
    Stack,
    StacksTaken,
    StartRequested,
    StopRequested,
    Ticked,
)
from mgpu_llm.core.ladder import Heads, Ladder, Rung, smaller
from mgpu_llm.core.launch import Launch
from mgpu_llm.core.planning import plans
from mgpu_llm.core.preflight import Checked
from mgpu_llm.core.progress import Progress
from mgpu_llm.core.states import Ended, Failed, Killing, Policy, Ready, Starting, State, Stopped
from mgpu_llm.core.supervisor import step
from tests.core.looks import still

EXIT_STATUSES: Final = frozenset({0, 65, 69})
BASE: Final = Launch(gpus=("GPU-a", "GPU-b"), tensor_parallel=2, utilisation=0.9)
ON_CPU: Final = Launch(gpus=None, tensor_parallel=2, utilisation=None)
P2P_OFF: Final = Rung(remedies=(remedies.P2P_OFF,))
#: What the wall clock said when the events' clock was at 0: 2026-11-24, 00:00 UTC.
MIDNIGHT_S: Final = 1_795_478_400.0
HEADS: Final = Heads(attention=28, key_value=4)

BANNER: Final = "(APIServer pid=702) INFO 11-22 11:08:01 [api_utils.py:273] non-default args: {'model': '/models/m7b'}"
WORLD_SIZE: Final = (
    "(Worker pid=1027) INFO 11-22 11:08:51 [parallel_state.py:1615] world_size=2 rank=0 local_rank=0 "
    "distributed_init_method=tcp://127.0.0.1:55337 backend=nccl"
)
NCCL: Final = "(Worker pid=1027) INFO 11-22 11:08:51 [pynccl.py:113] vLLM is using nccl==2.28.9"
ASSIGNED: Final = (
    "(Worker pid=1027) INFO 11-22 11:08:57 [parallel_state.py:1946] rank 0 in world size 2 is assigned as DP rank 0, "
    "PP rank 0, PCP rank 0, TP rank 0, EP rank N/A, EPLB rank N/A"
)
COMPILE: Final = "INFO 11-22 10:21:02 [gpu_model_runner.py:1] Model loading took 7.16 GiB and 4.705559 seconds"
UP: Final = "(APIServer pid=702) INFO:     Application startup complete."
OUT_OF_MEMORY: Final = (
    "(Worker_TP0 pid=9) ERROR 11-22 11:08:57 [multiproc_executor.py:901] torch.OutOfMemoryError: CUDA out of memory. "
    "Tried to allocate 1.02 GiB. GPU 0 has a total capacity of 139.80 GiB of which 512.00 MiB is free."
)
NO_KV_MEMORY: Final = (
    "(EngineCore pid=3578) ERROR 11-22 10:28:23 [core.py:1330] ValueError: No available memory for the cache blocks. "
    "Try increasing `gpu_memory_utilization` when initializing the engine."
)
NOT_FREE: Final = (
    "(Worker pid=3689) ERROR 11-22 10:28:14 [multiproc_executor.py:901] ValueError: Free memory on device cuda:1 "
    "(107.83/139.8 GiB) on startup is less than desired GPU memory utilization (0.9, 125.82 GiB). Decrease GPU memory "
    "utilization or reduce GPU memory used by other processes."
)
BAD_FLAG: Final = "vllm serve: error: unrecognized arguments: --tensor-paralel 2"

E = TypeVar("E", bound=Effect)


def policy(launch: Launch = BASE, **changes: object) -> Policy:
    """The default policy. What it tries where nobody knows the cause: base, p2p-off, utilisation-0.85 and -0.80, tp-1."""
    ladder = Ladder(base=launch, sizes=smaller(launch.tensor_parallel, HEADS), floor=0.8)
    return Policy(**{"ladder": ladder, "incidents": "/state/incidents", "utc_s": MIDNIGHT_S, **changes})  # type: ignore[arg-type]


def rungs(policy: Policy) -> list[Rung]:
    """What is tried where nobody knows the cause, the base first."""
    return [planned.rung for planned in plans(policy)[0].rungs]


def failed(found: Diagnosis, *on: Rung) -> tuple[Ended, ...]:
    """Attempts that all failed so, one on each of these rungs."""
    return tuple(
        Ended(
            number=number,
            rung=rung,
            outcome=found.outcome,
            phase="boot",
            ended_at=9.0,
            duration_s=61.4,
            diagnosis=found,
        )
        for number, rung in enumerate(on, start=1)
    )


def worker(pid: int = 1027, *, name: str = "VLLM::Worker_TP", cpu_s: float = 20.0, **changes: object) -> ProcessSample:
    """A process of the engine as the sampler sees it; `changes` are other fields of ProcessSample."""
    fields = {"started": 1, "state": "S", "major_faults": 0, "rss_bytes": 1_500_000_000, "read_chars": 200_000_000}
    return ProcessSample(**{"pid": pid, "name": name, "cpu_s": cpu_s, **fields, **changes})  # type: ignore[arg-type]


def gpu(uuid: str = "GPU-a", used_bytes: int = 2_000_000_000, utilisation_percent: int | None = 100) -> GpuSample:
    return GpuSample(uuid=uuid, used_bytes=used_bytes, utilisation_percent=utilisation_percent, power_mw=125_000)


@dataclass
class World:
    """Feed events by the verbs below; the state and every effect so far can be read at any time. `stacks` says what the
    n-th look at the engine's stacks finds, None for a look that never comes."""

    policy: Policy = field(default_factory=policy)
    state: State = field(default_factory=Stopped)
    at: float = 1000.0
    effects: list[Effect] = field(default_factory=list)
    alive: set[int] = field(default_factory=set)
    spawned: list[int] = field(default_factory=list)
    incidents: list[str] = field(default_factory=list)
    checks: set[int] = field(default_factory=set)
    exit: Exit | None = None
    stacks: Callable[[int], tuple[Stack, ...] | None] = still
    stacks_unobserved: str = ""
    looks: int = 0

    @property
    def attempt(self) -> int:
        return self.state.run.attempt

    @property
    def rung(self) -> str:
        return self.state.run.rung.name

    def send(self, event: Event) -> tuple[Effect, ...]:
        """Take one event, check the rules, and carry the books forward."""
        assert self.exit is None, f"the daemon has ended already, yet {event} was sent"
        if isinstance(event, EngineGone) and event.attempt in self.alive:
            assert isinstance(self.state, Killing), "an engine is only gone once it was killed"
        if isinstance(event, Preflighted):
            self.checks.discard(event.attempt)
        before = self.state
        self.state, effects = step(before, event, self.policy)
        if isinstance(event, EngineGone) and event.attempt == before.run.attempt and isinstance(before, Killing):
            self.alive.discard(event.attempt)
        assert self.state.run.attempt >= before.run.attempt, "attempts only grow"
        for effect in effects:
            self._book(effect, event)
        self.effects.extend(effects)
        return effects + tuple(more for effect in effects if isinstance(effect, TakeStacks) for more in self._look())

    def _look(self) -> tuple[Effect, ...]:
        self.looks += 1
        seen = self.stacks(self.looks)
        if seen is None:
            return ()
        return self.send(StacksTaken(at=self.at, attempt=self.attempt, stacks=seen, unobserved=self.stacks_unobserved))

    def _book(self, effect: Effect, event: Event) -> None:
        assert self.exit is None, f"{effect} after the exit"
        match effect:
            case SpawnEngine():
                assert not self.alive, f"a second engine: attempt {effect.attempt} beside {self.alive}"
                assert effect.attempt not in self.spawned, "an attempt is spawned once"
                assert effect.attempt == self.attempt
                self.alive.add(effect.attempt)
                self.spawned.append(effect.attempt)
                assert not self.checks, "the engine finds its GPUs as they will be"
            case BeginPreflight():
                assert not self.checks, f"a second check beside {self.checks}"
                assert self.alive <= {effect.attempt}
                self.checks.add(effect.attempt)
            case EndPreflight():
                self.checks.discard(effect.attempt)
            case KeepIncident():
                assert self.alive == {effect.attempt}, f"{effect} of an engine that is gone"
                assert effect.incident not in self.incidents, "an incident is kept once"
                assert isinstance(self.state, Killing)
                self.incidents.append(effect.incident)
            case KillEngine() | TerminateEngine():
                assert self.alive == {effect.attempt}, f"{effect} while {self.alive} is alive"
                self.checks.clear()  # it ends the check too
            case ProbeHealth() | ProbeCompletion() | TakeStacks():
                assert self.alive == {effect.attempt}
            case NotifyReady():
                assert isinstance(event, CompletionProbed), f"READY on {event}"
                assert event.served, f"READY on {event}"
            case Exit():
                assert effect.status in EXIT_STATUSES
                assert not self.alive or isinstance(self.state, Failed), "the daemon leaves an engine behind"
                self.exit = effect
            case _:
                pass

    # -- what the tests say -------------------------------------------------------------------------------------------

    def start(self) -> World:
        """`systemctl start` up to the engine's first process."""
        self.send(StartRequested(at=self.at))
        return self.spawn()

    def spawn(self) -> World:
        self.send(EngineSpawned(at=self.at, attempt=self.attempt, pid=702))
        return self

    def checked(self, found: Checked) -> World:
        """The check of the GPUs has its answer."""
        self.send(Preflighted(at=self.at, attempt=self.attempt, checked=found))
        return self

    def say(self, *texts: str) -> World:
        for text in texts:
            self.send(LineRead(at=self.at, attempt=self.attempt, text=text))
        return self

    def tick(self, seconds: float = 0.5) -> tuple[Effect, ...]:
        self.at += seconds
        return self.send(Ticked(at=self.at))

    def look(self, *processes: ProcessSample, gpus: tuple[GpuSample, ...] = (gpu(), gpu("GPU-b"))) -> World:
        """One sample of the tree and of the GPUs."""
        self.send(ProcessesSampled(at=self.at, attempt=self.attempt, processes=processes or (worker(),)))
        if gpus and self.policy.ladder.base.gpus is not None:
            self.send(GpusSampled(at=self.at, attempt=self.attempt, gpus=gpus))
        return self

    def watch(self, seconds: float, each: Callable[[float], object] | None = None) -> World:
        """Half-second looks at an engine of which nothing moves, unless `each` (called with the seconds so far) moves
        it. Ends early when the engine is no longer loading."""
        until = self.at + seconds
        begun = self.at
        while self.at < until and isinstance(self.state, Starting):
            self.tick()
            if not isinstance(self.state, Starting):
                break
            if each is None:
                self.look()
            else:
                each(self.at - begun)
        return self

    def serve(self) -> World:
        """/health answers, and so does the completion."""
        self.send(HealthProbed(at=self.at, attempt=self.attempt, healthy=True, detail="200"))
        self.send(CompletionProbed(at=self.at, attempt=self.attempt, served=True, detail="200"))
        assert isinstance(self.state, Ready)
        return self

    def exits(self, status: int = 1) -> World:
        self.send(EngineExited(at=self.at, attempt=self.attempt, status=status))
        return self

    def gone(self, *remarks: str) -> World:
        """The kill is done; where that begins the next attempt, its process comes to be."""
        self.send(EngineGone(at=self.at, attempt=self.attempt, remarks=remarks))
        return self.spawn() if isinstance(self.state, Starting) else self

    def stop(self, *, final: bool = False) -> tuple[Effect, ...]:
        return self.send(StopRequested(at=self.at, final=final, by="the test"))

    def wait_out_backoff(self) -> World:
        self.tick(self.policy.backoff_ceiling_s)
        return self.spawn()

    def all(self, kind: type[E]) -> list[E]:
        return [effect for effect in self.effects if isinstance(effect, kind)]

    def announced(self, name: str) -> list[Announce]:
        return [effect for effect in self.all(Announce) if effect.name == name]

    @property
    def last_diagnosis(self) -> Diagnosis:
        found = self.state.run.ended[-1].diagnosis
        assert found is not None
        return found


def of(effects: tuple[Effect, ...], kind: type[E]) -> list[E]:
    return [effect for effect in effects if isinstance(effect, kind)]


def loading(launch: Launch = BASE, **changes: object) -> World:
    """A world whose engine is in distributed init, its process seen twice (so that quiet can be measured)."""
    world = World(policy=policy(launch, **changes)).start().say(BANNER, WORLD_SIZE, NCCL).look()
    world.tick()
    return world.look()


def compiling(**changes: object) -> World:
    """A world whose engine has loaded its weights and is silent in compile ever since."""
    return loading(BASE, **changes).say(ASSIGNED, COMPILE)


def serving(**changes: object) -> World:
    """A world whose engine serves on the base rung."""
    return World(policy=policy(BASE, **changes)).start().say(BANNER, WORLD_SIZE, NCCL, ASSIGNED, UP).look().serve()


def seconds_to_the_verdict(world: World, limit_s: float = 1000.0) -> float:
    """Watch an engine of which nothing moves until it is killed."""
    begun = world.at
    world.watch(limit_s)
    assert isinstance(world.state, Killing), "no verdict"
    return world.at - begun


def fed(*samples: ProcessSample, every_s: float = 1.0) -> Progress:
    """The heartbeat after these samples of one process each, the first at 0."""
    heart = progress.begin(0.0)
    for number, sample in enumerate(samples):
        heart = progress.after_processes(heart, ProcessesSampled(at=number * every_s, attempt=1, processes=(sample,)))
    return heart
