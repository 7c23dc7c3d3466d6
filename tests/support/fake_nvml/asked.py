"""The other end of tests.support.fake_nvml.ask: the GPU adapter in a process of its own, asked line by line."""

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
PATIENCE_S = 60  # only how long a failing test waits: a passing one never does
FOREVER_S = 3600  # a deadline that no test lives to see


def uuid(index: int) -> str:
    """The UUID that the fake driver gives GPU `index` where the test gives none."""
    return f"GPU-a000000{index:x}-0000-4000-8000-{index:012x}"


class Asked:
    """A process of tests.support.fake_nvml.ask. Answers come by id, in whatever order they are given."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._ids = 0
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._answers: dict[int, dict[str, Any]] = {}
        threading.Thread(target=self._collect, daemon=True).start()

    def _collect(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)

    def send(self, ask: str, **request: object) -> int:
        assert self.process.stdin is not None
        self._ids += 1
        print(json.dumps({"id": self._ids, "ask": ask, **request}), file=self.process.stdin, flush=True)
        return self._ids

    def receive(self, request: int) -> dict[str, Any]:
        while request not in self._answers:
            said = json.loads(self._lines.get(timeout=PATIENCE_S))
            self._answers[said.pop("id")] = said
        return self._answers.pop(request)

    def inventory(self) -> dict[str, Any]:
        return self.receive(self.send("inventory", deadline_s=FOREVER_S))

    def read(self, *uuids: str, deadline_s: float = FOREVER_S) -> dict[str, Any]:
        return self.receive(self.send("read", uuids=uuids, deadline_s=deadline_s))

    def health(self, *uuids: str) -> dict[str, Any]:
        return self.receive(self.send("health", uuids=uuids, deadline_s=FOREVER_S))

    def details(self, deadline_s: float = FOREVER_S) -> dict[str, Any]:
        return self.receive(self.send("details", deadline_s=deadline_s))

    def nvlinked(self, *uuids: str) -> dict[str, Any]:
        """Pairs as lists, in order of their UUIDs."""
        return self.receive(self.send("nvlinked", uuids=uuids, deadline_s=FOREVER_S))

    def reading(self) -> dict[str, Any]:
        (reading,) = self.read(uuid(0))["answer"]
        assert isinstance(reading, dict)
        return reading


@contextmanager
def asking(environment: dict[str, str]) -> Iterator[Asked]:
    with subprocess.Popen(
        [sys.executable, "-m", "tests.support.fake_nvml.ask"],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": f"{ROOT / 'daemon'}:{ROOT}", **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Asked(process)
        finally:
            process.kill()
