"""What the hardware bench is to reach, and whether its results do: from results.json to rows of (goal, measured, met)."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

from mgpu_llm.core.fit import CUDA_PART, GIB, fits
from tests.bench.fit import SHAPE, needed

ALONE: Final = "alone"
OVERLAP: Final = "mgpud-overlap"
OFF: Final = "mgpud-off"
RATIO: Final = 1.02
LATER_S: Final = 20.0
CLEAN_S: Final = 2.0
ALONE_S: Final = 300.0
WEIGHTS_OFF: Final = 0.03
TOKENS_OFF: Final = 0.10
#: Healthy starts of each kind, of which the median says something.
STARTS: Final = 3
#: From the begin of one run to that of the next one on the same machine.
SOON: Final = timedelta(hours=1)
NOT_RUN: Final = "not run"

Life = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """All lives on the same GPUs with the same model and arguments, of one run of the bench or of several."""

    label: str
    head: Mapping[str, Any]
    files: tuple[str, ...]
    lives: tuple[Life, ...]
    notes: tuple[Mapping[str, str], ...] = ()

    def of(self, series: str, kind: str = "") -> list[Life]:
        """Those that count, in the order in which they were run."""
        return [
            life for life in self.lives if life["series"] == series and kind in ("", life["kind"]) and life["counts"]
        ]

    def median(self, kind: str) -> float | None:
        """Seconds of a healthy start until it serves; None where none was run, or one did not serve."""
        found = [life["ready_s"] for life in self.of("healthy", kind)]
        return None if not found or None in found else statistics.median(found)

    @property
    def healthy_s(self) -> float | None:
        """Against which lateness is told: under mgpud, or else alone."""
        found = (self.median(kind) for kind in (OVERLAP, OFF, ALONE))
        return next((seconds for seconds in found if seconds is not None), None)


def settings(files: Mapping[str, Mapping[str, Any]]) -> list[Setting]:
    """The results of each file by its name, put together where they can be compared: on the same, and one soon after the other,
    as what is lent later may be another machine of the same kind."""
    groups, last = dict[tuple[str, int], list[str]](), dict[str, tuple[datetime, int]]()
    for name, document in sorted(files.items(), key=lambda file: (file[1]["hardware"]["date"], file[0])):
        host, model = document["hardware"], document["model"]
        alike = repr((host["gpus"], host["vllm"], model, document["arguments"], document["tensor_parallel"]))
        begun = datetime.fromisoformat(host["date"])
        before, number = last.get(alike, (begun, 0))
        last[alike] = begun, number + (begun - before > SOON)
        groups.setdefault((alike, last[alike][1]), []).append(name)
    return [
        Setting(
            label=chr(ord("A") + number),
            head=files[names[0]],
            files=tuple(names),
            lives=tuple(life for name in names for life in files[name]["lives"]),
            notes=tuple(note for name in names for note in files[name]["notes"]),
        )
        for number, names in enumerate(groups.values())
    ]


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One goal beside what was measured. `met` is None where it was not run."""

    goal: str
    measured: str
    met: bool | None


def goals(setting: Setting) -> list[Goal]:
    """All of them, those that were not run included."""
    return [*_healthy(setting), *_hang(setting), _clean(setting), _alone(setting), *_fit(setting), _left(setting)]


def _goal(goal: str, measured: str | None, met: bool = False) -> Goal:
    return (
        Goal(goal=goal, measured=NOT_RUN, met=None) if measured is None else Goal(goal=goal, measured=measured, met=met)
    )


def _healthy(setting: Setting) -> Iterator[Goal]:
    goal = f"a healthy start under mgpud takes at most {RATIO} times as long as vLLM alone (medians)"
    alone_s, ours_s = setting.median(ALONE), setting.median(OVERLAP)
    if not setting.of("healthy", ALONE) or not setting.of("healthy", OVERLAP):
        yield _goal(goal, None)
    elif alone_s is None or ours_s is None:
        yield _goal(goal, "a healthy start did not serve")
    else:
        count = min(len(setting.of("healthy", kind)) for kind in (ALONE, OVERLAP))
        told = f"{ours_s / alone_s:.3f} ({ours_s:.1f} s against {alone_s:.1f} s, {count} of each)"
        if count < STARTS:
            yield Goal(goal=goal, measured=f"{told}; {STARTS} are asked", met=None)
        else:
            yield _goal(goal, told, ours_s / alone_s <= RATIO)


def failed(life: Life) -> int:
    """How many attempts came to nothing."""
    return sum(attempt["outcome"] not in ("ready", "running", "stopped") for attempt in life["attempts"])


def _hang(setting: Setting) -> Iterator[Goal]:
    healthy_s = setting.healthy_s
    for kind, goal in (
        (OVERLAP, f"peer-to-peer broken, GPUs checked: READY at most {LATER_S:g} s later than a healthy start"),
        (OFF, f"not checked: one failed attempt at most, and READY at most its time and {LATER_S:g} s later"),
    ):
        found = setting.of("p2p-hang", kind)
        if not found:
            yield _goal(goal, None)
        for life in found:
            lost_s = 0.0 if kind == OVERLAP else (life["first_verdict_s"] or 0.0)
            sound = kind == OVERLAP or failed(life) <= 1
            yield _late(goal, life, None if healthy_s is None else healthy_s + lost_s + LATER_S, sound=sound)


