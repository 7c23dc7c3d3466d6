"""The page of mgpuctl plan, from a document to lines."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Final

from mgpu_llm.control_api import UNKNOWN_CAUSE
from mgpu_llm.core.launch import SECRET, shown
from mgpu_llm.ctl.words import Page, cells, plain

#: What the engine's own words would fill in, once it has failed so.
BLANKS: Final = re.compile(r"(?:\{[^{}]*\})+")
#: After these systemd does not start the daemon again.
ENDS: Final = {65: "no retry can help", 69: "what could help has been tried"}
INDENT: Final = 5


def plan_lines(document: Mapping[str, Any], page: Page) -> list[str]:
    """Ways in which the cause shows, and which are met alike, stand together; the command line is told once."""
    cause = str(document["cause"])
    alike = list[tuple[dict[str, Any], list[str]]]()
    for plan in document["plans"]:
        answer = {key: plan[key] for key in ("rungs", "outs", "status")}
        ways = next((ways for other, ways in alike if other == answer), None)
        if ways is None:
            alike.append((answer, ways := []))
        ways += [way for way in _sentence(plan["summary"]) if way not in ways]
    lines = list[str]()
    for number, (answer, ways) in enumerate(alike):
        lines += [""] if number else []
        lines += _head(cause, ways, page)
        lines += _rungs(answer["rungs"], page, command=number == 0)
        lines += _end(answer, page)
    if begins := document.get("begins"):
        told = (
            f"the next start begins on rung {begins['rung']}, which has served since {begins['since']} (mgpuctl forget)"
        )
        lines += ["", *(f"    {line}" for line in page.wrap(plain(told), 4))]
    return lines


def _head(cause: str, ways: Sequence[str], page: Page) -> list[str]:
    told = ways or ["any failure that no other cause explains"] * (cause == UNKNOWN_CAUSE)
    head = page.paint(plain(cause), bold=True)
    return [head, *(f"  {line}" for way in told for line in page.wrap(way, 2)), ""]


def _sentence(summary: str) -> list[str]:
    told = BLANKS.sub("...", str(summary))
    return [told] if told.strip(" .,:") else []


def _rungs(rungs: Sequence[Mapping[str, Any]], page: Page, *, command: bool) -> list[str]:
    lines, costs = list[str](), list[str]()
    for number, rung in enumerate(rungs, start=1):
        tries = int(rung["tries"])
        more = f" ({tries} tries)" if tries > 1 else ""
        lines += [f"{number:>2}  {page.paint(plain(str(rung['name'])), bold=True)}{more}"]
        changes = [plain(str(change)) for change in rung["changes"]] or ["the settings as configured"]
        told = _packed(changes, page, ";")
        if command and number == 1:
            told += _command(rung["argv"], rung["env"], page)
        told += page.wrap(_cost(str(rung["cost"]), costs), INDENT)
        costs.append(str(rung["cost"]))
        lines += [f"{' ' * INDENT}{line}" for line in told]
    return lines


def _cost(cost: str, before: Sequence[str]) -> str:
    """What an earlier rung costs is not told again: a rung has all the changes of the one before."""
    if not cost:
        return ""
    for number, earlier in sorted(enumerate(before, start=1), key=lambda each: -len(each[1])):
        if earlier and cost == earlier:
            return f"costs: as {number}"
        if earlier and cost.startswith(f"{earlier}; "):
            return f"costs: as {number}; {cost.removeprefix(f'{earlier}; ')}"
    return f"costs: {cost}"


def _command(argv: Sequence[str], env: Mapping[str, str], page: Page) -> list[str]:
    """For a shell, with an option and its value on one line; secrets are left out."""
    words = [f"{name}=..." if SECRET.fullmatch(name) else f"{name}={shlex.quote(env[name])}" for name in env]
    words += [shlex.quote(word) for word in shlex.split(shown(argv))]
    parts = list[str]()
    for word in map(plain, words):
        if parts and parts[-1].startswith("-") and not word.startswith("-"):
            parts[-1] += f" {word}"
        else:
            parts.append(word)
    return _packed(parts, page, "", wrapped=" \\")


def _packed(parts: Sequence[str], page: Page, joint: str, *, wrapped: str | None = None) -> list[str]:
    """As many parts on a line as there is room for, none of them cut in two; a line that goes on ends with `wrapped`."""
    end = joint if wrapped is None else wrapped
    lines = list(parts[:1])
    for part in parts[1:]:
        longer = f"{lines[-1]}{joint} {part}"
        if page.width is None or cells(longer) + len(end) <= page.width - INDENT:
            lines[-1] = longer
        else:
            lines[-1] += end
            lines.append(part)
    return lines


def _end(answer: Mapping[str, Any], page: Page) -> list[str]:
    lines = [""]
    for title, forbidden in (("not in it:", False), ("not in it, because the config does not allow it:", True)):
        outs = [out for out in answer["outs"] if bool(out["forbidden"]) is forbidden]
        lines += [f"    {title}"] * bool(outs)
        for out in outs:
            lines += [f"      {line}" for line in page.wrap(f"{out['what']}: {out['why']}", 6)]
    status = int(answer["status"])
    ended = (
        "what else could help is not allowed" if any(out["forbidden"] for out in answer["outs"]) else ENDS.get(status)
    )
    why = f": {ended}; systemd does not start it again" if ended else ""
    then = f"then: the daemon gives up with exit status {status}{why}"
    return lines + [f"    {line}" for line in page.wrap(then, 4)]
