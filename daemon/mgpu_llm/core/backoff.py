"""How long to wait before the next attempt."""

from __future__ import annotations

import hashlib


def delay_s(failures: int, *, first_s: float, ceiling_s: float, jitter: float = 0.0, seed: str = "") -> float:
    """Twice as long after each failure in a row, from `first_s` up to `ceiling_s`, and longer by up to the part `jitter`: engines
    of several daemons that a common cause has ended do not come back in step. The same `seed` gives the same delay."""
    drawn = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big") / 2**32
    return min(ceiling_s, first_s * 2.0 ** min(max(failures - 1, 0), 30)) * (1.0 + jitter * drawn)
