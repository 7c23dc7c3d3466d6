"""The slices that a GPU in MIG mode is divided into."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from mgpu_llm.adapters.gpus.session import memory
from mgpu_llm.adapters.gpus.told import MigSlice

#: NVML's code of a place in which there is no MIG slice: not found.
_EMPTY: Final = 6


def slices(nvml: Any, told: Callable[[Callable[[], Any]], Any], handle: object) -> tuple[MigSlice, ...] | None:
    """Those of the GPU `handle`, () without MIG, None where it does not tell. `told` asks a question that may stay open, and
    answers None then; raises what that raises."""
    mode = told(partial(nvml.nvmlDeviceGetMigMode, handle))
    if mode is None:
        return None
    places = told(partial(nvml.nvmlDeviceGetMaxMigDeviceCount, handle)) if mode[0] else 0
    if places is None:
        return None

    def at(place: int) -> Any:
        try:
            return nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, place)
        except nvml.NVMLError as error:
            if error.value != _EMPTY:
                raise
            return None

    found = {place: part for place in range(places) if (part := told(partial(at, place))) is not None}
    sizes = {place: told(partial(memory, nvml, part)) for place, part in found.items()}
    return tuple(
        MigSlice(
            index=place,
            uuid=told(partial(nvml.nvmlDeviceGetUUID, part)),
            memory_total_bytes=getattr(sizes[place], "total", None),
            memory_used_bytes=getattr(sizes[place], "used", None),
        )
        for place, part in found.items()
    )
