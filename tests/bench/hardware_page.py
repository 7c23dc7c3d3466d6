"""docs/hardware.md from the results of the hardware bench."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from tests.bench.hardware_goals import (
    ALONE,
    OFF,
    OVERLAP,
    Life,
    Setting,
    failed,
    goals,
    kills,
    left_by,
    settings,
    unrun,
)

OTHERS: Final = {
    "p2p-hang-again": "Peer-to-peer broken, and a second start that remembers",
    "custom-all-reduce-hang": "vLLM's own all-reduce hangs in warm-up",
    "taken": "Another process holds 30 GB of a GPU",
    "worker-killed": "A worker is killed in the weights",
}
SERIES: Final = ("healthy", "p2p-hang", *OTHERS, "seed")
WHO: Final = {ALONE: "vLLM alone", OVERLAP: "mgpud, GPUs checked beside the load", OFF: "mgpud, GPUs not checked"}
MET: Final = {True: "yes", False: "**no**", None: ""}
WIDTH: Final = 240
#: Of which every goal says that it was not run.
NOTHING: Final = Setting(label="", head={}, files=(), lives=())

INTRO: Final = """\
# On real hardware

`python3 -m tests.bench.hardware` measures this on whatever GPUs it is given, and the same with
`--page tests/data/hardware/*.json --write docs/hardware.md` has made this page of its results. Faults are put into the
unmodified vLLM by a plugin (`tests/support/fault_plugin_cuda`); the daemon knows nothing of that. Seconds count from the start
of the program to its first completion, on the bench's own clock, which asks vLLM alone as often as the daemon does.
"""


def page(files: Mapping[str, Mapping[str, Any]]) -> str:
    """The whole page. `files` are the results by the name of their file."""
    every = settings(files)
    parts = [INTRO, *_goals(every), *_grounds(every), *_healthy(every), *_hang(every), *_kills(every)]
    parts += [*_others(every), *_left(every), *_seed(every), *_not_run(files, every)]
    return "\n".join(parts) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table of Markdown, and an empty line."""
    lines = [head, ["---"] * len(head), *rows]
    return [*(f"| {' | '.join(_cell(text) for text in row)} |" for row in lines), ""]


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} s"


def _goals(every: Sequence[Setting]) -> Iterator[str]:
    yield "## What it is to reach, and what was measured"
    # A rehearsal proves that the bench works, and nothing about GPUs.
    real = [one for one in every if one.head["hardware"]["gpus"]] or [NOTHING]
    rows = [[one.label, goal.goal, goal.measured, MET[goal.met]] for one in real for goal in goals(one)]
    yield from table(["on", "goal", "measured", "met"], rows)


def _grounds(every: Sequence[Setting]) -> Iterator[str]:
    yield "## On what"
    rows = []
    for one in every:
        host, model = one.head["hardware"], one.head["model"]
        nvlink = {True: ", NVLink", False: ", no NVLink", None: ""}[host["nvlink"]]
        gpus = ", ".join(
            f"{name} ({size / 1e9:.0f} GB)" for name, size in zip(host["gpus"], host["gpu_bytes"], strict=True)
        )
        versions = f"vLLM {host['vllm']}, torch {host['torch']}, NCCL {host['nccl'] or 'none'}"
        driver = f", driver {host['driver']}, CUDA {host['cuda']}" if host["driver"] else ""
        size = f"{model['bytes'] / 1e9:.1f} GB of weights" if model["bytes"] else "no weights"
        where = f"{gpus or 'no GPU: a rehearsal on CPU, without anything that could be checked'}{nvlink}{driver}"
        machine = f"{host['cpus']} CPUs, {host['ram_bytes'] / 1e9:.0f} GB"
        engine = f"{model['name']}, {size}, TP={one.head['tensor_parallel']}, `{' '.join(one.head['arguments'])}`"
        rows.append([one.label, where, machine, versions, engine, host["date"]])
    head = ["", "GPUs", "host", "versions", "model and arguments", "UTC"]
    yield from table(head, rows) if rows else ["Not run.\n"]


def checks(lives: Sequence[Life]) -> str:
    """How the checks of the GPUs went, as the daemon said it: "3 passed"; "" without any."""
    said = [line.partition("preflight.")[2].split(" ", 1)[0] for life in lives for line in life.get("journal", ())]
    return ", ".join(f"{many} {how}" for how, many in Counter(filter(None, said)).items())


def _healthy(every: Sequence[Setting]) -> Iterator[str]:
    yield "## Healthy starts"
    rows = []
    for one in every:
        for kind in (ALONE, OVERLAP, OFF):
            found = one.of("healthy", kind)
            each = ", ".join("not up" if life["ready_s"] is None else f"{life['ready_s']:.1f}" for life in found)
            median, alone = one.median(kind), one.median(ALONE)
            ratio = f"{median / alone:.3f}" if median is not None and alone is not None else ""
            if found:
                rows.append([one.label, WHO[kind], f"{each} s", seconds(median), ratio, checks(found)])
    if rows:
        yield "In turn on the same host, each pair the other way round than the one before; warm-up starts are not counted.\n"
    yield from (
        table(["on", "who", "each", "median", "to vLLM alone", "checks of the GPUs"], rows) if rows else ["Not run.\n"]
    )


