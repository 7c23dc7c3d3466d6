"""The table of signatures: how it is read, what is wrong with a broken row, and what the table must have."""

from __future__ import annotations

import re

import pytest

from mgpu_llm.core import signatures
from mgpu_llm.core.engine_log import Phase
from mgpu_llm.core.remedies import Want
from mgpu_llm.core.signatures import Gpus, Group, Kind, Role, SignatureError, Where, parse

TABLE = signatures.load()
WORDS = """
[[signature]]
id = "port-in-use"
group = "process"
kind = "crash"
patterns = ['port (?P<port>\\d+)']
cause = "port {port} is in use"
advice = "stop the other server"
wants = ["plain-retry"]
sources = ["recorded"]
"""
STALL = """
[[signature]]
id = "hang"
group = "transport"
phases = ["warm-up", "compile"]
kind = "hang"
cause = "{quiet}{spins}"
advice = "look"
wants = ["transport"]
sources = ["recorded"]

[signature.stall]
gpus = "spin"
blind = false
spinning = true
gpu_memory_below_gb = 8
frame = "a"
workers = "b"
waits_in = "c"
last_line = "d"
"""
#: Of the collection of reports, what neither a line nor a stall shows: a worker of 0.8.4 that dies in silence while all else
#: waits, and a port that two servers share.
NOT_SEEN = {"B04", "B15"}
SIZES = {"A": 22, "B": 20, "C": 9, "D": 12, "H": 7, "F": 8}


def wrong(text: str) -> str:
    with pytest.raises(SignatureError) as caught:
        parse(text)
    return str(caught.value)


def test_a_row_of_words_has_the_defaults_of_an_error_that_is_a_root_in_any_phase() -> None:
    (row,) = parse(WORDS)
    assert (row.id, row.reported_as, row.group, row.kind) == ("port-in-use", "port-in-use", Group.PROCESS, Kind.CRASH)
    assert (row.role, row.where, row.phases, row.stall) == (Role.ROOT, Where.ERROR, frozenset(), None)
    assert (row.atlas, row.versions, row.unless, row.sources) == ((), (), (), ("recorded",))
    assert row.wants == (Want.PLAIN_RETRY,)
    match = row.match("the port 8000 is taken")
    assert match is not None
    assert match["port"] == "8000"
    assert row.match("no number") is None
    assert all(row.holds_in(phase) for phase in (*Phase, None))


def test_a_row_of_a_stall_has_all_that_must_be_seen() -> None:
    (row,) = parse(STALL)
    assert row.stall is not None
    assert (row.stall.gpus, row.stall.gpu_memory_below_gb) == (Gpus.SPIN, 8.0)
    assert (row.stall.spinning, row.stall.blind) == (True, False)
    seen = (row.stall.frame, row.stall.workers, row.stall.waits_in, row.stall.last_line)
    assert [pattern.pattern for pattern in seen if pattern is not None] == ["a", "b", "c", "d"]
    assert row.phases == {Phase.WARM_UP, Phase.COMPILE}
    assert row.holds_in(Phase.COMPILE)
    assert not row.holds_in(Phase.BOOT)
    assert not row.holds_in(None)


def test_nothing_but_the_beginning_of_a_long_line_is_searched() -> None:
    (row,) = parse(WORDS)
    assert row.match("x" * signatures.SEARCHED + "port 8000") is None


def test_a_table_without_rows_is_empty_and_one_that_is_no_toml_says_where() -> None:
    assert parse("") == ()
    assert wrong("[[signature]\n").startswith("cannot read signatures: ")
    assert "line 1" in wrong("[[signature]\n")


