"""What the kernel says while an engine runs: whose failure it explains, and that a recording tells the same."""

from __future__ import annotations

import json

import pytest

from mgpu_llm.core import kernel, recording, replay
from mgpu_llm.core.events import EngineExited, Event, KernelSaid, LineRead, ProcessesSampled
from mgpu_llm.core.progress import MOST_SAID
from mgpu_llm.core.states import Killing, Ready, Starting
from tests.core.world import BANNER, NCCL, OUT_OF_MEMORY, World, loading, seconds_to_the_verdict, serving, worker

LOST = "NVRM: Xid (PCI:0000:17:00): 79, pid=1027, name=VLLM::Worker_TP, GPU has fallen off the bus."
FAULT = "NVRM: Xid (PCI:0000:17:00): 94, pid='<unknown>', name=<unknown>, Contained: SM (0x1)."
IOMMU = "nvidia 0000:17:00.0: AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x0022 address=0x39ffff00000 flags=0x0030]"
KILL = (
    "oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0,oom_memcg=/system.slice/mgpu-llm.service,"
    "task_memcg=/system.slice/mgpu-llm.service/engine-1,task=VLLM::Worker_TP,pid={pid},uid=998"
)
KILLED = (
    "Memory cgroup out of memory: Killed process {pid} (VLLM::Worker_TP) total-vm:82384kB, anon-rss:72192kB, UID:998"
)
HOST_KILLED = "Out of memory: Killed process {pid} (VLLM::Worker_TP) total-vm:82384kB, anon-rss:72192kB, UID:998"
CRASHED = "(Worker pid=1027) ERROR 11-22 11:08:57 [multiproc_executor.py:901] RuntimeError: CUDA error: unknown error"


def said(world: World, *texts: str, elsewhere: bool = False) -> World:
    for text in texts:
        world.send(KernelSaid(at=world.at, attempt=world.attempt, text=text, elsewhere=elsewhere))
    return world


# -- while it loads ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (LOST, "gpu-lost"),
        ("NVRM: The NVIDIA GPU 0000:17:00.0\n", "gpu-lost"),
        (FAULT, "gpu-memory-contained"),
        (IOMMU, "nccl-p2p"),
        ("DMAR: [DMA Write NO_PASID] Request device [17:00.0] fault addr 0xffdf000", "nccl-p2p"),
        (KILL.format(pid=1027), "host-out-of-memory"),
        (KILLED.format(pid=1027), "host-out-of-memory"),
        (HOST_KILLED.format(pid=1027), "host-out-of-memory"),
    ],
)
def test_what_the_kernel_said_explains_why_a_load_ended(text: str, cause: str) -> None:
    world = said(loading(), text).say(CRASHED).exits(1)
    assert world.last_diagnosis.cause == cause
    assert f'the kernel said: "{text.strip()}"' in world.last_diagnosis.evidence


def test_it_explains_a_stall_too() -> None:
    world = said(loading(), IOMMU)
    seconds_to_the_verdict(world)
    assert world.last_diagnosis.cause == "nccl-p2p"
    assert "the IOMMU stops" in world.last_diagnosis.summary


@pytest.mark.parametrize(
    "text",
    [
        # Our own crash or kill has these: Xid 13, 31 and 43 a program's own fault, 45 whose process was killed.
        "NVRM: Xid (PCI:0000:17:00): 13, pid=1027, name=VLLM::Worker_TP, Graphics SM Warp Exception",
        "NVRM: Xid (PCI:0000:17:00): 31, pid=1027, name=VLLM::Worker_TP, Ch 00000010, intr 00000000. MMU Fault",
        "NVRM: Xid (PCI:0000:17:00): 43, pid=1027, name=VLLM::Worker_TP, Ch 00000010",
        "NVRM: Xid (PCI:0000:17:00): 45, pid=1027, name=VLLM::Worker_TP, Ch 00000010",
        "VLLM::Worker_TP invoked oom-killer: gfp_mask=0xcc0(GFP_KERNEL), order=0, oom_score_adj=0",
        "oom_reaper: reaped process 1027 (VLLM::Worker_TP), now anon-rss:0kB, file-rss:0kB, shmem-rss:0kB",
        "pcieport 0000:16:01.0: AER: Corrected error received: 0000:17:00.0",
        "",
    ],
)
def test_a_line_that_names_no_cause_explains_nothing(text: str) -> None:
    world = said(loading(), text)
    assert isinstance(world.state, Starting)
    assert not world.state.clue.cause
    assert world.exits(1).last_diagnosis.cause == "engine-exited"


def test_the_first_word_stands_whether_it_is_the_kernels_or_the_engines() -> None:
    assert said(loading().say(OUT_OF_MEMORY), LOST).exits(1).last_diagnosis.cause == "cuda-out-of-memory"
    assert said(loading(), LOST).say(OUT_OF_MEMORY).exits(1).last_diagnosis.cause == "gpu-lost"


