"""What a broken GPU says of itself: that it is lost, and what the driver asks of the operator."""

from typing import Any, Final

#: nvml.h, nvmlDeviceGpuRecoveryAction_t, of NVML 615 (nvidia-ml-py 13.615.71), each in the words that we have for it.
#: 5 came with 595, 6 and 7 with 615 (NVML's change log).
ACTIONS: Final = {
    0: "none",
    1: "reset",
    2: "reboot",
    3: "drain-p2p",
    4: "drain-and-reset",
    5: "recover-imex-domain",
    6: "bus-reset",
    7: "system-reboot",
}
#: NVML_FI_DEV_GET_GPU_RECOVERY_ACTION, which nvidia-ml-py has had since 12.570 only.
_FIELD: Final = 230
#: nvml.h, nvmlReturn_t: GPU is lost (fallen off the bus, or otherwise inaccessible), and reset required.
LOST: Final = frozenset({15, 16})
#: With these the search for a GPU that was there ends when it is there no more: invalid argument, not found, GPU not found,
#: unknown error (which nvidia-smi words as "Unable to determine the device handle for GPU ...: Unknown Error").
_NOT_FOUND: Final = frozenset({2, 6, 28, 999})
#: Nor is a GPU of use that answers the question who it is with one of these: insufficient power, timeout, interrupt issue.
_UNFIT: Final = frozenset({8, 10, 11})
#: With these it is the driver that is missing, and not a GPU: uninitialised, not loaded, library and driver differ.
_NO_DRIVER: Final = frozenset({1, 9, 18})


def lost(error: Any, *, searched: bool = False) -> str:
    """Why the GPU is lost that an NVMLError is about, "" where the error does not say so; `searched` for is one that was
    there. Raises the error where it is the driver that is missing."""
    if error.value in _NO_DRIVER:
        raise error
    if error.value in LOST or (searched and error.value in _NOT_FOUND):
        return _told(error)
    return ""


def unknown(error: Any) -> str:
    """Why a GPU that was asked who it is cannot be used, "" where the error does not say so. Raises as `lost`."""
    return lost(error, searched=True) or (_told(error) if error.value in _UNFIT else "")


def _told(error: Any) -> str:
    return f"{error} (NVML error {error.value})"


def action(nvml: Any, handle: object) -> str | None:
    """What the driver asks for, one of ACTIONS, or None where it does not tell. Raises NVMLError."""
    (field,) = nvml.nvmlDeviceGetFieldValues(handle, [_FIELD])
    if field.nvmlReturn in LOST:
        raise nvml.NVMLError(field.nvmlReturn)
    if field.nvmlReturn != nvml.NVML_SUCCESS:
        return None
    return ACTIONS.get(field.value.uiVal, f"unknown-{field.value.uiVal}")
