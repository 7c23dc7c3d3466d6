"""The catalogue of what the driver says of GPUs: that it is read, whole, and of one mind with the table of causes."""

from __future__ import annotations

from importlib import resources

import pytest

from mgpu_llm.core import diagnosis, xid
from mgpu_llm.core.diagnosis import Clue
from mgpu_llm.core.xid import CATALOGUE, Action, SwitchError, Xid

#: NVIDIA's immediate actions (resolution buckets), and what they come to here.
BUCKETS = {
    "RESTART_BM": {Action.LOST},
    "RESTART_VM": {Action.REBOOT},
    "RESET_GPU": {Action.RESET},
    "WORKFLOW_XID_48": {Action.RESET},
    "WORKFLOW_NVLINK_ERR": {Action.RESET},
    "WORKFLOW_NVLINK5_ERR": {Action.RESET},
    "RESTART_APP": {Action.APPLICATION},
    "WORKFLOW_XID_45": {Action.APPLICATION},
    "CHECK_MECHANICALS": {Action.CONTACT},
    "CHECK_UVM": {Action.CONTACT},
    "CONTACT_SUPPORT": {Action.CONTACT},
    "UPDATE_SWFW": {Action.CONTACT},
    "IGNORE": {Action.IGNORE, Action.APPLICATION},
    "none": {Action.IGNORE, Action.CONTACT},
}
ROWS = {Action.LOST: "gpu-lost", Action.RESET: "gpu-needs-reset", Action.REBOOT: "gpu-needs-reboot"}


def line(number: int, rest: str = "pid=1027, name=VLLM::Worker_TP, Ch 00000010") -> str:
    return f"NVRM: Xid (PCI:0000:41:00): {number}, {rest}"


def read(text: str) -> Xid:
    found = xid.read(text)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("text", "number", "gpu"),
    [
        ("NVRM: Xid (PCI:0000:41:00): 79, pid=1234, name=python3, GPU has fallen off the bus.", 79, "0000:41:00"),
        ("NVRM: Xid (PCI:0000:41:00): 79, GPU has fallen off the bus.", 79, "0000:41:00"),
        ("[82341.1] NVRM: Xid (PCI:0000:05:00): 79, pid='<unknown>', name=<unknown>, GPU has", 79, "0000:05:00"),
        ("NVRM: GPU 0000:01:00.0: GPU has fallen off the bus.", 79, "0000:01:00.0"),
        ("NVRM: Xid (0000:03:00): 13, 0003 00000000 00008297 00001098 00000000 00000044", 13, "0000:03:00"),
        ("NVRM: Xid (PCI:0000:17:00 GPU-I:05): 43, pid=71, name=python3, Ch 00000008", 43, "0000:17:00"),
        ("NVRM: Xid (PCI:0009:01:00): 149, NETIR_LINK_EVT  Fatal   XC0 i0 Link 01 (0x021425c6)", 149, "0009:01:00"),
        ("NVRM: Xid (PCI:0000:17:00): 999999,", 999999, "0000:17:00"),
    ],
)
def test_a_line_is_read_in_every_form_that_drivers_have_given_it(text: str, number: int, gpu: str) -> None:
    found = read(text)
    assert (found.number, found.gpu) == (number, gpu)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "NVRM: Xid error: xyz, invalid data",
        "NVRM: Xid (PCI:0000:66:00): abc, pid=2280636",
        "NVRM: loading NVIDIA UNIX Open Kernel Module for x86_64  570.158.01",
        "nvidia-nvswitch3: SXid (PCI:0000:05:00.0): 12028, Non-fatal, Link 32 egress non-posted PRIV error (First)",
        "NVRM: GPU 0000:65:00.0: RmInitAdapter failed! (0x26:0x56:1474)",
    ],
)
def test_what_is_no_error_of_a_gpu_is_none(text: str) -> None:
    assert xid.read(text) is None


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            "nvidia-nvswitch3: SXid (PCI:0000:05:00.0): 12028, Non-fatal, Link 32 egress",
            SwitchError(number=12028, fatal=False),
        ),
        (
            "nvidia-nvswitch0: SXid (PCI:0000:00:00.0): 20034, Fatal, Link 30 LTSSM",
            SwitchError(number=20034, fatal=True),
        ),
        ("nvidia-nvswitch3: SXid (PCI:0000:c1:00.0): garbled, Fatal", None),
        (line(74), None),
    ],
)
def test_an_error_of_a_switch_says_itself_whether_it_is_fatal(text: str, error: SwitchError | None) -> None:
    assert xid.of_switch(text) == error


