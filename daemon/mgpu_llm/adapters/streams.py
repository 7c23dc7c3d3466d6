"""The standard streams: there in any case, and written to as far as somebody reads."""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO


def mend() -> None:
    """Opens those that a careless parent has closed: our own files would get their numbers."""
    for stream in range(3):
        try:
            os.fstat(stream)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace")


def tell(text: str, stream: TextIO | None) -> str:
    """Writes the text and a line end. Returns why it could not be written, or "": also where the reader has left, as in
    `mgpud --check | head -1`, since he has what he wanted."""
    if stream is None:
        return ""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")  # a path may hold characters that the encoding lacks
    try:
        stream.write(f"{text}\n")
        stream.flush()
    except OSError as error:
        _drop(stream)
        return "" if isinstance(error, BrokenPipeError) else (error.strerror or str(error)).lower()
    return ""


def _drop(stream: TextIO) -> None:
    """What is still buffered cannot be written; the interpreter would try once more at its end and complain."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
