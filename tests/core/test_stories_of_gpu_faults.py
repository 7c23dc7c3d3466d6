"""GPUs that fail while an engine loads or serves: what ends it at once, what makes us look closer, and what is only told."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from mgpu_llm.core import kernel, recording, replay, report
from mgpu_llm.core.effects import Level, ProbeCompletion, SpawnEngine
from mgpu_llm.core.events import CompletionProbed, EngineExited, Event, GpuUnfit, KernelSaid
from mgpu_llm.core.gpu_faults import MOST_FAULTS
from mgpu_llm.core.ladder import Heads, Ladder, smaller
from mgpu_llm.core.launch import Launch
from mgpu_llm.core.remedies import Area, Remedy, Want
from mgpu_llm.core.states import Backoff, Failed, Killing, Ready, Starting
from mgpu_llm.core.xid import Action
from tests.core.world import BANNER, OUT_OF_MEMORY, UP, World, of, policy, serving

FOUR = Launch(gpus=("0", "1", "2", "3"), tensor_parallel=4, utilisation=0.9)
ADDRESSES = {"0": "00000000:17:00.0", "1": "00000000:41:00.0", "2": "00000000:65:00.0", "3": "00000000:CA:00.0"}
OFF = "NVRM: Xid (PCI:0000:ca:00): 79, pid=1027, name=VLLM::Worker_TP, GPU has fallen off the bus."
TO_RESET = "NVRM: Xid (PCI:0000:ca:00): 154, GPU recovery action changed from 0x0 (None) to 0x1 (GPU Reset Required)"
TO_REBOOT = "NVRM: Xid (PCI:0000:ca:00): 154, GPU recovery action changed from 0x0 (None) to 0x2 (Node Reboot Required)"
DRAIN = "NVRM: Xid (PCI:0000:ca:00): 154, GPU recovery action changed from 0x0 (None) to 0x4 (Drain and Reset)"
GSP = "NVRM: Xid (PCI:0000:ca:00): 119, pid=1027, name=VLLM::Worker_TP, Timeout after 6s of waiting for RPC response"
REMAPPED = "NVRM: Xid (PCI:0000:ca:00): 63, pid='<unknown>', name=<unknown>, Row Remapper: New row marked for remapping"
PAGE = "NVRM: Xid (PCI:0000:ca:00): 31, pid=1027, name=VLLM::Worker_TP, Ch 00000010, intr 00000000. MMU Fault"
SAYS = "the driver says what is to be done for it to recover"
SWITCH = "nvidia-nvswitch0: SXid (PCI:0000:00:00.0): 20034, Fatal, Link 30 LTSSM Fault Up"


def ladder(**changes: object) -> Ladder:
    fields = {"base": FOUR, "sizes": smaller(4, Heads(attention=28, key_value=4)), "floor": 0.8, **changes}
    return Ladder(**fields)  # type: ignore[arg-type]


def on_four(**changes: object) -> World:
    """An engine that serves on four GPUs; `changes` are of its ladder."""
    world = World(policy=policy(FOUR, ladder=ladder(**changes))).start().say(BANNER, UP).look()
    return world.serve()


def loading_on_four(**changes: object) -> World:
    return World(policy=policy(FOUR, ladder=ladder(**changes))).start().say(BANNER).look()


def said(world: World, text: str, gpus: tuple[str, ...] = ("3",)) -> World:
    world.send(KernelSaid(at=world.at, attempt=world.attempt, text=text, gpus=gpus))
    return world


def unfit(
    world: World, gpu: str = "3", action: Action = Action.LOST, what: str = "GPU is lost (NVML error 15)"
) -> World:
    world.send(GpuUnfit(at=world.at, attempt=world.attempt, gpu=gpu, what=what, action=action))
    return world


def proven(world: World, *, served: bool, hopeless: bool = False) -> World:
    detail = "200" if served else "no answer within 60 s"
    world.send(CompletionProbed(at=world.at, attempt=world.attempt, served=served, detail=detail, hopeless=hopeless))
    return world


def gpus_of(world: World) -> tuple[str, ...] | None:
    return of(tuple(world.effects), SpawnEngine)[-1].launch.gpus


def faults(world: World) -> list[object]:
    return [told.facts["what"] for told in world.announced("gpu.fault")]


# -- certain -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "cause", "summary"),
    [
        (OFF, "gpu-lost", "GPU 3 is lost: it has fallen off the bus (Xid 79)"),
        ("NVRM: GPU 0000:ca:00.0: GPU has fallen off the bus.", "gpu-lost", "GPU 3 is lost: it has fallen off the bus (Xid 79)"),
        (TO_RESET, "gpu-needs-reset", f"GPU 3 needs a reset: {SAYS} (Xid 154)"),
        (TO_REBOOT, "gpu-needs-reboot", f"GPU 3 needs a reboot of the host: {SAYS} (Xid 154)"),
    ],
)  # fmt: skip
def test_a_gpu_that_is_certainly_gone_ends_the_engine_at_once_though_it_still_answers_its_probes(
    text: str, cause: str, summary: str
) -> None:
    world = said(on_four(), text)
    died = world.last_diagnosis
    assert isinstance(world.state, Killing)
    assert (died.cause, died.outcome, died.summary, died.gpus) == (cause, "died", summary, ("3",))
    assert died.wants == (Want.OTHER_GPU, Want.FEWER_GPUS, Want.STOP)
    assert died.evidence == (f'the kernel said: "{text}"',)
    assert "reboot the host" in died.advice


@pytest.mark.parametrize(
    ("action", "what", "cause"),
    [
        (Action.LOST, "GPU is lost (NVML error 15)", "gpu-lost"),
        (Action.RESET, "the driver asks for a recovery: reset", "gpu-needs-reset"),
        (Action.REBOOT, "the driver asks for a recovery: reboot", "gpu-needs-reboot"),
    ],
)
def test_so_does_nvmls_word_alone_where_nobody_hears_the_kernel(action: Action, what: str, cause: str) -> None:
    for world, outcome in ((on_four(), "died"), (loading_on_four(), "crashed")):
        found = unfit(world, action=action, what=what).last_diagnosis
        assert (found.cause, found.outcome, found.gpus) == (cause, outcome, ("3",))
        assert found.evidence == (f'NVML said: "{what}"',)
        assert found.summary.endswith(what)


def test_the_next_attempt_is_on_the_gpus_that_are_left_and_degraded_with_its_cost() -> None:
    world = said(on_four(), OFF)
    assert "step to rung tp-2" in str(world.announced("engine.died")[0].facts["next"])
    world.gone()
    assert (world.rung, gpus_of(world), world.attempt) == ("tp-2", ("0", "1"), 2)
    world.say(BANNER, UP).look().serve()
    (degraded,) = world.announced("engine.degraded")
    assert degraded.facts["cause"] == "gpu-lost"
    assert degraded.facts["cost"]


@pytest.mark.parametrize(("lost", "left"), [("0", ("1", "2")), ("1", ("0", "2"))])
def test_whichever_it_is_the_others_serve(lost: str, left: tuple[str, ...]) -> None:
    assert gpus_of(unfit(on_four(), gpu=lost).gone()) == left


def test_a_spare_takes_its_place_where_there_is_one() -> None:
    world = said(on_four(spares=("6",)), OFF).gone()
    assert gpus_of(world) == ("0", "1", "2", "6")


def test_of_the_admins_own_rungs_one_that_does_without_it_serves() -> None:
    own = (Remedy(name="quiet", env={"A": "1"}), Remedy(name="half", tensor_parallel=2))
    for world in (on_four(own=own), loading_on_four(own=own)):
        unfit(world).gone()
        assert (gpus_of(world), world.rung) == (("0", "1"), "half")
        unfit(world, "0").gone()
        assert isinstance(world.state, Failed)


def test_two_that_go_one_after_the_other_are_both_left_out() -> None:
    world = said(on_four(), OFF).gone().say(BANNER, UP).look().serve()
    world = unfit(world, gpu="0").gone()
    assert (world.rung, gpus_of(world)) == ("gpus-1,2", ("1", "2"))
    assert unfit(world, gpu="1").gone().rung == "gpus-2"
    assert gpus_of(world) == ("2",)


def test_while_it_loads_nobody_waits_for_it_to_stall_and_the_rest_is_tried_at_once() -> None:
    world = said(loading_on_four(), OFF)
    failed = world.last_diagnosis
    assert (failed.cause, failed.outcome, failed.gpus) == ("gpu-lost", "crashed", ("3",))
    world.gone()
    assert isinstance(world.state, Starting)
    assert gpus_of(world) == ("0", "1")


def test_where_nothing_is_left_that_fits_it_gives_up_with_the_reason_and_what_to_do() -> None:
    one = Launch(gpus=("3",), tensor_parallel=1, utilisation=0.9)
    alone = Ladder(base=one, sizes=(), floor=0.8)
    pinned = ladder(areas=frozenset(Area) - {Area.GPUS})
    for world, why in (
        (World(policy=policy(one, ladder=alone)), "gpus.spares names none that is left"),
        (World(policy=policy(FOUR, ladder=pinned)), 'ladder.pin names "gpus"'),
    ):
        serves = replace(world).start().say(BANNER, UP).look().serve()
        loads = replace(world, effects=[], alive=set(), spawned=[], incidents=[]).start().say(BANNER).look()
        for begun in (serves, loads):
            said(begun, OFF).gone()
            assert isinstance(begun.state, Failed)
            assert (begun.state.status, begun.attempt) == (69, 1)
            assert why in begun.state.message
            assert "GPU 3 is lost: it has fallen off the bus (Xid 79)" in begun.state.message
            assert "reboot the host" in begun.state.message
    assert "nothing is left to serve it without GPU 3" in serves.state.message  # type: ignore[union-attr]


def test_an_engine_that_died_of_another_cause_is_tried_on_the_same_rung_as_ever() -> None:
    world = serving().exits(1).gone()
    assert isinstance(world.state, Backoff)
    assert world.state.rung.name == "base"


# -- in doubt ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "gpus"),
    [(GSP, ("3",)), (GSP, ()), (OFF, ()), (SWITCH, ())],
    ids=["reset", "whose", "lost-whose", "switch"],
)
def test_where_it_is_not_certain_the_engine_has_to_show_once_that_it_still_serves(
    text: str, gpus: tuple[str, ...]
) -> None:
    world = said(said(on_four(), text, gpus), text, gpus)
    assert world.all(ProbeCompletion)[1:] == [ProbeCompletion(attempt=1)], "the first was before it was ready"
    proven(world, served=True)
    assert isinstance(world.state, Ready)
    (cleared,) = world.announced("gpu.cleared")
    assert cleared.facts["after"] == text
    assert proven(world, served=False).state == world.state, "nobody has asked any more"


def test_a_server_that_refuses_such_requests_says_nothing_of_its_gpus() -> None:
    world = proven(said(on_four(), GSP), served=False, hopeless=True)
    assert isinstance(world.state, Ready)


def test_one_that_does_not_is_dead_and_the_gpu_leaves() -> None:
    died = proven(said(on_four(), GSP), served=False)
    found = died.last_diagnosis
    assert (found.cause, found.outcome, found.gpus) == ("gpu-needs-reset", "died", ("3",))
    assert found.summary == "no completion any more (no answer within 60 s): GPU 0000:ca:00 needs a reset (Xid 119)"
    assert gpus_of(died.gone()) == ("0", "1")


def test_of_a_switch_no_gpu_can_be_named() -> None:
    found = proven(said(on_four(), SWITCH, ()), served=False).last_diagnosis
    assert (found.cause, found.gpus) == ("nvswitch-fault", ())


def test_while_it_loads_it_is_a_clue_for_the_end_and_the_gpu_leaves_then() -> None:
    world = said(loading_on_four(), GSP)
    assert isinstance(world.state, Starting)
    assert world.all(ProbeCompletion) == []
    failed = world.exits(1).last_diagnosis
    assert (failed.cause, failed.outcome, failed.gpus) == ("gpu-needs-reset", "crashed", ("3",))
    assert failed.wants[-1] is Want.STOP
    assert gpus_of(world.gone()) == ("0", "1")


def test_when_something_else_was_the_cause_no_gpu_leaves() -> None:
    failed = said(loading_on_four().say(OUT_OF_MEMORY), GSP).exits(1).last_diagnosis
    assert (failed.cause, failed.gpus) == ("cuda-out-of-memory", ())


def test_an_engine_that_exits_soon_after_a_doubtful_word_died_of_it() -> None:
    found = said(on_four(), GSP).exits(0).last_diagnosis
    assert (found.cause, found.gpus) == ("gpu-needs-reset", ("3",))


# -- told --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "level", "what"),
    [
        (REMAPPED, Level.INFO, "GPU 3: broken memory will be remapped at the next reset (Xid 63)"),
        (PAGE, Level.WARNING, "GPU 3: a program used memory that is not its own (Xid 31)"),
        (DRAIN, Level.WARNING, "GPU 3: the driver says what is to be done for it to recover (Xid 154)"),
        (PAGE.replace(" 31,", " 4711,"), Level.WARNING, "GPU 3: an error that no catalogue explains (Xid 4711)"),
    ],
)
def test_what_is_for_information_or_the_programs_own_is_told_once_and_it_goes_on(
    text: str, level: Level, what: str
) -> None:
    for world in (on_four(), loading_on_four()):
        before = type(world.state)
        said(said(world, text), text)
        assert type(world.state) is before
        (told,) = world.announced("gpu.fault")
        assert (told.level, told.facts["what"]) == (level, what)
        assert told.facts["advice"]


def test_a_drain_that_nvml_tells_serves_on_too() -> None:
    world = on_four()
    for _ in range(2):
        unfit(world, action=Action.DRAIN, what="the driver asks for a recovery: drain-and-reset")
    assert isinstance(world.state, Ready)
    assert faults(world) == ["GPU 3: the driver asks for a recovery: drain-and-reset"]
    (told,) = world.announced("gpu.fault")
    assert "reset the GPU" in str(told.facts["advice"])


def test_the_status_has_what_was_told_as_long_as_the_engine_lasts() -> None:
    def shown(world: World) -> tuple[str, ...]:
        identity = report.Identity(version="1", model="m", url="u")
        return report.status(world.state, world.policy, world.at, identity).gpu_faults

    world = said(loading_on_four(), REMAPPED)
    assert shown(world) == ("GPU 3: broken memory will be remapped at the next reset (Xid 63)",)
    world.say(UP).look().serve()
    assert len(shown(world)) == 1
    world.exits(1)
    assert shown(world) == ()


def test_of_many_different_ones_only_the_first_are_told() -> None:
    world = on_four()
    for number in range(MOST_FAULTS + 5):
        said(world, PAGE.replace(" 31,", f" {5000 + number},"))
    assert len(world.announced("gpu.fault")) == MOST_FAULTS


def test_of_a_gpu_that_nobody_knows_to_be_ours_nothing_is_told() -> None:
    world = said(on_four(), PAGE, ())
    world.send(KernelSaid(at=world.at, attempt=1, text=OFF, elsewhere=True))
    assert isinstance(world.state, Ready)
    assert (faults(world), world.all(ProbeCompletion)[1:]) == ([], [])


def test_two_gpus_that_one_line_names_are_both_called_so() -> None:
    world = said(on_four(), PAGE, ("2", "3"))
    assert faults(world) == ["GPUs 2, 3: a program used memory that is not its own (Xid 31)"]


# -- which GPU it is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        (OFF, ("3",)),
        ("NVRM: GPU 0000:41:00.0: GPU has fallen off the bus.", ("1",)),
        (OFF.replace("0000:ca", "0001:ca"), ()),
        ("AMD-Vi: Event logged [IO_PAGE_FAULT device=17:00.0 domain=0x0022]", ("0",)),
        (SWITCH, ()),
        ("oom-kill:task=x,pid=1", ()),
    ],
)
def test_the_address_in_a_line_tells_the_entry_of_cuda_visible_devices(text: str, entries: tuple[str, ...]) -> None:
    assert kernel.concerned(text, ADDRESSES) == entries
    assert kernel.concerned(text, {}) == ()


# -- recorded ----------------------------------------------------------------------------------------------------------


def replayed(*events: Event) -> replay.Report:
    rows = [recording.to_row(event, 100.0) for event in events]
    return replay.judge(recording.read([json.dumps(row) for row in rows if row is not None]))


def test_a_replay_judges_a_lost_gpu_as_the_daemon_did() -> None:
    kernels = KernelSaid(at=102.0, attempt=1, text=OFF, gpus=("3",))
    nvmls = GpuUnfit(at=102.0, attempt=1, gpu="3", what="GPU is lost (NVML error 15)", action=Action.LOST)
    assert [replayed(event, EngineExited(at=103.0, attempt=1, status=1)).cause for event in (kernels, nvmls)] == [
        "gpu-lost",
        "gpu-lost",
    ]


def test_a_recorded_word_of_nvml_that_nobody_knows_is_no_recording() -> None:
    row = json.dumps({"t": 1.0, "kind": "unfit", "gpu": "3", "what": "x", "action": "explode"})
    with pytest.raises(recording.RecordingError, match="the unfit row"):
        replay.judge(recording.read([row]))