# -- what is to be done ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", sorted(CATALOGUE))
def test_what_is_done_follows_from_nvidias_catalogue(number: int) -> None:
    entry = CATALOGUE[number]
    assert entry.action in BUCKETS[entry.bucket]
    assert entry.what
    assert entry.what[:2] in ("NV", "PC") or entry.what[0].islower()
    assert read(line(number)).what == entry.what


def test_each_number_stands_there_once() -> None:
    text = (resources.files("mgpu_llm.core") / "xids.toml").read_text(encoding="utf-8")
    numbers = [int(word) for row in text.split("numbers = [")[1:] for word in row.split("]")[0].split(",")]
    assert sorted(numbers) == sorted(CATALOGUE)


def test_for_whatever_is_to_be_done_there_is_advice() -> None:
    assert {*xid.ADVICE} == {*Action}
    assert all(xid.ADVICE.values())
    assert {entry.action for entry in CATALOGUE.values()} | {*xid.RECOVERIES.values()} == {*Action}


def test_what_no_catalogue_explains_ends_nothing() -> None:
    assert (read(line(14)).action, read(line(4711)).action) == (Action.CONTACT, Action.CONTACT)


@pytest.mark.parametrize(
    ("rest", "action"),
    [
        ("NETIR_LINK_EVT  Fatal   XC0 i0 Link 09 (0x025525c6 0x00000000)", Action.RESET),
        ("NETIR_LINK_DOWN Nonfatal XC1 i2 Link 17 (0xdeadbeef)", Action.IGNORE),
        ("RLW_SRC_TRACK Non-fatal XC1 i0 Link 00", Action.IGNORE),
    ],
)
def test_an_nvlink_error_of_newer_gpus_says_itself_whether_it_is_fatal(rest: str, action: Action) -> None:
    assert read(line(149, rest)).action is action


@pytest.mark.parametrize(
    ("rest", "action", "certain"),
    [
        ("GPU recovery action changed from 0x0 (None) to 0x1 (GPU Reset Required)", Action.RESET, True),
        ("GPU recovery action changed from 0x0 (None) to 0x2 (Node Reboot Required)", Action.REBOOT, True),
        ("GPU recovery action changed from 0x0 (None) to 0x2 (OS Reboot)", Action.REBOOT, True),
        ("GPU recovery action changed from 0x0 (None) to 0x1 (PF FLR)", Action.RESET, True),
        ("GPU recovery action changed from 0x0 (None) to 0x3 (Drain P2P)", Action.RESET, True),
        ("GPU recovery action changed from 0x1 (GPU Reset Required) to 0x4 (Drain and Reset)", Action.DRAIN, False),
        ("GPU recovery action changed from 0x2 (Node Reboot Required) to 0x0 (None)", Action.IGNORE, False),
        ("GPU recovery action changed from 0x0 (None) to 0x20 (Something New)", Action.CONTACT, False),
        ("in other words", Action.CONTACT, False),
    ],
)
def test_154_says_itself_what_is_to_be_done_and_that_needs_no_proof(rest: str, action: Action, certain: bool) -> None:
    found = read(line(154, rest))
    assert (found.action, found.certain) == (action, certain)


def test_of_what_follows_only_from_a_number_no_more_than_a_gpu_that_is_off_the_bus_is_certain() -> None:
    assert {number for number in CATALOGUE if read(line(number)).certain} == {xid.FALLEN_OFF}


# -- of one mind with the table of causes ------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [*sorted(CATALOGUE), 14, 4711])
def test_the_table_of_causes_calls_a_gpu_unfit_when_the_catalogue_does(number: int) -> None:
    cause = diagnosis.look_at_kernel(Clue(), line(number)).cause
    expected = {94: "gpu-memory-contained"}.get(number, ROWS.get(read(line(number)).action, ""))
    assert cause == expected


@pytest.mark.parametrize("code", [*xid.RECOVERIES, 0x20])
def test_and_when_154_does(code: int) -> None:
    text = line(154, f"GPU recovery action changed from 0x0 (None) to 0x{code:x} (Whatever)")
    assert diagnosis.look_at_kernel(Clue(), text).cause == ROWS.get(read(text).action, "")


@pytest.mark.parametrize("rest", ["RLW_X Fatal XC0", "RLW_X Nonfatal XC0", "RLW_X Non-fatal XC0"])
def test_and_when_an_nvlink_error_is_fatal(rest: str) -> None:
    text = line(145, rest)
    assert diagnosis.look_at_kernel(Clue(), text).cause == ROWS.get(read(text).action, "")
