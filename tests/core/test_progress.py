"""What counts as progress and what does not: judged through the supervisor."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mgpu_llm.core import progress
from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.events import LineRead, ProcessesSampled
from mgpu_llm.core.progress import MOST_WORDINGS, begin
from mgpu_llm.core.stall import DEFAULT_PATIENCE_S
from mgpu_llm.core.states import Killing, Starting
from mgpu_llm.core.status import Count
from tests.core.looks import CONFIRMED_S
from tests.core.world import ASSIGNED, BANNER, NCCL, WORLD_SIZE, fed, gpu, loading, seconds_to_the_verdict, worker

VERDICT_S = DEFAULT_PATIENCE_S[Phase.DISTRIBUTED_INIT] + CONFIRMED_S
CHATTER = (
    "(EngineCore pid=921) INFO 11-22 11:10:01 [shm_broadcast.py:681] No available shared memory broadcast block found in "
    "60 seconds. This typically happens when some processes are hanging or doing some time-consuming work",
    "(APIServer pid=702) DEBUG 11-22 11:08:11 [utils.py:1431] Waiting for 1 local, 0 remote core engine proc(s) to start.",
    "(EngineCore pid=921) INFO 11-22 11:08:11 [ray_utils.py:1] Waiting for creating a placement group of specs for 10 s",
    'INFO:     127.0.0.1:58828 - "GET /health HTTP/1.1" 503 Service Unavailable',
    "(Worker pid=9) WARNING 11-22 11:08:11 [cache.py:1] Still waiting to acquire lock /tmp/x.lock (30 seconds elapsed)",
)


# -- what does not count -----------------------------------------------------------------------------------------------


def test_a_hang_in_distributed_init_is_called_a_stall_when_its_patience_is_over_and_not_before() -> None:
    assert seconds_to_the_verdict(loading()) == pytest.approx(VERDICT_S, abs=1.0)


@pytest.mark.parametrize("text", CHATTER)
def test_chatter_every_second_does_not_keep_a_hung_engine_alive(text: str) -> None:
    world = loading()
    begun = world.at

    def chat(passed_s: float) -> None:
        world.look()
        if passed_s % 1.0 == 0.0:
            world.say(text)

    world.watch(120.0, chat)
    assert isinstance(world.state, Killing)
    assert world.at - begun <= VERDICT_S + 1.0


def test_a_line_repeated_with_other_numbers_and_addresses_is_no_progress() -> None:
    world = loading()
    begun = world.at
    world.say("worker 1 at 0x7f00aa waited 1 s")

    def repeat(passed_s: float) -> None:
        world.look().say(f"worker {passed_s:.0f} at 0x{int(passed_s * 4096):x} waited {passed_s} s")

    world.watch(120.0, repeat)
    assert isinstance(world.state, Killing)
    assert world.at - begun <= VERDICT_S + 1.5


def test_new_words_are_progress() -> None:
    world = loading()

    def speak(passed_s: float) -> None:
        world.look()
        if passed_s % 5.0 == 0.0:
            world.say("going " + "on " * int(passed_s))

    world.watch(60.0, speak)
    assert isinstance(world.state, Starting)


def test_an_engine_that_floods_ever_new_words_stops_being_believed() -> None:
    heart = begin(0.0)
    for number in range(MOST_WORDINGS + 50):
        word = "".join(chr(97 + int(digit)) for digit in str(number))
        heart = progress.after_line(heart, LineRead(at=float(number), attempt=1, text=word))
    assert len(heart.wordings) == MOST_WORDINGS
    assert heart.moved["log"] == MOST_WORDINGS - 1


def test_a_worker_that_burns_a_core_makes_no_progress_and_is_named_in_the_evidence() -> None:
    world = loading()
    begun = world.at
    world.watch(60.0, lambda passed_s: world.look(worker(cpu_s=20.5 + passed_s)))
    assert isinstance(world.state, Killing)
    assert world.at - begun <= VERDICT_S + 1.0
    assert "process 1027 (VLLM::Worker_TP) burns 1.0 cores without getting anywhere" in world.last_diagnosis.evidence


def test_a_process_is_as_busy_as_it_was_since_the_quiet_began_and_not_before() -> None:
    heart = fed(
        worker(cpu_s=0.0, rss_bytes=1 << 30), worker(cpu_s=4.0, rss_bytes=2 << 30), worker(cpu_s=4.0, rss_bytes=2 << 30)
    )
    assert heart.quiet_s == 1.0
    assert heart.busy == {1027: 0.0}


def test_the_share_of_a_core_is_taken_over_the_whole_quiet_and_not_from_look_to_look() -> None:
    used = (0.0, 1.0, 1.0, 2.0, 2.0)
    heart = fed(*(worker(cpu_s=20.0 + cpu_s) for cpu_s in used))
    assert heart.quiet_s == 4.0
    assert heart.busy == {1027: pytest.approx(0.5)}


def test_movement_begins_the_quiet_and_its_shares_anew() -> None:
    heart = fed(*(worker(cpu_s=20.0 + second) for second in range(4)))
    assert heart.busy == {1027: pytest.approx(1.0)}
    heart = progress.after_line(heart, LineRead(at=3.5, attempt=1, text="something new"))
    assert heart.quiet_s == 0.0
    for second in (4, 5, 6):
        sample = ProcessesSampled(at=float(second), attempt=1, processes=(worker(cpu_s=23.0),))
        heart = progress.after_processes(heart, sample)
    assert heart.resting_at == 3.0
    assert heart.busy == {1027: 0.0}


def test_a_process_born_in_the_quiet_has_no_share_until_it_was_seen_twice() -> None:
    heart = fed(worker(), worker())
    for second, cpu_s in ((2.0, 9.0), (3.0, 9.5)):
        sample = ProcessesSampled(at=second, attempt=1, processes=(worker(), worker(77, cpu_s=cpu_s)))
        heart = progress.after_processes(heart, sample)
        if second == 2.0:
            assert heart.busy == {1027: 0.0}
    assert heart.busy == {1027: 0.0, 77: pytest.approx(0.5)}


def test_a_compiler_that_burns_a_core_is_progress() -> None:
    world = loading()

    def compiles(passed_s: float) -> None:
        world.look(worker(), worker(77, name="cicc", cpu_s=passed_s))

    world.watch(120.0, compiles)
    assert isinstance(world.state, Starting)


def test_a_compiler_that_only_waits_is_no_progress() -> None:
    world = loading()
    world.watch(60.0, lambda _: world.look(worker(), worker(77, name="cicc", cpu_s=3.0)))
    assert isinstance(world.state, Killing)


def test_gpu_utilisation_and_power_are_no_progress() -> None:
    world = loading()

    def works(passed_s: float) -> None:
        busy = replace(gpu(), utilisation_percent=int(passed_s) % 100, power_mw=100_000 + int(passed_s) * 1000)
        world.look(gpus=(busy, gpu("GPU-b")))

    world.watch(60.0, works)
    assert isinstance(world.state, Killing)


def test_a_drip_below_the_noise_floor_never_adds_up_to_progress() -> None:
    world = loading()
    world.watch(60.0, lambda passed_s: world.look(worker(rss_bytes=(1500 << 20) + int(passed_s * 100_000))))
    assert isinstance(world.state, Killing)


# -- what counts -------------------------------------------------------------------------------------------------------

MIB = 1 << 20


@pytest.mark.parametrize(
    ("signal", "change"),
    [
        ("rss", {"rss_bytes": 8 * MIB}),
        ("read_chars", {"read_chars": 1 * MIB}),
        ("read_bytes", {"read_bytes": 1 * MIB}),
        ("written_bytes", {"written_bytes": 1 * MIB}),
        ("major_faults", {"major_faults": 30}),
    ],
)
def test_each_signal_of_a_process_keeps_a_load_alive_while_it_moves(signal: str, change: dict[str, int]) -> None:
    world = loading()
    base = worker(read_bytes=0, written_bytes=0, major_faults=100)

    def moves(passed_s: float) -> None:
        moved = {name: getattr(base, name) + step * int(passed_s * 2) for name, step in change.items()}
        world.look(replace(base, **moved))

    world.watch(60.0, moves)
    assert isinstance(world.state, Starting)
    assert world.at - world.state.progress.moved[signal] <= 1.0


def test_gpu_memory_that_grows_keeps_a_load_alive() -> None:
    world = loading()
    world.watch(60.0, lambda s: world.look(gpus=(gpu(used_bytes=2 * 10**9 + int(s * 10**8)), gpu("GPU-b"))))
    assert isinstance(world.state, Starting)
    assert "gpu_memory" in world.state.progress.moved


def test_a_new_process_is_progress_even_under_the_pid_of_an_old_one() -> None:
    heart = fed(worker(), worker(), replace(worker(), started=2))
    assert heart.moved["processes"] == 2.0


def test_a_process_that_ends_takes_nothing_away_from_what_was_read() -> None:
    heart = begin(0.0)
    for at, processes in (
        (0.0, (worker(1, read_chars=0), worker(2, read_chars=0))),
        (1.0, (worker(1, read_chars=0), worker(2, read_chars=9 * MIB))),
        (2.0, (worker(1, read_chars=0),)),
        (3.0, (worker(1, read_chars=1 * MIB),)),
    ):
        heart = progress.after_processes(heart, ProcessesSampled(at=at, attempt=1, processes=processes))
    assert heart.totals["read_chars"] == 10 * MIB
    assert heart.moved["read_chars"] == 3.0


def test_counters_that_may_not_be_read_are_not_taken_for_zero() -> None:
    heart = fed(worker(read_chars=None), worker(read_chars=9 * MIB), worker(read_chars=None), worker(read_chars=None))
    assert "read_chars" not in heart.moved
    assert heart.totals["read_chars"] == 0.0


def test_shards_and_graphs_are_progress_when_they_change_and_not_when_they_are_repeated() -> None:
    heart = begin(0.0)
    shard = "Loading safetensors checkpoint shards:  38% Completed | 3/8 [00:01<00:02,  1.87it/s]"
    graph = "Capturing CUDA graphs (PIECEWISE):   4%|▍         | 2/51 [00:00<00:02, 18.56it/s]"
    for at, text in ((1.0, shard), (2.0, shard), (3.0, graph), (4.0, graph)):
        heart = progress.after_line(heart, LineRead(at=at, attempt=1, text=text))
    assert heart.shards == Count(done=3, total=8)
    assert heart.graphs == Count(done=2, total=51)
    assert heart.bars == {"Loading safetensors checkpoint shards": 3, "Capturing CUDA graphs (PIECEWISE)": 2}
    assert heart.moved["bar"] == 3.0
    assert heart.last_moved_at == 3.0


def test_words_of_the_boot_are_known_words_and_no_new_phase() -> None:
    heart = progress.after_line(begin(0.0), LineRead(at=1.0, attempt=1, text=BANNER))
    assert heart.spoke_known_words
    assert heart.phase is Phase.BOOT
    assert set(heart.moved) == {"log"}


def test_a_phase_never_goes_back() -> None:
    heart = begin(0.0)
    for text in (ASSIGNED, NCCL, WORLD_SIZE):
        heart = progress.after_line(heart, LineRead(at=1.0, attempt=1, text=text))
    assert heart.phase is Phase.WEIGHTS


def test_an_empty_line_says_nothing_and_does_not_become_the_last_line() -> None:
    heart = progress.after_line(begin(0.0), LineRead(at=1.0, attempt=1, text="hello"))
    for text in ("", "   ", "(Worker_TP0 pid=1512) "):
        assert progress.after_line(heart, LineRead(at=2.0, attempt=1, text=text)) is heart
    assert heart.last_line == "hello"
    assert heart.last_moved_at == 1.0


def test_a_heart_that_never_beat_last_moved_when_it_began() -> None:
    assert begin(7.0).last_moved_at == 7.0
