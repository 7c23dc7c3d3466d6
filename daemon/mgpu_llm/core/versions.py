"""Which version of vLLM it is, as far as somebody tells."""

from __future__ import annotations

import re


def release(vllm: str) -> tuple[int, int] | None:
    """The first two numbers of a version such as "0.26.0+cpu", None where it is none."""
    numbers = re.match(r"(\d{1,9})\.(\d{1,9})", vllm)
    return None if numbers is None else (int(numbers[1]), int(numbers[2]))
