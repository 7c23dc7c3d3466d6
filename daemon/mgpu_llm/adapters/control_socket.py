"""The control socket: HTTP with JSON on a Unix socket (the words are in `control_api`), served by aiohttp.

Who may connect, may read: the socket's mode (0660, group mgpu-llm) is the permission. To change anything takes root, the daemon's
own user, or the group mgpu-llm-admin, as the kernel tells of who connected.
"""

from __future__ import annotations

import asyncio
import grp
import os
import pwd
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import structlog
from aiohttp import web

from mgpu_llm import control_api
from mgpu_llm.core.status import RungStatus, Status

GROUP = "mgpu-llm"
ADMINS = "mgpu-llm-admin"
#: No request of ours has a body; a client that sends one is not mgpuctl.
BODY_BYTES = 4096
#: aiohttp would wait a minute for clients that keep a connection open, longer than systemd waits for our end.
GOODBYE_S = 1.0
#: Every answer is given at once. Who stays longer than this, or at most twice this, holds a file descriptor for nothing.
LONGEST_S = 10.0
CHUNK_BYTES = 1 << 16
#: Beyond so many that connect while the loop is busy, the kernel refuses at once (EAGAIN).
BACKLOG = 512

log = structlog.get_logger()


class RefusedError(Exception):
    """Raised by `Backend.request` when the daemon cannot do that now; its text is shown to who asked (HTTP 409)."""


class UnknownError(Exception):
    """Raised by a `Backend` that has not what was asked for; its text is shown to who asked (HTTP 404)."""


class WrongConfigError(Exception):
    """Raised by `Backend.reload` when the config is wrong; `problems` has a line for each (HTTP 422)."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


class Backend(Protocol):
    """The daemon, as the socket sees it. All are called from the event loop; those that may wait do so for a few seconds."""

    def status(self) -> Status: ...

    def rungs(self) -> tuple[RungStatus, ...]: ...

    def engine_lines(self, count: int) -> tuple[str, ...]:
        """The engine's last lines, oldest first, at most `count`."""
        ...

    def plan(self, cause: str) -> dict[str, Any]:
        """What would be tried against a cause. Raises ValueError for one that nobody has heard of."""
        ...

    def request(self, verb: str, by: str) -> str:
        """Take up start, stop, restart or forget; `by` is such as "uid 0 (root), pid 123". Returns a word for who asked,
        or raises RefusedError."""
        ...

    async def reload(self, by: str) -> dict[str, Any]:
        """Read the config again, and let hold what of it can. Returns {"applied": [key], "needs_restart": [key]}, or raises
        WrongConfigError or RefusedError."""
        ...

    async def gpus(self) -> dict[str, Any]:
        """The GPUs of the host and who uses them. Raises RefusedError where the driver does not tell."""
        ...

    async def incidents(self) -> list[dict[str, Any]]:
        """What is kept of failed attempts, in short, oldest first. This and the next two raise RefusedError where the disk
        does not answer."""
        ...

    async def incident(self, wanted: str) -> dict[str, Any]:
        """All that one says of itself. `wanted` is its id, the beginning of one, or "last". Raises UnknownError."""
        ...

    async def incident_archive(self, wanted: str) -> tuple[str, bytes]:
        """Its id, and a .tar.gz of it. Raises UnknownError."""
        ...


@asynccontextmanager
async def serving(
    runtime_dir: Path, backend: Backend, *, group: str = GROUP, admins: str = ADMINS
) -> AsyncIterator[Path]:
    """Answers on `<runtime_dir>/control.sock` as long as it is entered, and gives that path. `group` may read, and `admins` of it
    may change things.

    The caller holds the daemon's lock: a socket that is already there belongs to a dead daemon and is replaced.
    Raises OSError if the directory cannot take a socket.
    """
    path = runtime_dir / control_api.SOCKET_NAME
    listener = _listen(path, group)
    runner = web.AppRunner(_application(backend, admins), access_log=None, shutdown_timeout=GOODBYE_S)
    try:
        await runner.setup()
        await web.SockSite(runner, listener, backlog=BACKLOG).start()
        hanging_up = asyncio.create_task(_hang_up_on_the_slow(runner))
        try:
            yield path
        finally:
            hanging_up.cancel()
    finally:
        path.unlink(missing_ok=True)
        await runner.cleanup()
        listener.close()


async def _hang_up_on_the_slow(runner: web.AppRunner) -> None:
    """aiohttp waits for ever for the first byte of a request, or for its last."""
    before = set[object]()
    while runner.server is not None:
        await asyncio.sleep(LONGEST_S)
        connections = runner.server.connections
        for connection in connections:
            if connection in before:
                connection.force_close()
        before = set(connections)


def _listen(path: Path, group: str) -> socket.socket:
    """Made under another name and renamed: nobody finds it before its mode is right, and a stale one just goes."""
    raw = path.with_name(path.name + ".new")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        raw.unlink(missing_ok=True)
        listener.bind(str(raw))
        raw.chmod(0o660)
        with suppress(KeyError, PermissionError):
            # Without the group, or without the right to give the socket to it, the daemon's own user and root remain.
            os.chown(raw, -1, grp.getgrnam(group).gr_gid)
        listener.listen(BACKLOG)
        raw.rename(path)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {str(path)!r}: {error.strerror or error}") from error
    return listener


