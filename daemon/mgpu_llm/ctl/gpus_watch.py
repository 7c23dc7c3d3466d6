"""mgpuctl gpus --watch: its page drawn anew each two seconds, until Ctrl-C."""

from __future__ import annotations

from mgpu_llm.ctl.client import Client, Failure
from mgpu_llm.ctl.gpus import lines_now
from mgpu_llm.ctl.watch import watch
from mgpu_llm.ctl.words import page, plain

#: A look is some hundred questions to the driver; and a mgpud of its own where no daemon runs.
EVERY_S = 2.0


def watch_gpus(client: Client) -> int:
    """Survives the daemon: while none answers, mgpud is asked. Behind a pipe, page after page."""

    def look(_width: int, _height: int) -> tuple[list[str], bool]:
        return lines_now(client, page()), False

    def show() -> None:
        try:
            lines = lines_now(client, page())
        except Failure as failure:
            lines = [f"mgpuctl: {plain(failure.message)}"]
        print("\n".join([*lines, ""]), flush=True)

    return watch(look, show, every_s=EVERY_S, verb="gpus")