def _late(goal: str, life: Life, latest_s: float | None, *, sound: bool) -> Goal:
    """Whether it served after `latest_s` at the latest; a life that was cut off before that does not say."""
    if life["ready_s"] is None:
        cut_off = sound and (latest_s is None or life["limit_s"] < latest_s)
        told = f"not READY within {life['limit_s']} s"
        return Goal(goal=goal, measured=f"{told}, and then cut off", met=None) if cut_off else _goal(goal, told)
    told = f"READY after {life['ready_s']:.1f} s on {life['rung']}, {failed(life)} failed"
    if latest_s is None:
        return Goal(goal=goal, measured=f"{told}; no healthy start to compare with", met=None)
    return _goal(goal, f"{told}; {latest_s:.1f} s would do", sound and life["ready_s"] <= latest_s)


def kills(setting: Setting) -> list[tuple[Life, Mapping[str, Any]]]:
    """Each failed attempt that had to be cleared away, with its life."""
    return [(life, kill) for life in setting.lives for kill in life.get("kills", ())]


def _clean(setting: Setting) -> Goal:
    found = [kill["clean_s"] for _, kill in kills(setting)]
    seen = [seconds for seconds in found if seconds is not None]
    goal = f"from SIGKILL to clean GPUs less than {CLEAN_S:g} s"
    if not found:
        return _goal(goal, None)
    told = f"{max(seen):.2f} s at most, of {len(found)} kills" if seen else f"never seen, of {len(found)} kills"
    unseen = len(found) - len(seen)
    told += f"; {unseen} not seen to become clean" if unseen and seen else ""
    return _goal(goal, told, not unseen and max(seen) < CLEAN_S)


def _alone(setting: Setting) -> Goal:
    goal = f"vLLM alone, peer-to-peer broken, is not up after {ALONE_S:g} s (what this is all about)"
    found = setting.of("p2p-hang", ALONE)
    if not found:
        return _goal(goal, None)
    life = found[-1]
    if life["ready_s"] is not None:
        return _goal(goal, f"it was up after {life['ready_s']:.1f} s")
    if life["exit_status"] is not None:
        return _goal(goal, f"it ended with {life['exit_status']} after {life['waited_s']:.0f} s")
    return _goal(goal, f"not up after {life['waited_s']:.0f} s, then killed", life["waited_s"] >= ALONE_S)


@dataclass(frozen=True, kw_only=True)
class Foreseen:
    """Weights (GiB on a rank) and tokens of the KV cache as foreseen and as vLLM said; None is not known."""

    weights_gib: float
    weights_said: float
    tokens: float | None
    tokens_said: float | None


def foreseen(setting: Setting) -> Foreseen | None:
    """For the first life in which vLLM told of its weights, healthy ones first; None where there is none, or no shape."""
    lives = [*setting.of("healthy"), *setting.lives]
    first = next((life for life in lives if life["memory"].get("weights_gib")), None)
    if first is None:
        return None
    config = setting.head["model"]["config"]
    if not all(key in config for key in SHAPE) or not setting.head["hardware"]["gpus"]:
        return None
    told = first["memory"]
    need = needed(",".join(str(config[key]) for key in SHAPE)).need
    ranks = setting.head["tensor_parallel"]
    weights = need.weights.on(ranks, need.pipeline_parallel, need.heads) / GIB
    total = _last(told, "total_gib")
    tokens = None if total is None else fits(need, ranks, first["utilisation"], round(total * GIB / CUDA_PART)).tokens
    return Foreseen(
        weights_gib=weights,
        weights_said=told["weights_gib"][-1],
        tokens=tokens,
        tokens_said=_last(told, "kv_tokens"),
    )


def _last(told: Mapping[str, Sequence[float]], what: str) -> float | None:
    found = told.get(what, ())
    return found[-1] if found else None


def _fit(setting: Setting) -> Iterator[Goal]:
    weights, tokens = f"weights as foreseen within {WEIGHTS_OFF:.0%}", f"KV tokens as foreseen within {TOKENS_OFF:.0%}"
    found = foreseen(setting)
    if found is None:
        yield from (_goal(weights, None), _goal(tokens, None))
        return
    off = found.weights_gib / found.weights_said - 1
    yield _goal(
        weights, f"{off:+.2%}: {found.weights_gib:.2f} GiB, said {found.weights_said:.2f}", abs(off) <= WEIGHTS_OFF
    )
    if found.tokens is None or found.tokens_said is None:
        yield _goal(tokens, None)
        return
    off = found.tokens / found.tokens_said - 1
    yield _goal(tokens, f"{off:+.2%}: {found.tokens:,.0f}, said {found.tokens_said:,.0f}", abs(off) <= TOKENS_OFF)


def left_by(life: Life) -> str:
    """What a life left behind, "" for nothing. Memory counts from 256 MiB a GPU on: a CUDA context has more."""
    left = life["left"]
    parts = [*left["processes"], *(f"/dev/shm/{name}" for name in left["shm"])]
    parts += [f"{extra / GIB:.1f} GiB of a GPU" for extra in left["gpu_bytes"] if extra > 256 << 20]
    parts += ["what the GPUs hold could not be read"] if left["gpu_unread"] else []
    return ", ".join(parts)


def _left(setting: Setting) -> Goal:
    goal = "mgpud leaves nothing: no process, no GPU memory, no file in /dev/shm"
    found = [life for life in setting.lives if life["kind"] != ALONE]
    if not found:
        return _goal(goal, None)
    dirty = [life["name"] for life in found if left_by(life)]
    return _goal(goal, f"{len(found) - len(dirty)} of {len(found)} lives left nothing", not dirty)


def unrun(names: Iterable[str], every: Sequence[Setting]) -> list[str]:
    """The series of which no life is there at all."""
    return [name for name in names if not any(setting.of(name) for setting in every)]
