"""What the processes of the fake engine have in common: their words, and the time to say them."""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.support.fake_engine_scenario import STOPS, Scenario

DATA = Path(__file__).resolve().parents[1] / "data" / "fake_engine"
LOGS = {"cuda": "vllm-0.26-cuda.log", "cpu": "vllm-0.32-cpu.log"}
MB = 1 << 20


class Line(NamedTuple):
    at_s: float
    who: str
    name: str
    text: str


class Setup(NamedTuple):
    """`turns` is shared by all processes: the number of the line whose turn it is, so that all keep the script's order."""

    args: argparse.Namespace
    scenario: Scenario
    started: float
    turns: mmap.mmap


def script(log: str, model: str) -> list[Line]:
    rows = (line.split("\t", 3) for line in (DATA / LOGS[log]).read_text().splitlines())
    return [Line(float(at_s), who, name, text.replace("{model}", model)) for at_s, who, name, text in rows]


def name_process(name: str) -> None:
    ctypes.CDLL(None).prctl(15, name.encode(), 0, 0, 0)  # PR_SET_NAME


class Process:
    """One process of the tree: prints its own lines when their time has come."""

    name = "-"

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.args = setup.args
        self.scenario = setup.scenario
        self.faults = setup.scenario.faults
        lines = script(setup.scenario.options["log"], setup.args.model)
        self.script = [line for line in lines if line.who != "w1" or setup.args.tensor_parallel_size > 1]
        self.scale = float(setup.scenario.options["load_s"]) / self.script[-1].at_s
        self.stop_s = self._stop_s()
        self.loaded: list[bytes] = []

    def _stop_s(self) -> float:
        """When nothing goes on any more, in seconds of the script; infinity in a load that comes to its end."""
        if not self.scenario.stop:
            return float("inf")
        texts = STOPS[self.scenario.stop]
        return next((line.at_s for text in texts for line in self.script if text in line.text), -1.0)

    def on_sigterm(self, action: Callable[[], None]) -> None:
        ignored = "ignore-sigterm" in self.faults
        signal.signal(signal.SIGTERM, signal.SIG_IGN if ignored else lambda _number, _frame: action())

    def say(self, text: str, name: str | None = None) -> None:
        """One write a line, so that the lines of the processes do not mix. Bars begin or end with a carriage return."""
        name = self.name if name is None else name
        prefix = "" if name == "-" else f"({name} pid={os.getpid()}) "
        before = "\r" if text.startswith("Loading safetensors") else ""
        after = "\r" if text.startswith("Capturing") else "\n"
        os.write(1, f"{before}{prefix}{text.replace('{pid}', str(os.getpid()))}{after}".encode())

    def load(self, who: str, tick: Callable[[], None]) -> bool:
        """Goes through its part of the script; False when the scenario stops it on the way."""
        for number, line in enumerate(self.script):
            if line.at_s > self.stop_s:
                self.wait_for(number, self.stop_s, tick)
                return False
            if line.who == who:
                self.wait_for(number, line.at_s, tick)
                self.say(line.text, line.name)
                self.setup.turns[:4] = (number + 1).to_bytes(4, "little")
                if who.startswith("w") and ("shards" in line.text or "Model loading" in line.text):
                    self.read_weights()
        self.wait_for(len(self.script), self.script[-1].at_s, tick)
        return True

    def wait_for(self, number: int, at_s: float, tick: Callable[[], None]) -> None:
        """Until it is `at_s` in the script, and everything before line `number` has been said."""
        while (left_s := self.setup.started + at_s * self.scale - time.monotonic()) > 0:
            tick()
            time.sleep(min(left_s, 0.05))
        while int.from_bytes(self.setup.turns[:4], "little") < number:
            tick()
            time.sleep(0.002)

    def read_weights(self) -> None:
        with Path(sys.executable).resolve().open("rb") as file:
            self.loaded.append(file.read(4 * MB))
        self.loaded.append(os.urandom(MB) * 4)
