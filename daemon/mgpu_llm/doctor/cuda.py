"""Whether the driver is new enough for the CUDA that the engine's PyTorch was built with."""

from __future__ import annotations

from typing import Final

from mgpu_llm.doctor.finding import Finding, Subject

SUBJECT: Final = Subject("driver")
NAME: Final = "driver-cuda"
#: The oldest driver that runs programs of a major version of CUDA (NVIDIA, "CUDA Compatibility", minor version compatibility,
#: table 1; the full numbers are those of the CUDA Toolkit's release notes).
MINIMUM: Final = {11: (450, 80, 2), 12: (525, 60, 13), 13: (580, 65, 6)}


def check(driver: str, supports: str, built: str, torch: str, *, compatibility: bool = False) -> Finding:
    """`driver` is its version, `supports` the CUDA version that it brings, `built` that of the engine's PyTorch `torch`; "" is
    what nobody tells. `compatibility`: CUDA's forward compatibility package is asked for."""
    if not driver:
        return SUBJECT.unknown(NAME, "the driver does not tell its version")
    if not built:
        return SUBJECT.unknown(NAME, "the engine's Python does not tell for which CUDA its PyTorch was built")
    needed, number = _numbers(built), _numbers(driver)
    least = MINIMUM.get(needed[0]) if needed else None
    pair = (
        f"driver {driver}" + (f" (CUDA {supports})" if supports else "") + f", PyTorch {torch} built for CUDA {built}"
    )
    if least is None or not number:
        return SUBJECT.unknown(NAME, f"{pair}: which driver that needs is not known here")
    if number < least:
        return _too_old(pair, needed[0], least, compatibility)
    if supports and _numbers(supports) < needed:
        seen = f"{pair}: it runs, but what is compiled while it runs from PTX needs a driver with CUDA {built}"
        return SUBJECT.warning(NAME, seen, f"install a driver with CUDA {built} or later (nvidia-smi shows it)")
    return SUBJECT.ok(NAME, pair)


def _too_old(pair: str, major: int, least: tuple[int, ...], compatibility: bool) -> Finding:
    if compatibility:
        seen = f"{pair}: it is left to CUDA's compatibility package, which only GPUs of data centres have"
        return SUBJECT.warning(NAME, seen)
    oldest = ".".join(f"{part:02}" if at else str(part) for at, part in enumerate(least))
    cure = (
        f"install driver {oldest} or later, or a PyTorch and vLLM built for an older CUDA; on GPUs of data centres also "
        f"cuda-compat-{major}-* with VLLM_ENABLE_CUDA_COMPATIBILITY=1 in engine.env"
    )
    return SUBJECT.problem(NAME, f"{pair}: CUDA {major}.x needs driver {oldest} or later", cure)


def _numbers(version: str) -> tuple[int, ...]:
    """() where it is none."""
    parts = version.split(".")
    return tuple(map(int, parts)) if all(part.isdecimal() for part in parts) else ()