def _story(life: Life) -> str:
    attempts = [
        f"{one['rung']}: {one['outcome']}" + (f" ({one['cause']})" if one["cause"] else "")
        for one in life.get("attempts", ())
    ]
    return "; ".join(attempts)


def _came(life: Life) -> str:
    if life["ready_s"] is not None:
        return f"after {life['ready_s']:.1f} s"
    if life["kind"] == ALONE:
        return f"not up after {life['waited_s']:.0f} s"
    return f"gave up, exit status {life['exit_status']}" if life.get("gave_up") else f"not within {life['limit_s']} s"


def _hang(every: Sequence[Setting]) -> Iterator[str]:
    yield "## Peer-to-peer broken"
    rows = []
    for one in every:
        for life in one.of("p2p-hang"):
            later = None if life["ready_s"] is None or one.healthy_s is None else life["ready_s"] - one.healthy_s
            verdict, many = seconds(life.get("first_verdict_s")), str(failed(life)) if "attempts" in life else ""
            rows.append([one.label, WHO[life["kind"]], verdict, many, _story(life), _came(life), seconds(later)])
    head = ["on", "who", "first verdict", "failed", "attempts", "READY", "later than healthy"]
    yield from table(head, rows) if rows else ["Not run.\n"]


def _kills(every: Sequence[Setting]) -> Iterator[str]:
    yield "## From SIGKILL to clean GPUs"
    rows = [
        [
            one.label,
            life["name"],
            kill["verdict"].split(" ", 1)[0],
            seconds(kill["verdict_s"]),
            "not seen" if kill["clean_s"] is None else f"{kill['clean_s']:.2f} s",
            seconds(kill["next_start_s"]),
        ]
        for one in every
        for life, kill in kills(one)
    ]
    if rows:
        yield (
            "Looked at twenty times a second from outside: from the last look at which the whole engine lived until none of it"
            " does and the GPUs hold what they held before (NVML, within 256 MiB).\n"
        )
    head = ["on", "life", "verdict", "at", "clean after", "next attempt after the verdict"]
    yield from table(head, rows) if rows else ["Not run.\n"]


def _others(every: Sequence[Setting]) -> Iterator[str]:
    for name, title in OTHERS.items():
        yield f"## {title}"
        rows = [
            [one.label, _story(life), _came(life), left_by(life) or "nothing"] for one in every for life in one.of(name)
        ]
        notes = [f"{one.label}: {note['text']}\n" for one in every for note in one.notes if note["series"] == name]
        yield from notes
        yield from table(["on", "attempts", "READY", "left"], rows) if rows else ["Not run.\n"]


def _left(every: Sequence[Setting]) -> Iterator[str]:
    yield "## What was left behind"
    rows = [
        [one.label, life["name"], WHO[life["kind"]], left_by(life)]
        for one in every
        for life in one.lives
        if left_by(life)
    ]
    many = sum(len(one.lives) for one in every)
    if not many:
        yield "Not run.\n"
        return
    yield f"Counted after each of {many} lives: processes, GPU memory against before, files in /dev/shm.\n"
    yield from table(["on", "life", "who", "left"], rows) if rows else ["Nothing was left by any of them.\n"]


def _seed(every: Sequence[Setting]) -> Iterator[str]:
    yield "## The case that this project began with"
    found = [(one, life) for one in every for life in one.of("seed")]
    if not found:
        yield "Not run.\n"
    for one, life in found:
        yield f"On {one.label}, utilisation 0.95, peer-to-peer broken: READY {_came(life)}. What the daemon said:\n"
        yield from _block(line for line in life["journal"] if " debug " not in line[:16])
        for screen in life["screens"]:
            yield f"`{screen['command']}` after {screen['at_s']:.0f} s:\n"
            yield from _block(screen["text"].splitlines())


def _block(lines: Iterator[str] | Sequence[str]) -> list[str]:
    return ["```", *(line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..." for line in lines), "```", ""]


def _not_run(files: Mapping[str, Mapping[str, Any]], every: Sequence[Setting]) -> Iterator[str]:
    yield "## Not run"
    lines = [f"- {name}: in none of the files" for name in unrun(SERIES, every)]
    for name, document in files.items():
        for row in document["not_run"]:
            what = " ".join(filter(None, [row["series"], WHO.get(row["kind"], row["kind"]), row["fault"]]))
            lines.append(f"- {name}: {what}: {row['why']}")
    yield "\n".join(lines or ["All of it was."])
    if files:
        yield "\n## Commands"
    yield "\n".join(f"- {name}: `{document['command']}`" for name, document in files.items())
