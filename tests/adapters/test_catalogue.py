"""packaging/systemd/mgpu-llm.catalog: what `journalctl -x` says of the daemon's events."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from mgpu_llm.core import supervisor, whereabouts
from mgpu_llm.core.effects import Announce
from mgpu_llm.core.journal_fields import MESSAGE_IDS, field
from mgpu_llm.core.ladder import BASE
from mgpu_llm.core.states import State
from tests.core.everything import EVENTS, POLICY, RUN, STATES
from tests.core.world import BAD_FLAG, BANNER, NCCL, UP, WORLD_SIZE, World, loading

ROOT = Path(__file__).parents[2]
CATALOGUE = ROOT / "packaging/systemd/mgpu-llm.catalog"
HEADERS = ["Subject", "Defined-By", "Support", "Documentation"]
LEVELS = ["debug", "info", "warning", "error", "exception"]
#: Nothing follows from these that is not said elsewhere: a transition on the ladder, a step of an end, a fault beside service.
NEED_NO_EXPLANATION = {
    "engine.starting",
    "engine.killing",
    "engine.stale-lock",
    "systemd.notify.failed",
    "metrics.failed",
}
NAMES = {message_id: name for name, message_id in MESSAGE_IDS.items()}


def entries() -> list[tuple[str, list[str], str]]:
    """Of each its id, the names of its headers, and all that it says."""
    text = "\n".join(line for line in CATALOGUE.read_text().splitlines() if not line.startswith("#"))
    found = []
    for entry in re.split(r"^-- ", text, flags=re.MULTILINE)[1:]:
        message_id, _, said = entry.partition("\n")
        head, _, _ = said.partition("\n\n")
        found.append((message_id, [line.partition(":")[0] for line in head.splitlines()], said))
    return found


def states() -> Iterator[State]:
    """All that there are, and those of which one event makes a served or a refused engine."""
    yield from STATES
    up = World(policy=POLICY).start().say(BANNER, WORLD_SIZE, NCCL, UP).look().state
    refused = loading().say(BAD_FLAG).state
    for run in (RUN, replace(RUN, rung=BASE)):
        yield replace(up, run=run)
        yield replace(refused, run=run)


@dataclass(frozen=True)
class Told:
    """An event, how grave it is at worst, and the fields that it has each time."""

    name: str
    level: str
    fields: set[str]


def announced() -> Iterator[Told]:
    """Every event of the core, by each state and each event that there is."""
    for state in states():
        for event in EVENTS:
            after, effects = supervisor.step(state, event, POLICY)
            for effect in effects:
                if isinstance(effect, Announce):
                    facts = {**whereabouts.of(after), **effect.facts}
                    known = {field(name) for name, fact in facts.items() if fact not in (None, "")}
                    yield Told(effect.name, effect.level, known)


def logged() -> Iterator[Told]:
    """The same of what the daemon's other parts log, as their source has it."""
    for path in (ROOT / "daemon").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name(id="log"), attr=level), args=[ast.Constant(value=str() as name)]
                ):
                    yield Told(name, level, {field(word.arg) for word in node.keywords if word.arg is not None})
                case _:
                    continue
    yield from (Told(name, "error", {"MGPU_EXIT_STATUS"}) for name in ("config.wrong", "daemon.not-started"))
    yield Told("journal.lines-dropped", "warning", {"MGPU_COUNT"})


@pytest.fixture(scope="module")
def always() -> dict[str, Told]:
    """By event."""
    found = dict[str, Told]()
    for told in (*announced(), *logged()):
        before = found.get(told.name, told)
        level = max(before.level, told.level, key=LEVELS.index)
        found[told.name] = Told(told.name, level, before.fields & told.fields)
    return found


def test_table_and_catalogue_have_the_same_ids_each_once() -> None:
    assert [NAMES.get(message_id) for message_id, _, _ in entries()] == list(MESSAGE_IDS)


def test_every_entry_has_the_headers_and_says_what_to_do() -> None:
    for message_id, headers, said in entries():
        assert headers == HEADERS, message_id
        assert len(said.partition("\n\n")[2].split("\n\n")) >= 2, message_id
        assert max(map(len, said.splitlines())) <= 90, message_id


def test_every_explained_event_is_one_that_the_daemon_tells(always: dict[str, Told]) -> None:
    assert MESSAGE_IDS.keys() - always.keys() == set()


def test_every_warning_and_error_is_explained_or_explains_itself(always: dict[str, Told]) -> None:
    grave = {name for name, told in always.items() if told.level in ("warning", "error", "exception")}
    assert grave - MESSAGE_IDS.keys() - NEED_NO_EXPLANATION == set()


def test_no_entry_names_a_field_that_its_event_may_lack(always: dict[str, Told]) -> None:
    for message_id, _, said in entries():
        named = set(re.findall(r"@([A-Z_]+)@", said)) - {"_SYSTEMD_UNIT"}
        assert named <= always[NAMES[message_id]].fields, NAMES[message_id]


def test_journalctl_compiles_it(tmp_path: Path) -> None:
    assert shutil.which("journalctl"), "no journalctl; apt install systemd"
    folder = tmp_path / "usr/lib/systemd/catalog"
    folder.mkdir(parents=True)
    shutil.copy(CATALOGUE, folder)

    def journalctl(*words: str) -> str:
        argv = ["journalctl", f"--root={tmp_path}", *words]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    journalctl("--update-catalog")
    assert {line.split()[0] for line in journalctl("--list-catalog").splitlines()} == set(NAMES)
    dumped = journalctl("--dump-catalog", MESSAGE_IDS["engine.stalled"])
    assert "Subject: The engine stalled" in dumped
    assert "mgpuctl incident show last" in dumped
    assert "# engine" not in dumped


def test_the_ids_in_the_documentation_are_those_of_the_table() -> None:
    text = (ROOT / "docs/journal.md").read_text()
    told = dict(re.findall(r"^\| `([a-z.-]+)` \| ([0-9a-f]{32}) \|$", text, flags=re.MULTILINE))
    assert len(told) >= 5
    assert told.items() <= MESSAGE_IDS.items()
    assert set(re.findall(r"MESSAGE_ID=(\w+)", text)) <= set(NAMES)
