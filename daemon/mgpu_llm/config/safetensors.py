"""Reading what a safetensors file holds from its header, without its data.

A file is eight bytes of little-endian length, so many bytes of JSON, and then the tensors, whose places the JSON gives from the
end of the header on; they fill the file to its last byte (safetensors 0.7, tensor.rs, which refuses everything else).
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from mgpu_llm.core.sharding import BITS, Tensor

#: As safetensors itself allows.
LONGEST_HEADER: Final = 100_000_000
LENGTH_BYTES: Final = 8
#: PyTorch's own bound: products of more would be long to reckon.
MOST_DIMENSIONS: Final = 64
_POINTER: Final = b"version "


class BrokenFileError(ValueError):
    """The file cannot be loaded: the message says why, to follow the file's name and a colon."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What one file holds. `read_bytes` is how much of it was read for that."""

    tensors: tuple[Tensor, ...]
    read_bytes: int


def read_header(file: Path) -> Header:
    """Raises BrokenFileError for a file that is no whole safetensors file, and OSError where it cannot be read."""
    if not is_name(str(file)):
        raise BrokenFileError("no file can be called so")
    with open(file, "rb", buffering=0, opener=_at_once) as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise BrokenFileError("it is no regular file")
        start = _exactly(stream.read(LENGTH_BYTES), LENGTH_BYTES)
        if start == _POINTER:
            raise BrokenFileError("it is a pointer of Git LFS, not the file itself")
        length = int.from_bytes(start, "little")
        if length > LONGEST_HEADER:
            raise BrokenFileError(f"its header would have {length} bytes: it is no safetensors file")
        if length > status.st_size - LENGTH_BYTES:
            raise BrokenFileError("it ends within its header")
        text = _exactly(_whole(stream, length), length)
    tensors = _tensors(text)
    end = LENGTH_BYTES + length + max((offset for _, offset in tensors), default=0)
    if status.st_size != end:
        than = "it is cut off" if status.st_size < end else "it is too long"
        raise BrokenFileError(f"{than}: it has {status.st_size} bytes, and its header says {end}")
    return Header(tensors=tuple(tensor for tensor, _ in tensors), read_bytes=LENGTH_BYTES + length)


def is_name(text: str) -> bool:
    """Whether a file may be called so: an index can have any text in it."""
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _at_once(name: str, flags: int) -> int:
    """Of a pipe the mere opening would wait for a writer."""
    return os.open(name, flags | os.O_NONBLOCK)


def _whole(stream: Any, length: int) -> bytes:
    """One read may bring less than was asked for."""
    parts, missing = list[bytes](), length
    while missing and (part := stream.read(missing)):
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)


def _exactly(read: bytes, length: int) -> bytes:
    if len(read) < length:
        raise BrokenFileError("it is empty" if not read else "it ends within its header")
    return read


def _tensors(text: bytes) -> list[tuple[Tensor, int]]:
    """Each with where it ends."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BrokenFileError("its header is not JSON") from error
    if not isinstance(content, dict):
        raise BrokenFileError("its header is JSON, but not an object")
    return [_tensor(name, told) for name, told in content.items() if name != "__metadata__"]


def _tensor(name: str, told: Any) -> tuple[Tensor, int]:
    try:
        dtype, shape, (begin, end) = str(told["dtype"]), tuple(told["shape"]), told["data_offsets"]
        numbers = (*shape, begin, end)
        fine = len(shape) <= MOST_DIMENSIONS and all(type(number) is int and 0 <= number < 2**63 for number in numbers)
        fine = fine and begin <= end
    except (TypeError, KeyError, ValueError):
        fine = False
    if not fine:
        raise BrokenFileError(f"its header is wrong about {name[:80]!r}")
    bits = BITS.get(dtype)
    if bits is not None and (end - begin) * 8 != prod(shape) * bits:
        raise BrokenFileError(f"its header is wrong about {name[:80]!r}: {end - begin} bytes for {dtype} {list(shape)}")
    return Tensor(name=name, dtype=dtype, shape=shape, bytes=end - begin), end
