"""What this host's starts have needed, as data."""

from __future__ import annotations

import json

import pytest

from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.history import LONGEST, PastStart, from_json, launch_key, longest_quiet, to_json, usual, with_start


def start(
    launch: str = "a" * 16, *, at: str = "2026-11-24T21:05:00Z", quiet_s: dict[str, float] | None = None
) -> PastStart:
    return PastStart(
        launch=launch,
        model="/models/toy",
        at=at,
        duration_s=112.5,
        phase_s={"boot": 20.0, "weights": 60.0},
        quiet_s={"boot": 1.8} if quiet_s is None else quiet_s,
    )


GOOD = json.loads(to_json([start()]))


def with_row(**changes: object) -> str:
    return json.dumps({**GOOD, "starts": [{**GOOD["starts"][0], **changes}]})


def test_a_history_that_is_written_and_read_is_the_same() -> None:
    starts = (start(), start("b" * 16, quiet_s={}))
    assert from_json(to_json(starts)) == starts
    assert from_json(to_json(())) == ()


def test_only_the_newest_starts_are_remembered() -> None:
    starts: tuple[PastStart, ...] = ()
    for number in range(LONGEST + 3):
        starts = with_start(starts, start(f"{number}"))
    assert [each.launch for each in starts] == [str(number) for number in range(3, LONGEST + 3)]
    assert len(from_json(to_json((*starts, *starts)))) == LONGEST


def test_the_longest_quiet_of_a_phase_is_that_of_all_starts_and_unseen_phases_are_not_there() -> None:
    quiets = ({"boot": 1.0, "distributed-init": 2.0}, {"boot": 3.0}, {"boot": 2.0, "of-another-version": 9.0})
    assert longest_quiet(start(quiet_s=quiet_s) for quiet_s in quiets) == {
        Phase.BOOT: 3.0,
        Phase.DISTRIBUTED_INIT: 2.0,
    }
    assert longest_quiet(()) == {}


def test_the_usual_start_is_the_newest_of_the_same_launch_or_none() -> None:
    starts = (start("a", quiet_s={"boot": 1.0}), start("a", quiet_s={"boot": 2.0}), start("b"))
    assert usual(starts, "a") == starts[1]
    assert usual(starts, "c") is None


def test_a_launch_is_another_with_another_command_line_variable_or_gpu() -> None:
    argv, env, uuids = ("vllm", "serve", "/m"), {"NCCL_P2P_DISABLE": "1", "A": "2"}, ("GPU-1", "GPU-2")
    key = launch_key(argv, env, uuids)
    assert len(key) == 16
    assert key == launch_key(argv, dict(reversed(env.items())), uuids)
    others = {
        launch_key((*argv, "--seed", "1"), env, uuids),
        launch_key(argv, {**env, "A": "3"}, uuids),
        launch_key(argv, env, ("GPU-2", "GPU-1")),
        launch_key(argv, env, ()),
    }
    assert len(others | {key}) == 5


def test_a_launch_with_another_secret_is_the_same_launch() -> None:
    def key(secret: str) -> str:
        return launch_key(("vllm", "--api-key", secret, f"--hf-token={secret}"), {"VLLM_API_KEY": secret}, ())

    assert key("sk-1") == key("sk-2")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it is not JSON: Expecting value: line 1 column 1 (char 0)"),
        ("{", "it is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("[" * 100_000, "it is nested too deeply"),
        ("[]", "it is no history of starts"),
        ('{"format": 1}', "it is no history of starts"),
        ('{"format": 2, "starts": []}', "it has format '2', and this version knows 1"),
        ('{"starts": []}', "it has format 'None', and this version knows 1"),
        ('{"format": 1, "starts": [5]}', "start 0 is no table"),
        (with_row(model=5), 'start 0 has no text "model"'),
        (with_row(at="yesterday"), 'start 0 has no time "at"'),
        (with_row(at="2026-11-24T21:05:00"), 'start 0 has no time "at"'),
        (with_row(duration_s="5"), 'start 0 has no seconds "duration_s"'),
        (with_row(duration_s=True), 'start 0 has no seconds "duration_s"'),
        (with_row(duration_s=-1), 'start 0 has no seconds "duration_s"'),
        (with_row(duration_s=float("nan")), 'start 0 has no seconds "duration_s"'),
        (with_row(duration_s=10**400), 'start 0 has no seconds "duration_s"'),
        (with_row(duration_s=1e9 + 1), 'start 0 has no seconds "duration_s"'),
        (with_row(quiet_s={"boot": 10**400}), 'start 0 has no seconds by phase "quiet_s"'),
        (with_row(phase_s=[]), 'start 0 has no seconds by phase "phase_s"'),
        (with_row(quiet_s={"boot": None}), 'start 0 has no seconds by phase "quiet_s"'),
    ],
)
def test_what_is_no_history_says_why(text: str, why: str) -> None:
    with pytest.raises(ValueError) as refused:
        from_json(text)
    assert str(refused.value) == why
