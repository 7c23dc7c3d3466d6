"""What each signal does in engines that hang, and how long each alone stands still in engines that load.

    .venv/bin/python -m tests.bench.noise

Over the recorded starts: the noise is the most that a signal has changed within one window while nothing moved any more (from
three seconds after the last progress); the floor must lie above it. The quiet is the longest that a healthy start went
without that signal: the reason why no signal is enough by itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Final

from mgpu_llm.core import progress, recording, signals
from mgpu_llm.core.events import Event, GpusSampled, LineRead, ProcessesSampled
from mgpu_llm.core.progress import Progress
from tests.bench.heartbeat import Start, starts

SETTLED_S: Final = 3.0
#: Signals that have no floor: any of it counts.
COUNTED: Final = ("log", "phase", "processes", "bar")


def beats(start: Start) -> Iterator[tuple[Event, Progress]]:
    """The heartbeat after each event that feeds it."""
    heart = progress.begin(0.0)
    for event in recording.events(start.recorded):
        match event:
            case LineRead():
                heart = progress.after_line(heart, event)
            case ProcessesSampled():
                heart = progress.after_processes(heart, event)
            case GpusSampled():
                heart = progress.after_gpus(heart, event)
            case _:
                continue
        yield event, heart


def noise(start: Start) -> dict[str, float]:
    """By signal, the most that it changed within one window once the engine hung."""
    points = defaultdict[str, list[tuple[float, float]]](list)
    for event, heart in beats(start):
        if event.at < start.last_progress_s + SETTLED_S:
            continue
        if isinstance(event, ProcessesSampled):
            for signal, total in heart.totals.items():
                points[signal].append((event.at, total))
        if isinstance(event, GpusSampled):
            for gpu in event.gpus:
                points[f"gpu_memory {gpu.uuid}"].append((event.at, float(gpu.used_bytes)))
    most = defaultdict[str, float](float)
    for signal, values in points.items():
        name = signal.split(" ", 1)[0]
        for at, value in values:
            within = [other for then, other in values if 0 <= at - then <= signals.WINDOW_S]
            most[name] = max(most[name], max(within) - min(within), abs(value - within[0]))
    return most


def quiet(start: Start) -> dict[str, float]:
    """By signal, the longest time that a healthy start went without it, after it had moved once."""
    longest, last = defaultdict[str, float](float), dict[str, float]()
    for event, heart in beats(start):
        for signal, at in heart.moved.items():
            longest[signal] = max(longest[signal], event.at - last.get(signal, event.at))
            last[signal] = at
    for signal, at in last.items():
        longest[signal] = max(longest[signal], start.recorded.ended_at - at)
    longest["all together"] = max(heart.longest_quiet.values(), default=0.0)
    return longest


def main() -> None:
    corpus = starts()
    noises = [noise(start) for start in corpus if start.truth == "stalled"]
    quiets = [quiet(start) for start in corpus if start.truth == "healthy"]
    print("| signal | floor | most in 5 s of a hang | longest healthy time without it |\n|---|---|---|---|")
    for signal in (*signals.NOISE_FLOOR, *COUNTED, "all together"):
        floor = f"{signals.NOISE_FLOOR[signal]:,g}" if signal in signals.NOISE_FLOOR else ""
        most = f"{max((found.get(signal, 0.0) for found in noises), default=0.0):,g}" if floor else ""
        without = max((found.get(signal, 0.0) for found in quiets), default=0.0)
        print(f"| {signal} | {floor} | {most} | {without:.1f} s |")


if __name__ == "__main__":
    main()
