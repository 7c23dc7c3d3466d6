"""packaging/systemd/mgpu-llm.catalog: what `journalctl -x` says of the daemon's events."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
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


def announced() -> Iterator[tuple[str, set[str]]]:
    """Every event of the core, by each state and each event that there is, with the fields that its entry has."""
    for state in states():
        for event in EVENTS:
            after, effects = supervisor.step(state, event, POLICY)
            for effect in effects:
                if isinstance(effect, Announce):
                    facts = {**whereabouts.of(after), **effect.facts}
                    yield effect.name, {field(name) for name, fact in facts.items() if fact not in (None, "")}


def logged() -> Iterator[tuple[str, set[str]]]:
    """The same of what the daemon's other parts log, as their source has it."""
    for path in (ROOT / "daemon").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                name = node.args[0]
                if isinstance(name, ast.Constant) and name.value in MESSAGE_IDS:
                    yield str(name.value), {field(word.arg) for word in node.keywords if word.arg is not None}
    yield from ((name, {"MGPU_EXIT_STATUS"}) for name in ("config.wrong", "daemon.not-started"))
    yield "journal.lines-dropped", {"MGPU_COUNT"}


@pytest.fixture(scope="module")
def always() -> dict[str, set[str]]:
    """By event, the fields that it has each time."""
    found = dict[str, set[str]]()
    for name, fields in (*announced(), *logged()):
        found[name] = found.get(name, fields) & fields
    return found


def test_table_and_catalogue_have_the_same_ids_each_once() -> None:
    assert [NAMES.get(message_id) for message_id, _, _ in entries()] == list(MESSAGE_IDS)


def test_every_entry_has_the_headers_and_says_what_to_do() -> None:
    for message_id, headers, said in entries():
        assert headers == HEADERS, message_id
        assert len(said.partition("\n\n")[2].split("\n\n")) >= 2, message_id
        assert max(map(len, said.splitlines())) <= 90, message_id


def test_every_explained_event_is_one_that_the_daemon_tells(always: dict[str, set[str]]) -> None:
    assert MESSAGE_IDS.keys() - always.keys() == set()


def test_no_entry_names_a_field_that_its_event_may_lack(always: dict[str, set[str]]) -> None:
    for message_id, _, said in entries():
        named = set(re.findall(r"@([A-Z_]+)@", said)) - {"_SYSTEMD_UNIT"}
        assert named <= always[NAMES[message_id]], NAMES[message_id]


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
