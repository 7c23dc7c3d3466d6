from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mgpu_llm.adapters.engine.output import CUT_MARK, LAST_WORDS, LINE_BYTES, LINES_PER_S, Output, Tail
from mgpu_llm.core.events import LineRead, LinesDropped
from mgpu_llm.core.redaction import Redactor
from tests.support.engine_run import until


class Heard:
    """An Output on a pipe that the test writes to."""

    def __init__(self, redactor: Redactor | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.events: list[LineRead | LinesDropped] = []
        self.tail = Tail()
        self.output = Output(1, clock, self.events.append, self.tail, redactor)
        self.output.begin()

    def write(self, data: bytes) -> None:
        os.write(self.output.write_fd, data)

    @property
    def lines(self) -> list[str]:
        return [event.text for event in self.events if isinstance(event, LineRead)]

    @property
    def dropped(self) -> int:
        return sum(event.count for event in self.events if isinstance(event, LinesDropped))


def read_all(*writes: bytes) -> list[str]:
    async def story() -> list[str]:
        heard = Heard()
        for data in writes:
            heard.write(data)
        heard.output.close()
        return heard.lines

    return asyncio.run(story())


def test_lines_end_at_carriage_returns_as_well_as_newlines_and_empty_ones_are_left_out() -> None:
    assert read_all(b"\rshards: 1/3\n\r\n  \nbar 10%\rbar 20%\rdone\r\n") == [
        "shards: 1/3",
        "bar 10%",
        "bar 20%",
        "done",
    ]


def test_a_line_and_a_character_may_come_in_pieces() -> None:
    assert read_all(b"half a l", "ine: \u2588".encode()[:7], "\u2588".encode()[2:] + b"\n") == ["half a line: \u2588"]


def test_colours_and_titles_are_removed_and_broken_utf8_is_replaced() -> None:
    coloured = b"\x1b[1;36m(EngineCore pid=7)\x1b[0;0m INFO \x1b]0;title\x07ok \xff\n\x1b[0m\n"
    assert read_all(coloured) == ["(EngineCore pid=7) INFO ok \ufffd"]


def test_a_very_long_line_is_cut_and_marked_and_the_next_one_is_whole() -> None:
    expected = ["x" * LINE_BYTES + CUT_MARK, "next"]
    assert read_all(b"x" * (LINE_BYTES + 1) + b"\nnext\n") == expected
    assert read_all(b"x" * 200_000 + b"\nnext\n") == expected
    assert read_all(b"x" * LINE_BYTES + b"\n") == ["x" * LINE_BYTES]


def test_secrets_are_taken_out_before_anybody_sees_a_line() -> None:
    secret = b"non-default args: {'api_key': ['sk-abc'], '\x1b[1mhf_tok\x1b[0men': 'hf_x', 'port': 1}\nkey of mine\n"

    async def story() -> None:
        heard = Heard(Redactor(["key of mine"]))
        heard.write(secret)
        heard.output.close()
        assert heard.lines == ["non-default args: {'api_key': ..., 'hf_token': ..., 'port': 1}", "..."]
        assert heard.tail.last(9) == tuple(heard.lines)

    asyncio.run(story())


def test_a_line_without_an_end_is_handed_on_after_a_while_and_at_the_end_of_the_pipe() -> None:
    async def story() -> None:
        heard = Heard()
        heard.write(b"no end yet")
        await until("the unfinished line is handed on", lambda: heard.lines == ["no end yet"])
        heard.write(b", and more")
        heard.output.close_write_end()
        await until("the pipe's end hands on the rest", lambda: heard.lines == ["no end yet", ", and more"])
        heard.output.close()

    asyncio.run(story())


def test_a_line_that_only_trickles_is_handed_on_too() -> None:
    async def story() -> None:
        heard = Heard()
        deadline = time.monotonic() + 20
        while not heard.lines and time.monotonic() < deadline:
            heard.write(b".")
            await asyncio.sleep(0.05)
        assert set(heard.lines[0]) == {"."}
        heard.output.close()

    asyncio.run(story())


def test_the_tail_keeps_the_last_lines_within_its_lines_and_bytes() -> None:
    tail = Tail(max_lines=3, max_bytes=10)
    for line in ("one", "two", "three", "4"):
        tail.append(line)
    assert tail.last(10) == ("two", "three", "4")
    tail.append("eight ch")
    assert tail.last(10) == ("4", "eight ch")
    assert tail.last(1) == ("eight ch",)
    assert tail.last(0) == ()


def test_of_a_flood_everything_is_handed_on_or_counted_in_order_and_the_last_words_are_heard() -> None:
    async def story() -> None:
        heard = Heard()
        for start in range(0, 40_000, 4000):
            heard.write(b"".join(b"line %d\n" % number for number in range(start, start + 4000)))
            await asyncio.sleep(0)
        heard.write(b"the reason\n")
        heard.output.close()
        assert heard.dropped > 0
        assert len(heard.lines) + heard.dropped == 40_001
        numbers = [int(line.split()[1]) for line in heard.lines[:-1]]
        assert numbers == sorted(numbers)
        assert heard.lines[-2:] == ["line 39999", "the reason"]
        assert any(f"[{heard.dropped} lines dropped" in line for line in heard.tail.last(2000))

    asyncio.run(story())


def test_of_very_long_lines_fewer_are_handed_on_and_the_rest_is_counted() -> None:
    async def story() -> None:
        heard = Heard(clock=lambda: 0.0)
        for number in range(1000):
            heard.write(b"%d %s\n" % (number, b"x" * 8000))
            await asyncio.sleep(0)
        heard.output.close()
        assert len(heard.lines) == LINES_PER_S // 8 + LAST_WORDS
        assert len(heard.lines) + heard.dropped == 1000
        assert heard.lines[-1].startswith("999 ")

    asyncio.run(story())


def test_what_waits_after_a_flood_is_handed_on_while_the_engine_goes_on() -> None:
    async def story() -> None:
        heard = Heard()
        heard.write(b"".join(b"line %d\n" % number for number in range(20_000)))
        await until("the last line of the flood comes", lambda: "line 19999" in heard.lines)
        assert len(heard.lines) + heard.dropped == 20_000
        heard.output.close()

    asyncio.run(story())


def test_200_mb_as_fast_as_a_child_can_write_leave_memory_bounded_and_the_loop_responsive() -> None:
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, str(Path(__file__))],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["handed_on"] + seen["dropped"] == seen["printed"]
    assert seen["dropped"] > 0
    assert seen["grown_bytes"] < 64 << 20
    assert seen["longest_pause_s"] < 2


