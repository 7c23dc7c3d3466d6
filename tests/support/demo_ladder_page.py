"""The page of `make demo-ladder`: docs/demo-ladder.md."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from statistics import median
from typing import Any, Final

from tests.support.toy_setup import ENGINE_PYTHON, ROOT, Setup
from tests.support.try_it import FOLDER

GOAL: Final = 1.10
WIDTH: Final = 118
#: Where things lie on this machine, and how the page calls it.
NEUTRAL: Final = {
    str(FOLDER): "/tmp/mgpu-llm",
    str(ENGINE_PYTHON.parents[1]): "/opt/vllm",
    str(ROOT): "/opt/mgpu-llm",
}
#: And what is another one in every run.
VARYING: Final = (
    (re.compile(r"\b\d+ \((VLLM::\w+|python)\)"), r"\1"),
    (re.compile(r"(VLLM::\w+|python) \(\d+(?:, \d+)*\)"), r"\1"),
    (re.compile(r"\bpid[ =]\d+(?:, | )?"), ""),
    (re.compile(r"vllm_dist_\w+"), "vllm_dist_..."),
)
LINE: Final = re.compile(
    r"(?P<time>\S+ \S+) \w+ (?P<told>(?:daemon\.started|rung\.\w+|stacks\.\w+"
    r"|engine\.(?:starting|suspected|stalled|crashed|died|evidence|ready|degraded))\b.*)"
)
#: Told by the screens too, and long.
LEFT_OUT: Final = re.compile(r' (?:advice|cost|incident|way_back)=(?:"(?:[^"\\]|\\.)*"|\S+)')


@dataclass(frozen=True, kw_only=True)
class Story:
    """The first start: what it said, its attempts as `mgpuctl status --json` has them, and the screens by their command."""

    said: str
    attempts: Sequence[Mapping[str, Any]]
    screens: Mapping[str, str]
    ready_s: float


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds to READY, a pair a round: of the second start, which said `said`, and of one that never failed."""

    again: Sequence[float]
    smooth: Sequence[float]
    said: str

    @property
    def ratio(self) -> float:
        return median(self.again) / median(self.smooth)


def journal(log: str) -> str:
    """Of a daemon's log its own lines of the story, each with the seconds since the first, and folded."""
    lines, begun = list[str](), None
    for match in filter(None, map(LINE.match, log.splitlines())):
        at = datetime.fromisoformat(match["time"])
        begun = begun or at
        words = neutral(LEFT_OUT.sub("", match["told"]))
        head = f"{(at - begun).seconds:>4} s  "
        lines += textwrap.wrap(
            words,
            WIDTH,
            initial_indent=head,
            subsequent_indent=" " * (len(head) + 2),
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines)


def neutral(text: str) -> str:
    """The text without what belongs to this machine or to this run alone."""
    for here, there in NEUTRAL.items():
        text = text.replace(here, there)
    for pattern, instead in VARYING:
        text = pattern.sub(instead, text)
    return text


def table(times: Times) -> str:
    """As Markdown."""
    rows = [(str(number), *pair) for number, pair in enumerate(zip(times.again, times.smooth, strict=True), start=1)]
    rows.append(("median", median(times.again), median(times.smooth)))
    return "\n".join(
        (
            "| round | second start | a start that never failed | ratio |",
            "|---|---|---|---|",
            *(f"| {name} | {one:.1f} s | {other:.1f} s | {one / other:.3f} |" for name, one, other in rows),
        )
    )


def page(setup: Setup, story: Story, times: Times) -> str:
    rows = (
        (str(one["number"]), f"`{one['rung']}`", one["outcome"], one["cause"], f"{one['duration_s']:.0f} s")
        for one in story.attempts
    )
    return PAGE.format(
        config=neutral(setup.toml(setup.runtime_dir)).strip(),
        attempts="\n".join(f"| {' | '.join(row)} |" for row in rows),
        ready_s=story.ready_s,
        said=story.said,
        screens="\n\n".join(f"```\n$ {command}\n{shown}\n```" for command, shown in story.screens.items()),
        said_again=times.said,
        table=table(times),
        cores=os.cpu_count(),
        ratio=times.ratio,
        goal=GOAL,
    )


PAGE: Final = """\
# Three faults, three rungs

Written by `make demo-ladder`. The real vLLM for CPU serves a toy model over two ranks on {cores} cores, and is broken on purpose
by a plugin (`tests/support/fault_plugin`). The daemon knows nothing of that: it sees the engine's log, its processes and where
their threads stand, as it would on GPUs.

| fault | what it is like | goes away with |
|---|---|---|
| `p2p-hang` | PCIe ACS or an IOMMU drops what one GPU writes to another: every rank spins in the first collective | \
`NCCL_P2P_DISABLE=1` |
| `exit-in-capture` | graphs do not fit beside the KV cache: CUDA out of memory in warm-up | `--enforce-eager` |
| `broken-gpu` | the second GPU has a memory error that it cannot correct, which shows once the model has run | one GPU |

All three are there from the beginning, and none can be seen before the one above it is cured. There is no fixed order in which
settings are changed: each attempt is answered by what its own cause asks for, on top of what has been changed already.

| attempt | rung | outcome | cause | lasted, or serves after |
|---|---|---|---|---|
{attempts}

It served {ready_s:.0f} s after the daemon was started. The hang was answered by peer-to-peer off; out of memory by no graphs (on
GPUs less memory utilisation comes first: on CPU there is none to lower); the broken GPU by doing without it.

## The config
```toml
{config}
```

## What it said
Its own lines only; on the left the seconds since its start. Left out: the engine's lines, process ids, and what the screens below
tell too (advice, costs, the way back).

```
{said}
```

## What an operator sees
{screens}

## The second start
The rung is kept in `known-good.json` in the state folder. The same daemon started again, all three faults still there:

```
{said_again}
```

Beside it, in turn, a daemon with an empty state folder, no fault, and the same settings in its config from the beginning. Seconds
from the start of `mgpud` to its READY=1:

{table}

By the medians the second start takes {ratio:.3f} times as long as one that never failed; it is to be {goal:.2f} at most.
"""