def test_a_line_of_a_dead_attempt_explains_no_later_one() -> None:
    world = loading().exits(1).gone()
    while not isinstance(world.state, Starting):
        world.wait_out_backoff()
    world.send(KernelSaid(at=world.at, attempt=world.attempt - 1, text=LOST))
    assert isinstance(world.state, Starting)
    assert not world.state.clue.cause


def test_a_gpu_of_somebody_else_explains_nothing() -> None:
    world = said(loading(), LOST, IOMMU, FAULT, elsewhere=True).exits(1)
    assert world.last_diagnosis.cause == "engine-exited"


# -- whom the kernel killed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [KILL, KILLED, HOST_KILLED])
def test_that_the_kernel_killed_somebody_elses_process_explains_nothing_though_it_has_a_name_of_ours(text: str) -> None:
    world = said(loading(), text.format(pid=4711)).exits(1)
    assert world.last_diagnosis.cause == "engine-exited"


def test_the_engines_first_process_is_ours_before_any_look() -> None:
    world = said(World().start(), KILL.format(pid=702)).exits(-9)
    assert world.last_diagnosis.cause == "host-out-of-memory"


def test_a_process_that_a_look_missed_already_was_ours_a_moment_ago_and_is_not_for_ever() -> None:
    def after(seconds: float) -> World:
        world = loading()
        while seconds > 0:
            world.at += min(seconds, 5.0)
            seconds -= 5.0
            world.look(worker(1028))
        return said(world, KILLED.format(pid=1027)).exits(1)

    assert after(10.0).last_diagnosis.cause == "host-out-of-memory"
    assert after(20.0).last_diagnosis.cause == "engine-exited"


def test_the_pid_that_a_line_about_a_gpu_names_is_not_killed_and_does_not_matter() -> None:
    assert said(loading(), LOST.replace("1027", "4711")).exits(1).last_diagnosis.cause == "gpu-lost"


# -- while it serves ---------------------------------------------------------------------------------------------------


def test_what_the_kernel_said_shortly_before_explains_why_a_serving_engine_died() -> None:
    world = said(serving(), LOST)
    world.tick(2.0)
    world.say(CRASHED).exits(0)
    died = world.last_diagnosis
    assert (died.cause, died.outcome) == ("gpu-lost", "died")
    assert died.summary == "the engine ended while serving with exit code 0: GPU 0000:17:00 has fallen off the bus"
    assert died.evidence == ('error: "RuntimeError: CUDA error: unknown error"', f'the kernel said: "{LOST}"')
    assert "reboot" in died.advice


def test_without_an_error_of_the_engine_the_kernels_word_is_all_the_evidence() -> None:
    died = said(serving(), KILL.format(pid=1027)).exits(-9).last_diagnosis
    assert died.cause == "host-out-of-memory"
    assert died.evidence == (f'the kernel said: "{KILL.format(pid=1027)}"',)


def test_what_it_said_long_before_explains_no_death() -> None:
    world = said(serving(), LOST)
    world.tick(31.0)
    assert world.exits(0).last_diagnosis.cause == "died-while-serving"


def test_what_it_said_while_the_engine_still_loaded_explains_a_death_right_after() -> None:
    world = said(loading(), FAULT)
    world.say("(APIServer pid=702) INFO:     Application startup complete.").serve()
    assert world.exits(0).last_diagnosis.cause == "gpu-memory-contained"


def test_who_spoke_first_is_told_by_the_time_and_not_by_who_it_was() -> None:
    world = serving().say(OUT_OF_MEMORY)
    world.tick(0.1)
    died = said(world, LOST).exits(1).last_diagnosis
    assert died.cause == "cuda-out-of-memory"
    assert died.summary.startswith("the engine ended while serving with exit code 1: torch.OutOfMemoryError")


@pytest.mark.parametrize(("text", "elsewhere"), [(LOST, True), (KILL.format(pid=4711), False), ("usb 1-1", False)])
def test_of_a_serving_engine_too_only_what_can_be_about_it_is_kept(text: str, elsewhere: bool) -> None:
    world = said(serving(), text, elsewhere=elsewhere)
    assert isinstance(world.state, Ready)
    assert world.state.progress.kernel == ()
    assert world.exits(1).last_diagnosis.cause == "died-while-serving"


def test_an_engine_that_serves_for_months_remembers_a_bounded_number_of_lines() -> None:
    world = said(serving(), *[FAULT] * (MOST_SAID + 10))
    assert isinstance(world.state, Ready)
    assert len(world.state.progress.kernel) == MOST_SAID


# -- which GPU it is about ---------------------------------------------------------------------------------------------

OURS = ("00000000:17:00.0", "00000000:65:00.0")


