"""One request to the daemon: HTTP over its Unix socket, with a deadline and with errors an operator can act on."""

from __future__ import annotations

import http.client
import json
import math
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any
from urllib.parse import quote

import click

from mgpu_llm import control_api
from mgpu_llm.core import instances
from mgpu_llm.core.status import RungStatus, Status
from mgpu_llm.ctl import exits

ANSWER_S = 5.0
#: For a reload the daemon reads the config and looks at what it names, on disks.
RELOAD_S = 10.0
#: A status with every attempt's evidence has tens of kilobytes; a foreign server may send without end.
ANSWER_BYTES = 16 * 1024 * 1024


class Failure(click.ClickException):
    """Ends mgpuctl with one line on stderr and the exit code `code`. `problems` is what the daemon has listed, if it has."""

    def __init__(self, message: str, code: int, problems: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.code = code
        self.problems = problems


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str, limit_s: float) -> None:
        super().__init__("localhost", timeout=limit_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Client:
    """The daemon behind `path`. Every method raises Failure, and nothing else, when there is no usable answer."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.instance = instances.of_socket(PurePath(path))
        self.unit = instances.unit(self.instance)
        #: What mgpud is to be told of its config, where that is not the usual one.
        self.config = ("--config", str(instances.config_file(self.instance))) if self.instance else ()

    def status_document(self) -> dict[str, Any]:
        """The status as the daemon gave it, with what a newer daemon may have added."""
        return self._request("GET", control_api.STATUS)

    def status(self) -> Status:
        with self.making_sense():
            return control_api.status_from_json(self.status_document())

    def rungs(self) -> tuple[RungStatus, ...]:
        with self.making_sense():
            rungs = self._request("GET", control_api.LADDER)["rungs"]
            return tuple(control_api.rung_from_json(rung) for rung in rungs)

    def engine_lines(self, count: int) -> tuple[str, ...]:
        with self.making_sense():
            lines = self._request("GET", f"{control_api.LOGS}?lines={count}")["lines"]
            return tuple(str(line) for line in lines)

    def ask_for(self, verb: str) -> str:
        """start, stop or restart: the daemon's word on it. It has accepted the request, it has not yet done it."""
        with self.making_sense():
            return str(self._request("POST", f"/v1/{verb}")["message"])

    def reload(self) -> dict[str, Any]:
        """The config: "applied" and "needs_restart" have the keys that changed. A Failure has its problems, if it is wrong."""
        return self._understand(*self._exchange("POST", f"/v1/{control_api.RELOAD}", RELOAD_S))

    def forget(self) -> str:
        """The rung that served last: the daemon's word on it."""
        file = f"{control_api.KNOWN_GOOD_NAME} below daemon.state_dir"
        default = f"{instances.state_dir(self.instance)}/{control_api.KNOWN_GOOD_NAME}"
        with self._or_on_the_disk(f"remove {file} ({default}) and the next start begins with your settings"):
            return self.ask_for("forget")

    def plan(self, cause: str) -> dict[str, Any]:
        """What would be tried against a cause; a Failure with code WRONG_COMMAND where the daemon does not know it."""
        return self._request("GET", f"{control_api.PLAN}?cause={quote(cause, safe='')}")

    def gpus(self) -> dict[str, Any]:
        """The GPUs of the host and who uses them; a Failure with code REFUSED where the driver does not tell the daemon."""
        return self._request("GET", control_api.GPUS)

    @property
    def _incident_folders(self) -> str:
        default = f"{instances.state_dir(self.instance)}/incidents"
        return f"each incident is a folder in incidents/ below daemon.state_dir ({default})"

    def incidents(self) -> list[dict[str, Any]]:
        with self._or_on_the_disk(self._incident_folders), self.making_sense():
            return [dict(incident) for incident in self._request("GET", control_api.INCIDENTS)["incidents"]]

    def incident(self, wanted: str) -> dict[str, Any]:
        """`wanted` is its id, the beginning of one, or "last"."""
        with self._or_on_the_disk(self._incident_folders):
            return self._request("GET", f"{control_api.INCIDENTS}/{quote(wanted, safe='')}")

    def incident_archive(self, wanted: str) -> bytes:
        """A .tar.gz of it."""
        with self._or_on_the_disk(self._incident_folders):
            target = f"{control_api.INCIDENTS}/{quote(wanted, safe='')}/archive"
            status, body = self._exchange("GET", target)
            if status >= 400:
                self._understand(status, body)
            return body

    @contextmanager
    def _or_on_the_disk(self, there: str) -> Iterator[None]:
        """What the daemon has kept is there when it has given up, too: `there` says what to do with it."""
        try:
            yield
        except Failure as failure:
            if failure.code != exits.NO_DAEMON:
                raise
            raise Failure(f"{failure.message}; without it, {there}", failure.code) from failure

    @contextmanager
    def making_sense(self) -> Iterator[None]:
        """What the daemon said is data from outside: a field that is missing or of another type is not our fault."""
        try:
            yield
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise self._foreign(f"{type(error).__name__} {error}; is it of another version?") from error

    def _request(self, method: str, target: str) -> dict[str, Any]:
        return self._understand(*self._exchange(method, target))

    def _understand(self, status: int, body: bytes) -> dict[str, Any]:
        try:
            document = json.loads(body, parse_constant=_finite, parse_float=_finite)
        except (ValueError, RecursionError) as error:
            raise self._foreign(f"HTTP status {status} without a JSON document") from error
        if not isinstance(document, dict):
            raise self._foreign("its JSON is not an object")
        if status >= 400:
            code = {400: exits.WRONG_COMMAND, 403: exits.NOT_ALLOWED}.get(status, exits.REFUSED)
            listed = document.get("problems")
            problems = tuple(map(str, listed)) if isinstance(listed, list) else ()
            raise Failure(str(document.get("error", f"HTTP status {status}")), code, problems)
        return document

    def _exchange(self, method: str, target: str, limit_s: float | None = None) -> tuple[int, bytes]:
        limit_s = ANSWER_S if limit_s is None else limit_s
        connection = _Connection(self.path, limit_s)
        overdue = threading.Event()
        timer: threading.Timer | None = None
        try:
            connection.connect()
            # The socket's timeout starts anew with each byte; only a clock beside it bounds the whole answer.
            timer = threading.Timer(limit_s, _give_up, (connection.sock, overdue))
            timer.daemon = True
            timer.start()
            connection.request(method, target)
            response = connection.getresponse()
            body = response.read(ANSWER_BYTES)
            if overdue.is_set():
                raise TimeoutError
            return response.status, body
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._failure(error, limit_s, overdue=overdue.is_set()) from error
        finally:
            if timer is not None:
                timer.cancel()
            connection.close()

    def _failure(self, error: Exception, limit_s: float, *, overdue: bool) -> Failure:
        match error:
            # BlockingIOError: so many ask that the kernel has no room for one more in the queue.
            case _ if overdue or isinstance(error, TimeoutError | BlockingIOError):
                return Failure(
                    f"the daemon on {self.path} does not answer within {limit_s:g} s; "
                    f"see: journalctl -u {self.unit} -n 50",
                    exits.NO_ANSWER,
                )
            case FileNotFoundError() | ConnectionRefusedError() | NotADirectoryError():
                return Failure(
                    f"no daemon answers on {self.path}; start it with: systemctl start {self.unit}", exits.NO_DAEMON
                )
            case PermissionError():
                return Failure(
                    f"not allowed to use {self.path}: use sudo, or join its group with: "
                    "usermod -aG mgpu-llm USER (and log in again)",
                    exits.NOT_ALLOWED,
                )
            case http.client.RemoteDisconnected() | ConnectionError():
                return Failure(
                    f"the daemon on {self.path} hung up before it answered; see: journalctl -u {self.unit} -n 50",
                    exits.NO_ANSWER,
                )
            case http.client.HTTPException() | ValueError():
                return self._foreign(f"{type(error).__name__} instead of an HTTP answer")
            case _:
                return Failure(f"cannot use the socket {self.path}: {error}", exits.NO_DAEMON)

    def _foreign(self, why: str) -> Failure:
        return Failure(f"what answers on {self.path} does not speak as mgpud does: {why}", exits.NO_ANSWER)


def _finite(text: str) -> float:
    """NaN and Infinity are no JSON, and would not be when they are passed on."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no number")
    return value


def _give_up(sock: socket.socket, overdue: threading.Event) -> None:
    overdue.set()
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # the answer came at the same moment and the socket is closed already