def _application(backend: Backend, admins: str) -> web.Application:
    async def status(_: web.Request) -> web.Response:
        return web.json_response(control_api.status_to_json(backend.status()))

    async def ladder(_: web.Request) -> web.Response:
        return web.json_response({"rungs": [control_api.rung_to_json(rung) for rung in backend.rungs()]})

    async def logs(request: web.Request) -> web.Response:
        return web.json_response({"lines": list(backend.engine_lines(_line_count(request)))})

    async def plan(request: web.Request) -> web.Response:
        try:
            return web.json_response(backend.plan(request.query.get("cause", control_api.UNKNOWN_CAUSE)))
        except ValueError as error:
            raise web.HTTPBadRequest(text=str(error)) from None

    async def gpus(_: web.Request) -> web.Response:
        return web.json_response(await backend.gpus())

    async def ask(request: web.Request) -> web.Response:
        await request.read()  # a body over the limit is refused here, with 413
        verb = request.path.rpartition("/")[2]
        peer = _peer(request)
        if not await asyncio.to_thread(peer.may_change, admins):
            why = f"that is for root and for members of the group {admins} (usermod -aG {admins} USER)"
            raise web.HTTPForbidden(text=f"not allowed to {verb}: {why}")
        by = await asyncio.to_thread(peer.name)
        if verb == control_api.RELOAD:
            return web.json_response(await backend.reload(by))
        return web.json_response({"accepted": True, "message": backend.request(verb, by)})

    application = web.Application(middlewares=[_errors_as_json], client_max_size=BODY_BYTES)
    application.router.add_get(control_api.STATUS, status)
    application.router.add_get(control_api.LADDER, ladder)
    application.router.add_get(control_api.LOGS, logs)
    application.router.add_get(control_api.PLAN, plan)
    application.router.add_get(control_api.GPUS, gpus)
    for verb in (*control_api.VERBS, control_api.RELOAD):
        application.router.add_post(f"/v1/{verb}", ask)
    _add_incidents(application.router, backend)
    return application


def _add_incidents(router: web.UrlDispatcher, backend: Backend) -> None:
    async def incidents(_: web.Request) -> web.Response:
        return web.json_response({"incidents": await backend.incidents()})

    async def incident(request: web.Request) -> web.Response:
        return web.json_response(await backend.incident(request.match_info["id"]))

    async def archive(request: web.Request) -> web.StreamResponse:
        name, packed = await backend.incident_archive(request.match_info["id"])
        headers = {"Content-Disposition": f'attachment; filename="{name}.tar.gz"'}
        answer = web.StreamResponse(headers=headers)
        answer.content_type, answer.content_length = "application/gzip", len(packed)
        await answer.prepare(request)
        for start in range(0, len(packed), CHUNK_BYTES):
            await answer.write(packed[start : start + CHUNK_BYTES])
        await answer.write_eof()
        return answer

    router.add_get(control_api.INCIDENTS, incidents)
    router.add_get(f"{control_api.INCIDENTS}/{{id}}", incident)
    router.add_get(f"{control_api.INCIDENTS}/{{id}}/archive", archive)


@web.middleware
async def _errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except RefusedError as refusal:
        return _error(str(refusal), 409)
    except WrongConfigError as wrong:
        return web.json_response({"error": str(wrong), "problems": wrong.problems}, status=422)
    except UnknownError as unknown:
        return _error(str(unknown), 404)
    except web.HTTPMethodNotAllowed as error:
        allowed = ", ".join(sorted(error.allowed_methods))
        return _error(f"cannot {request.method} {request.path!r}: only {allowed}", 405, {"Allow": allowed})
    except web.HTTPNotFound:
        return _error(f"cannot {request.method} {request.path!r}: there is no such path", 404)
    except web.HTTPException as error:
        return _error(error.text or error.reason, error.status)
    except Exception as error:  # noqa: BLE001 - a fault in one answer must not cost the others, and is said here
        log.error("control.answer.failed", path=request.path, error=f"{type(error).__name__}: {error}")
        return _error(f"cannot answer {request.path!r}: a fault in the daemon; its journal has more", 500)


def _error(message: str, status: int, headers: dict[str, str] | None = None) -> web.Response:
    return web.json_response({"error": message}, status=status, headers=headers)


def _line_count(request: web.Request) -> int:
    given = request.query.get("lines", "50")
    if given.isascii() and given.isdigit() and len(given) <= 6 and 1 <= int(given) <= control_api.MOST_LINES:
        return int(given)
    raise web.HTTPBadRequest(text=f"cannot give lines={given!r}: a number from 1 to {control_api.MOST_LINES} is needed")


@dataclass(frozen=True, kw_only=True)
class _Peer:
    """Who is at the other end, as the kernel saw them at connect() (unix(7), SO_PEERCRED)."""

    pid: int
    uid: int
    gid: int

    def may_change(self, admins: str) -> bool:
        """Run in a thread, as the next: names may come from a directory service that does not answer."""
        if self.uid in (0, os.geteuid()):
            return True
        with suppress(KeyError, OverflowError):
            return grp.getgrnam(admins).gr_gid in os.getgrouplist(pwd.getpwuid(self.uid).pw_name, self.gid)
        return False

    def name(self) -> str:
        try:
            name = pwd.getpwuid(self.uid).pw_name
        except (KeyError, OverflowError):
            name = "no name"
        return f"uid {self.uid} ({name}), pid {self.pid}"


def _peer(request: web.Request) -> _Peer:
    connection = request.get_extra_info("socket")
    if connection is None:  # it hung up meanwhile
        return _Peer(pid=0, uid=-1, gid=-1)
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, gid = struct.unpack("3i", found)
    return _Peer(pid=pid, uid=uid, gid=gid)
