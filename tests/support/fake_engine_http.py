"""The fake engine's HTTP side: the routes of vLLM's OpenAI server that anybody watching it asks for."""

from __future__ import annotations

import argparse
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.support.fake_engine_scenario import Scenario


class Server(ThreadingHTTPServer):
    daemon_threads = True
    address_family = socket.AF_INET

    def __init__(self, bound: socket.socket, args: argparse.Namespace, scenario: Scenario) -> None:
        super().__init__((args.host, args.port), Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = bound
        self.model = args.served_model_name or args.model
        self.api_key = args.api_key
        self.task = scenario.options["task"]
        self.mute = "mute-completion" in scenario.faults
        unhealthy_s = scenario.number("unhealthy")
        self.unhealthy_at = float("inf") if unhealthy_s is None else time.monotonic() + unhealthy_s


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class calls it so)
        print(f"INFO:     {self.client_address[0]}:{self.client_address[1]} - {format % args}", flush=True)

    def do_GET(self) -> None:
        if self.path == "/health":
            self.answer(503 if time.monotonic() >= self.server.unhealthy_at else 200, None)
        elif self.path == "/metrics":
            self.answer(200, "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running 0.0\n")
        elif self.path == "/v1/models" and self.authorised():
            self.answer(200, {"object": "list", "data": [{"id": self.server.model, "object": "model"}]})
        else:
            self.answer(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", "0"))) or "{}")
        answer = ROUTES.get((self.server.task, self.path))
        if answer is None:
            self.answer(404, {"detail": "Not Found"})
        elif not self.authorised():
            return
        elif body.get("model", self.server.model) != self.server.model:
            message = f"The model `{body['model']}` does not exist."
            self.answer(404, {"error": {"message": message, "type": "NotFoundError", "code": 404}})
        elif self.server.mute:
            threading.Event().wait()
        else:
            self.answer(200, {**answer, "model": self.server.model})

    def authorised(self) -> bool:
        if not self.server.api_key or self.headers.get("Authorization") == f"Bearer {self.server.api_key}":
            return True
        self.answer(401, {"error": "Unauthorized"})
        return False

    def answer(self, status: int, content: dict[str, Any] | str | None) -> None:
        text = "" if content is None else content if isinstance(content, str) else json.dumps(content)
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(content, str) else "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


COMPLETION: dict[str, Any] = {
    "id": "cmpl-1",
    "object": "text_completion",
    "choices": [{"index": 0, "text": " a", "finish_reason": "length"}],
    "usage": {"prompt_tokens": 1, "total_tokens": 2, "completion_tokens": 1},
}
EMBEDDING = {"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [0.6, 0.8]}]}
ROUTES = {("generate", "/v1/completions"): COMPLETION, ("embed", "/v1/embeddings"): EMBEDDING}


def make(bound: socket.socket, args: argparse.Namespace, scenario: Scenario) -> Server:
    """A server on a socket that is bound; it listens from now on."""
    bound.listen(64)
    return Server(bound, args, scenario)
