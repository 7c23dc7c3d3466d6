"""The model's files: whole, readable by the user, how fast they can be read, and how much of them the page cache has."""

from __future__ import annotations

import errno
import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mgpu_llm.config.safetensors import BrokenFileError, read_header
from mgpu_llm.doctor import account
from mgpu_llm.doctor.account import Account
from mgpu_llm.doctor.disks import mount_of, mounts
from mgpu_llm.doctor.finding import Finding, Subject, gib, listed
from mgpu_llm.doctor.page_cache import resident_bytes
from mgpu_llm.doctor.system import System

SUBJECT: Final = Subject("model")
#: Of which one is enough: as Hugging Face's, SentencePiece's, Mistral's and OpenAI's tokenizers are kept.
TOKENIZERS: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "*.tiktoken",
    "*.gguf",
    "*.model",
)
#: What a measurement may read, and how long; a disk's first bytes come later than the rest.
MOST_BYTES: Final = 256 << 20
MOST_S: Final = 1.0
#: A file that ends sooner tells how long the first bytes take, and not how fast the others come.
LEAST_BYTES: Final = 32 << 20
CHUNK: Final = 4 << 20
#: A load that takes longer than this is worth a remark.
LONG_S: Final = 600.0


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What was read past the page cache, of one file."""

    read_bytes: int
    took_s: float

    @property
    def bytes_per_s(self) -> float:
        return self.read_bytes / self.took_s if self.took_s else 0.0


def check(folder: Path, files: Sequence[Path], who: Account, *, tokenizer: bool, hub_id: str = "") -> Iterator[Finding]:
    """`files` are those that vLLM reads, of the model in `folder`; `tokenizer`: whether there has to be one. Of a model of the
    hub, `hub_id`, vLLM fetches what is not there yet.

    Reads the headers of all files."""
    if hub_id:
        missing, files = [file for file in files if not file.exists()], [file for file in files if file.exists()]
        if missing or not files:
            what = f"{_count(missing)} of weights" if missing else "the weights"
            seen = f"{what} of {hub_id} are still to be fetched, by vLLM at its first start"
            yield SUBJECT.warning("model-fetched", seen, f"fetch them before: hf download {hub_id}, as {who.name}")
        tokenizer = tokenizer and not missing
        if not files:
            return
    if not files:
        yield SUBJECT.problem("model-weights", f"no weights in {folder}", "fetch the model anew")
        return
    broken = dict(_broken(files))
    size = sum(file.stat().st_size for file in files if file.is_file())
    if broken:
        told = [f"{name}: {why}" for name, why in broken.items()]
        seen = f"{len(broken)} of {len(files)} files of weights cannot be loaded: {listed(told, 3)}"
        # Into the hub's cache a download with --local-dir would put files beside those that it keeps.
        anew = f"{hub_id} --force-download" if hub_id else f"REPOSITORY --local-dir {folder}"
        yield SUBJECT.problem("model-weights", seen, f"fetch these anew, as with: hf download {anew}")
    else:
        yield SUBJECT.ok("model-weights", f"weights of {gib(size)}, in {_count(files)}, whole by the headers")
    if tokenizer and not any(next(folder.glob(pattern), None) for pattern in TOKENIZERS):
        seen = f"no tokenizer in {folder}: none of {listed(list(TOKENIZERS), 3)}"
        yield SUBJECT.warning(
            "model-tokenizer", seen, 'fetch it too, or name one: engine.args = ["--tokenizer", "..."]'
        )
    yield _readable(folder, files, who)


def reading(system: System, files: Sequence[Path]) -> Iterator[Finding]:
    """How long the files take to come. Reads up to a second of the largest, past the page cache."""
    there = [file for file in files if file.is_file()]
    if not there:
        return
    size = sum(file.stat().st_size for file in there)
    largest = max(there, key=lambda file: file.stat().st_size)
    mount = mount_of(str(largest.resolve()), mounts(system.text("/proc/self/mounts")))
    kind = mount.kind if mount else "an unknown file system"
    cached = [resident_bytes(file) for file in there]
    known = [count for count in cached if count is not None]
    yield _cached(sum(known) if len(known) == len(cached) else None, size)
    try:
        speed = measure(largest)
    except OSError as error:
        no = "it cannot be read past the page cache" if error.errno == errno.EINVAL else (error.strerror or "").lower()
        yield SUBJECT.unknown("model-speed", f"{no} ({kind})")
        return
    cached_bytes = sum(known) if len(known) == len(cached) else 0
    yield rate(speed, size - cached_bytes, kind, remote=bool(mount and mount.network))


def rate(speed: Speed, left: int, kind: str, *, remote: bool) -> Finding:
    """What a speed means for the bytes that are still on the disk."""
    per_s = speed.bytes_per_s
    if speed.read_bytes < LEAST_BYTES and speed.took_s < MOST_S:
        return SUBJECT.ok("model-speed", f"{kind}: {gib(left)} to read, in files too small to measure by")
    if not per_s:
        return SUBJECT.unknown("model-speed", f"nothing came from the disk within {MOST_S:g} s ({kind})")
    takes_s = left / per_s
    measured = f"{kind}: one reader gets {per_s / 1e6:.0f} MB/s ({gib(speed.read_bytes)} read)"
    seen = f"{measured}; " + (
        f"the {gib(left)} on the disk take about {_span(takes_s)}" if left else "nothing is left to read"
    )
    if takes_s > LONG_S:
        where = "a local disk" if remote else "a faster disk"
        cure = f"copy the model to {where}, or read it once before: cat FILES > /dev/null"
        return SUBJECT.warning("model-speed", seen, cure)
    return SUBJECT.ok("model-speed", seen)


def measure(file: Path, clock: Callable[[], float] = time.monotonic) -> Speed:
    """Read from a file past the page cache, and so without changing what is in it. Raises OSError (EINVAL where the file system
    cannot do that)."""
    descriptor = os.open(file, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    try:
        # Memory of its own pages: O_DIRECT wants it aligned.
        with mmap.mmap(-1, CHUNK) as buffer:
            begun, read = clock(), 0
            while read < MOST_BYTES and clock() - begun < MOST_S:
                got = os.preadv(descriptor, [buffer], read)
                read += got
                if got < CHUNK:
                    break
            return Speed(read_bytes=read, took_s=clock() - begun)
    finally:
        os.close(descriptor)


def _broken(files: Sequence[Path]) -> Iterator[tuple[str, str]]:
    for file in sorted(files):
        try:
            if file.suffix == ".safetensors":
                read_header(file)
            elif not file.stat().st_size:
                yield file.name, "it is empty"
        except FileNotFoundError:
            yield file.name, "it is missing"
        except BrokenFileError as error:
            yield file.name, str(error)
        except OSError as error:
            yield file.name, (error.strerror or str(error)).lower()


def _readable(folder: Path, files: Sequence[Path], who: Account) -> Finding:
    asked = [folder, folder / "config.json", *files]
    may = account.access(who, asked)
    if may is None:
        why = f"only root, or {who.name}, can find out what {who.name} may read"
        return SUBJECT.unknown("model-access", why, f"sudo mgpuctl doctor --user {who.name}")
    # What is missing is told elsewhere; what the user cannot even see is not there for that user.
    closed = [path for path, can in zip(asked, may, strict=True) if "r" not in can and path.exists()]
    if not closed:
        return SUBJECT.ok("model-access", f"{who.name} may read it")
    seen = f"{who.name} may not read {listed([str(path) for path in closed], 2)}"
    # -L: in the hub's cache the files are links, which -R alone leaves out.
    cure = f"sudo setfacl -R -L -m u:{who.name}:rX {folder}; the folders above need x for {who.name}: namei -l {folder}"
    return SUBJECT.problem("model-access", seen, cure)


def _cached(resident: int | None, size: int) -> Finding:
    if resident is None:
        return SUBJECT.unknown("model-cached", "the kernel tells only the files' owner how much is in the page cache")
    percent = 100 * resident // size if size else 0
    return SUBJECT.ok("model-cached", f"{gib(resident)} of {gib(size)} are in the page cache ({percent} %)")


def _count(files: Sequence[Path]) -> str:
    return f"{len(files)} files" if files[1:] else "one file"


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