@pytest.mark.parametrize(
    ("was", "becomes", "says"),
    [
        ('id = "port-in-use"\n', "", "row 1 (without id): id: a text is needed"),
        ('id = "port-in-use"', "id = 7", "id: a text is needed"),
        ('id = "port-in-use"', 'id = ""', "id: a text is needed"),
        ('group = "process"', 'group = "proces"', "group: 'proces' is none of transport, process, memory"),
        ('kind = "crash"', 'kind = "crashed"', "kind: 'crashed' is none of hang, crash, slow-but-healthy, latent"),
        ('kind = "crash"', 'kind = "crash"\nrole = "leaf"', "role: 'leaf' is none of root, cascade, teardown"),
        (
            'kind = "crash"',
            'kind = "crash"\nwhere = "log"',
            "where: 'log' is none of error, any, kernel, exit, preflight",
        ),
        ('kind = "crash"', 'kind = "crash"\nphases = ["bot"]', "phases: 'bot' is none of boot, distributed-init"),
        ('kind = "crash"', 'kind = "crash"\nphases = "boot"', "phases: a list of texts is needed"),
        ('kind = "crash"', 'kind = "crash"\nphases = [1]', "phases: a list of texts is needed"),
        ('kind = "crash"', 'kind = "crash"\nkinds = 1\nage = 2', "unknown key age, kinds"),
        ('kind = "crash"', 'kind = "crash"\nunless = ["none"]', "unless: there is no row none above"),
        ("(?P<port>\\d+)", "(?P<port>\\d+", "is no pattern: missing ), unterminated subpattern"),
        ("patterns = ['port (?P<port>\\d+)']\n", "", "it needs either patterns or a stall"),
        ('kind = "crash"', 'kind = "crash"\nstall = {}', "it needs either patterns or a stall"),
        ('kind = "crash"', 'kind = "crash"\nstall = 1', "stall: a table is needed"),
        ('wants = ["plain-retry"]', 'wants = ["retry"]', "wants: 'retry' is none of plain-retry, transport"),
        ('wants = ["plain-retry"]', "", "a root needs advice, and wants"),
        ('advice = "stop the other server"', "", "a root needs advice, and wants"),
        ('sources = ["recorded"]', "", "sources: none is named"),
        ("{port}", "{place} {port} {time}", "cause: nothing gives place, time"),
        ("'port (?P<port>\\d+)'", "'port (?P<port>\\d+)', 'port'", "cause: nothing gives port"),
    ],
)
def test_a_broken_row_of_words_is_named_with_what_is_wrong(was: str, becomes: str, says: str) -> None:
    assert was in WORDS
    assert says in wrong(WORDS.replace(was, becomes))


@pytest.mark.parametrize(
    ("was", "becomes", "says"),
    [
        ('gpus = "spin"', 'gpus = "busy"', "stall.gpus: 'busy' is none of spin, idle"),
        ('frame = "a"', 'frame = "("', "stall.frame: '(' is no pattern"),
        ('frame = "a"', "frame = 1", "frame: a text is needed"),
        ('frame = "a"', 'fram = "a"', "unknown key fram"),
        ('frame = "a"', 'shows = "evidence"', "stall.shows: 'evidence' is nothing that a stall shows"),
        ("gpu_memory_below_gb = 8", 'gpu_memory_below_gb = "much"', "could not convert string to float"),
        ("{quiet}", "{quiet} {port}", "cause: nothing gives port"),
    ],
)
def test_a_broken_rule_is_named_with_what_is_wrong(was: str, becomes: str, says: str) -> None:
    assert was in STALL
    assert says in wrong(STALL.replace(was, becomes))


def test_every_broken_row_is_told_and_a_name_is_given_once() -> None:
    said = wrong(WORDS + WORDS + STALL.replace('"hang"', '"hung"', 2))
    assert "row 2 (port-in-use): id: there is a row of that name already" in said
    assert "row 3 (hung): kind: 'hung' is none of" in said


def test_the_table_has_every_failure_of_the_collection_that_can_be_seen_from_outside() -> None:
    known = {f"{letter}{number:02}" for letter, size in SIZES.items() for number in range(1, size + 1)}
    covered = {name for row in TABLE for name in row.atlas}
    assert covered <= known
    assert known - covered <= NOT_SEEN


def test_every_row_has_sources_and_names_that_read_like_the_others() -> None:
    for row in TABLE:
        assert re.fullmatch(r"[a-z0-9-]+", row.id), row.id
        assert re.fullmatch(r"[a-z0-9-]+", row.reported_as), row.id
        assert row.sources, row.id
        assert not row.advice.endswith("."), row.id
        assert not row.cause.endswith("."), row.id


@pytest.mark.parametrize("phase", Phase)
def test_a_stall_in_any_phase_has_a_row_that_asks_for_nothing(phase: Phase) -> None:
    rows = [row for row in TABLE if row.stall == signatures.Rule() and row.holds_in(phase)]
    assert [row.id for row in rows] == [f"stalled-in-{phase.label}"]
    assert TABLE.index(rows[0]) > max(TABLE.index(row) for row in TABLE if row.stall not in (None, signatures.Rule()))


def test_only_roots_are_causes_of_their_own_and_what_is_slow_or_latent_wants_nothing() -> None:
    for row in TABLE:
        if row.kind in (Kind.SLOW, Kind.LATENT) or row.role is Role.TEARDOWN:
            assert row.wants == (), row.id
        if row.stall is not None:
            assert row.kind is Kind.HANG, row.id
            assert row.role is Role.ROOT, row.id
