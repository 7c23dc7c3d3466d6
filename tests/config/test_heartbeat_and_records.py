"""The tables [heartbeat], [records] and [incidents], and where the daemon keeps its memory."""

from __future__ import annotations

import pytest

from tests.config.loading import checked, config, problems

FACTOR = "expected a number from 1.5 to 100"
KEEP = "expected an integer from 0 to 1000"
SIZE = "expected MiB as an integer from 1 to 100000"
SWITCH = "expected true or false"


def test_a_host_s_own_starts_teach_patience_and_stacks_are_looked_at_unless_it_is_said_otherwise() -> None:
    told = config("heartbeat = { learn = false, learn_factor = 3, stacks = false }").heartbeat
    assert (told.learn, told.learn_factor, told.stacks) == (False, 3.0, False)
    untold = config("").heartbeat
    assert (untold.learn, untold.learn_factor, untold.stacks) == (True, 5.0, True)


def test_twenty_recordings_of_200_mib_in_all_are_kept_in_the_state_folder_unless_it_is_said_otherwise() -> None:
    told = config("records = { keep = 0, max_size = 1 }\ndaemon.state_dir = '/srv/state'")
    assert (told.records.keep, told.records.max_size, told.daemon.state_dir) == (0, 1, "/srv/state")
    untold = config("")
    assert (untold.records.keep, untold.records.max_size) == (20, 200)
    assert untold.daemon.state_dir == "/var/lib/mgpu-llm"


def test_twenty_incidents_of_100_mib_in_all_are_kept_unless_it_is_said_otherwise() -> None:
    told = config("incidents = { keep = 0, max_size = 1 }").incidents
    assert (told.keep, told.max_size) == (0, 1)
    untold = config("").incidents
    assert (untold.keep, untold.max_size) == (20, 100)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("heartbeat.learn_factor = 1.4", f"heartbeat.learn_factor: found 1.4 (float), {FACTOR}"),
        ("heartbeat.learn_factor = 101", f"heartbeat.learn_factor: found 101 (integer), {FACTOR}"),
        ("heartbeat.learn_factor = nan", f"heartbeat.learn_factor: found nan (float), {FACTOR}"),
        ("heartbeat.learn_factor = true", f"heartbeat.learn_factor: found true (boolean), {FACTOR}"),
        ("heartbeat.learn_factor = '5'", f'heartbeat.learn_factor: found "5" (string), {FACTOR}; write 5'),
        ("records.keep = -1", f"records.keep: found -1 (integer), {KEEP}"),
        ("records.keep = 1001", f"records.keep: found 1001 (integer), {KEEP}"),
        ("records.keep = 2.0", f"records.keep: found 2.0 (float), {KEEP}; write 2"),
        ("records.keep = false", f"records.keep: found false (boolean), {KEEP}"),
        ("records.max_size = 0", f"records.max_size: found 0 (integer), {SIZE}"),
        ("records.max_size = 100001", f"records.max_size: found 100001 (integer), {SIZE}"),
        ("incidents.keep = -1", f"incidents.keep: found -1 (integer), {KEEP}"),
        ("incidents.max_size = 0", f"incidents.max_size: found 0 (integer), {SIZE}"),
        ("records.max_size = '200 MiB'", f'records.max_size: found "200 MiB" (string), {SIZE}'),
        ("daemon.state_dir = 'state'", 'daemon.state_dir: found "state" (string), expected an absolute path'),
        (
            "daemon.state_dir = '/a\\nb'".replace("'", '"'),
            'daemon.state_dir: found "/a\\u000ab" (string), expected text without control characters',
        ),
    ],
)
def test_a_value_out_of_bounds_says_the_bounds(text: str, line: str) -> None:
    assert problems(text) == [f"a.toml: {line}"]


@pytest.mark.parametrize(
    ("written", "rest"),
    [
        ('"yes"', f'found "yes" (string), {SWITCH}; write true'),
        ('"Off"', f'found "Off" (string), {SWITCH}; write false'),
        ("1", f"found 1 (integer), {SWITCH}; write true"),
        ("0", f"found 0 (integer), {SWITCH}; write false"),
        ("2", f"found 2 (integer), {SWITCH}"),
        ('"perhaps"', f'found "perhaps" (string), {SWITCH}'),
    ],
)
def test_a_switch_written_in_another_way_is_told_how_to_write_it(written: str, rest: str) -> None:
    assert problems(f"heartbeat.stacks = {written}") == [f"a.toml: heartbeat.stacks: {rest}"]


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("heartbeat.learning = true", "did you mean heartbeat.learn?"),
        ("heartbeat.stack = true", "did you mean heartbeat.stacks?"),
        ("records.max-size = 1", "did you mean records.max_size?"),
        ("patience.learn_factor = 2", "did you mean heartbeat.learn_factor?"),
        ("daemon.keep = 3", "did you mean records.keep?"),
        ("record = {}", "did you mean records?"),
        ("state_dir = '/x'", "did you mean daemon.state_dir?"),
    ],
)
def test_a_key_that_is_nearly_one_of_these_says_which_may_be_meant(text: str, hint: str) -> None:
    (line,) = problems(text)
    assert line.endswith(hint)


def test_a_state_folder_that_cannot_be_is_no_problem_because_the_daemon_serves_without_memory() -> None:
    fitting = "engine.command = ['/bin/sh']\nmodel.path = 'org/name'\n"
    assert checked(f"{fitting}daemon.state_dir = '/dev/null/state'") == []