BLOCK = (
    b"worker 0 NCCL INFO some line of about one hundred characters, as the debug log of a collective has it.\n" * 650
)
BLOCKS = 200 * (1 << 20) // len(BLOCK)


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def read_flood() -> dict[str, float]:
    """In a process of its own: reads what another writes, and watches itself."""
    handed_on = dropped = 0

    def count(event: LineRead | LinesDropped) -> None:
        nonlocal handed_on, dropped
        if isinstance(event, LineRead):
            handed_on += 1
        else:
            dropped += event.count

    before = peak = rss_bytes()
    output = Output(1, time.monotonic, count, Tail())
    output.begin()
    code = "import os\nfor _ in range(%d):\n    view = memoryview(%r)\n    while view: view = view[os.write(1, view):]"
    started = time.monotonic()
    command = (sys.executable, "-S", "-c", code % (BLOCKS, BLOCK))
    child = await asyncio.create_subprocess_exec(*command, stdout=output.write_fd)
    output.close_write_end()
    longest_s, at = 0.0, time.monotonic()
    while child.returncode is None:
        await asyncio.sleep(0.002)
        longest_s, at = max(longest_s, time.monotonic() - at), time.monotonic()
        peak = max(peak, rss_bytes())
    took_s = time.monotonic() - started
    output.close()
    return {
        "printed": BLOCKS * 650,
        "handed_on": handed_on,
        "dropped": dropped,
        "grown_bytes": peak - before,
        "longest_pause_s": longest_s,
        "took_s": took_s,
    }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(read_flood())))


def test_what_is_kept_apart_is_without_secrets_and_neither_told_nor_in_the_tail() -> None:
    async def story() -> None:
        heard = Heard(Redactor(["planted-secret"]))
        heard.write(b"before\nunfinished")
        with heard.output.kept_apart(1000) as apart:
            heard.write(b'  File "/planted-secret/a.py", line 7\n\n')
            await until("it is read", lambda: bool(apart.lines))
            heard.write(b"the last, without an end")
        assert apart.lines == ['  File "/.../a.py", line 7', "the last, without an end"]
        heard.write(b"after\n")
        heard.output.close()
        assert heard.lines == ["before", "unfinished", "after"]
        assert heard.tail.last(9) == ("before", "unfinished", "after")

    asyncio.run(story())


def test_of_a_flood_that_is_kept_apart_the_beginning_is_kept() -> None:
    async def story() -> None:
        heard = Heard()
        with heard.output.kept_apart(1000) as apart:
            for number in range(10_000):
                heard.write(f"line {number:05d}\n".encode())
                await asyncio.sleep(0)
        assert len("".join(apart.lines)) < 1100
        assert apart.lines[0] == "line 00000"
        heard.output.close()
        assert heard.events == []

    asyncio.run(story())
