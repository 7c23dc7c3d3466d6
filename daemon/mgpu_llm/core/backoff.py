"""How long to wait before the next attempt."""

from __future__ import annotations


def delay_s(failures: int, *, first_s: float, ceiling_s: float) -> float:
    """Twice as long after each failure in a row, from `first_s` up to `ceiling_s`. The first retry waits `first_s`.

    There is no jitter: one daemon retries one engine on one host, so no herd has to be spread.
    """
    return min(ceiling_s, first_s * 2.0 ** min(max(failures - 1, 0), 30))
