"""A program of the host that is asked something, with a limit to its answer."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RunAs:
    """Another user, by numbers: what root lets a program be run as that is not root's own."""

    uid: int
    gid: int
    groups: tuple[int, ...]


class Unanswered(Exception):  # noqa: N818 - a state of knowledge, as gpus.GpusUnobserved
    """Nobody tells; the text says why."""


def ask(
    argv: Sequence[str],
    *,
    limit_s: float,
    most_bytes: int = 4 << 20,
    environment: Mapping[str, str] | None = None,
    run_as: RunAs | None = None,
) -> str:
    """What it prints, if it ends with 0; run in `environment`, or in ours, but always in English, and as another user where
    `run_as` says so. Raises Unanswered. After `limit_s` it is killed, which may wait for ever where it is stuck in the kernel."""
    try:
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=limit_s,
            check=False,
            env={**(os.environ if environment is None else environment), "LC_ALL": "C"},
            user=None if run_as is None else run_as.uid,
            group=None if run_as is None else run_as.gid,
            extra_groups=None if run_as is None else run_as.groups,
        )
    except FileNotFoundError:
        raise Unanswered(f"there is no {argv[0]}") from None
    except subprocess.TimeoutExpired:
        raise Unanswered(f"{argv[0]} has not answered within {limit_s:g} s") from None
    except OSError as error:
        raise Unanswered(f"cannot run {argv[0]}: {(error.strerror or '').lower()}") from None
    if done.returncode != 0:
        said = " ".join(done.stderr.decode("utf-8", "replace").split())[:200]
        raise Unanswered(f"{argv[0]} ended with {done.returncode}" + (f": {said}" if said else ""))
    return done.stdout[:most_bytes].decode("utf-8", "replace")