@pytest.mark.parametrize(
    ("text", "elsewhere"),
    [
        (LOST, False),
        (LOST.replace(":17:", ":ca:"), True),
        (LOST.replace("0000:17", "0001:17"), True),
        ("NVRM: GPU 0000:65:00.0: RmInitAdapter failed! (0x26:0x56:1474)", False),
        ("NVRM: The NVIDIA GPU 0000:CA:00.0 (PCI ID: 10de:2330)", True),
        (IOMMU, False),
        (IOMMU.replace("nvidia 0000:17", "mlx5_core 0000:98"), True),
        ("AMD-Vi: Event logged [IO_PAGE_FAULT device=17:00.0 domain=0x0022 address=0x39ffff00000 flags=0x0030]", False),
        ("AMD-Vi: Event logged [IO_PAGE_FAULT device=41:00.0 domain=0x0022 address=0x39ffff00000 flags=0x0030]", True),
        ("DMAR: [DMA Write NO_PASID] Request device [3b:00.0] fault addr 0xffdf000 [fault reason 0x05]", True),
        ("pcieport 0000:16:01.0: AER: Corrected error received: 0000:17:00.0", False),
        (KILL.format(pid=1), False),
        ("nvidia-nvswitch3: SXid (PCI:0000:c1:00.0): 20034, Fatal, Link 30 LTSSM Fault Up", False),
        ("DMAR: IOMMU feature fl1gp_support inconsistent", False),
        ("e1000 aa:bb:cc:dd:ee:ff: NIC Link is Up", False),
    ],
)
def test_a_line_about_devices_of_which_none_is_a_gpu_of_the_launch_is_about_somebody_else(
    text: str, elsewhere: bool
) -> None:
    assert kernel.is_elsewhere(text, OURS) is elsewhere


def test_where_the_addresses_are_not_known_every_gpu_may_be_ours() -> None:
    assert not kernel.is_elsewhere(LOST, ())


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        (LOST, False),
        ("nvidia-nvswitch3: SXid (PCI:0000:c1:00.0): 20034, Fatal, Link 30 LTSSM Fault Up", False),
        (KILL.format(pid=1), False),
        (f"overlayfs: failed to resolve '{LOST}': -2", True),
        (f"oom-kill:constraint=CONSTRAINT_MEMCG,oom_memcg=/user.slice/{LOST},task=a,pid=1,uid=1000", True),
        ("overlayfs: failed to resolve 'nvidia-nvswitch3: SXid (PCI:0000:c1:00.0): 20034, Fatal': -2", True),
    ],
)
def test_what_a_user_has_the_kernel_repeat_is_not_the_drivers(text: str, quoted: bool) -> None:
    assert kernel.is_quoted(text) is quoted


# -- recorded ----------------------------------------------------------------------------------------------------------


def recorded(*events: Event, spawned_at: float = 100.0) -> list[str]:
    rows = [recording.to_row(event, spawned_at) for event in events if not isinstance(event, EngineExited)]
    rows += [
        recording.note(event.at - spawned_at, "exit", rc=event.status)
        for event in events
        if isinstance(event, EngineExited)
    ]
    return [json.dumps(row) for row in rows if row is not None]


def life(*kernel_lines: str, elsewhere: bool = False) -> list[Event]:
    lines = [LineRead(at=100.5, attempt=1, text=text) for text in (BANNER, NCCL)]
    sampled = ProcessesSampled(at=101.0, attempt=1, processes=(worker(702), worker(1027)))
    told = [KernelSaid(at=102.0, attempt=1, text=text, elsewhere=elsewhere) for text in kernel_lines]
    return [*lines, sampled, *told, EngineExited(at=103.0, attempt=1, status=1)]


@pytest.mark.parametrize(
    ("text", "elsewhere", "cause"),
    [
        (LOST, False, "gpu-lost"),
        (LOST, True, "engine-exited"),
        (KILL.format(pid=1027), False, "host-out-of-memory"),
        (KILL.format(pid=4711), False, "engine-exited"),
    ],
)
def test_a_replay_judges_what_the_kernel_said_as_the_daemon_did(text: str, elsewhere: bool, cause: str) -> None:
    report = replay.judge(recording.read(recorded(*life(text, elsewhere=elsewhere))))
    assert (report.outcome, report.cause) == ("crashed", cause)


def test_a_recording_that_ends_after_the_kernels_word_is_told_as_failed_by_it() -> None:
    report = replay.judge(recording.read(recorded(*life(LOST)[:-1])))
    assert (report.outcome, report.cause) == ("crashed", "gpu-lost")


def test_a_recording_without_the_kernels_words_is_judged_as_ever() -> None:
    report = replay.judge(recording.read(recorded(*life())))
    assert report.cause == "engine-exited"


def test_a_killed_engine_is_no_state_in_which_the_kernel_is_heard() -> None:
    world = loading().exits(1)
    before = world.state
    assert isinstance(before, Killing)
    assert said(world, LOST).state == before
