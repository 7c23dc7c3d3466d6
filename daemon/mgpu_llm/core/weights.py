"""How much of the weights is in, how fast more comes, and how long the rest will take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from mgpu_llm.core.status import Count

#: The rate is taken over so long: shorter, and a disk's caches make it jump; longer, and a change is seen late.
RATE_OVER_S: Final = 30.0
#: Points of the rate's window lie at least so far apart.
POINT_EVERY_S: Final = 2.0
#: What bytes alone say never reaches the end: other reads are among them, so only the last shard ends the weights.
ALMOST: Final = 0.99


@dataclass(frozen=True, kw_only=True)
class Loading:
    """The weights since they began to come. `read_from` and `held_from` are the totals at that moment of bytes read from
    storage and of bytes on the GPUs; `points` are (at, bytes that are in) over the last RATE_OVER_S, oldest first."""

    read_from: float
    held_from: float
    points: tuple[tuple[float, float], ...] = ()


def begin(totals: Mapping[str, float], held: float) -> Loading:
    """The weights begin to come now."""
    return Loading(read_from=totals.get("read_bytes", 0.0), held_from=held)


def after_sample(
    loading: Loading, totals: Mapping[str, float], held: float, shards: Count | None, total_bytes: int, at: float
) -> Loading:
    """Fold in what has been read and what the GPUs hold by now. `total_bytes` is the size of the model's files.

    The ranks read the same files through one page cache, so the sum of what all have read from storage is at most the
    files; the GPUs together hold them once. Whichever says most is nearest: a cached file is not read, and weights on
    their way are not yet on a GPU.
    """
    read = totals.get("read_bytes", 0.0) - loading.read_from
    counted = shards.done / shards.total * total_bytes if shards is not None and shards.total else 0.0
    by_bytes = min(max(read, held - loading.held_from, 0.0), ALMOST * total_bytes)
    now = max(counted, by_bytes, loading.points[-1][1] if loading.points else 0.0)
    points = loading.points
    if not points or at - points[-1][0] >= POINT_EVERY_S:
        points = (*(point for point in points if at - point[0] <= RATE_OVER_S), (at, now))
    return replace(loading, points=points)


def percent(loading: Loading, total_bytes: int) -> float | None:
    """How much of the weights is in; None while nothing is known."""
    return 100.0 * min(loading.points[-1][1] / total_bytes, 1.0) if loading.points and total_bytes else None


def bytes_per_s(loading: Loading) -> float | None:
    """The present rate; None until there are two points to take it from."""
    if len(loading.points) < 2:
        return None
    (began, first), (ended, last) = loading.points[0], loading.points[-1]
    return (last - first) / (ended - began) if ended > began else None


def left_s(loading: Loading, total_bytes: int) -> float | None:
    """Seconds until all weights are in at the present rate; None where nothing comes or nothing is known."""
    rate = bytes_per_s(loading)
    return (total_bytes - loading.points[-1][1]) / rate if rate else None
