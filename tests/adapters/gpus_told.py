"""Asking for everything about GPUs, and what one tells that is well."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.support.fake_nvml import FakeNvml
from tests.support.fake_nvml.asked import Asked, asking, uuid

WELL = {
    "index": 0,
    "uuid": uuid(0),
    "name": "NVIDIA H200",
    "pci": "00000000:10:00.0",
    "lost": "",
    "untold": "",
    "memory_total_bytes": 150_754_820_096,
    "memory_used_bytes": 0,
    "memory_free_bytes": 150_754_820_096,
    "memory_reserved_bytes": 0,
    "utilisation_percent": 0,
    "power_mw": 75_000,
    "power_limit_mw": 700_000,
    "temperature_c": 30,
    "ecc": True,
    "ecc_uncorrected": 0,
    "recovery_action": "none",
    "mig": False,
    "mig_slices": [],
    "compute_mode": "default",
    "persistence": True,
    "processes": [],
}
IDENTITY = ("index", "uuid", "name", "pci", "lost", "untold")


@contextmanager
def looking(nvml: FakeNvml, *devices: str) -> Iterator[Asked]:
    """The adapter on a host whose kernel says that the driver holds `devices`."""
    folder = nvml.home / "devices"
    folder.mkdir(exist_ok=True)
    for name in ("module", "bind", *devices):
        (folder / name).touch()
    with asking({**nvml.environment(), "FAKE_DEVICES": str(folder)}) as asked:
        yield asked


def gpus(asked: Asked) -> list[dict[str, Any]]:
    told = asked.details()["answer"]["gpus"]
    assert isinstance(told, list)
    return told


def identity(gpu: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(gpu[key] for key in IDENTITY)
