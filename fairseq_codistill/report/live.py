"""Owns ``codistill-report --serve``: the page of runs that go on, over HTTP, with ``/status.json`` and ``/metrics``.

It must never answer anything but GET and HEAD, nor hand out a file that is not one of the logs it shows. It is bound to
loopback unless told otherwise.
"""

import contextlib
import http.server
import ipaddress
import os
import socket
import sys
import urllib.parse
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fairseq_codistill.report import openmetrics
from fairseq_codistill.report.snapshots import Reader, Snapshot

EVERY_S = 2.0  # between two questions of a page
DEFAULT_PORT = 6010
CLIENT_TIMEOUT_S = 30.0
HTML, JSON, TEXT = "text/html; charset=utf-8", "application/json", "text/plain; charset=utf-8"


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers one request; :func:`make_server` gives ``reader`` and ``hosts``.

    Attributes:
        reader: of the logs.
        hosts: names by which a server on loopback may be called; None: any.
    """

    timeout = CLIENT_TIMEOUT_S
    reader: Reader
    hosts: frozenset[str] | None

    def do_GET(self) -> None:
        """The page, its next state, how the runs stand, metrics, or a log."""
        if not self._is_for_us():
            self._send(HTTPStatus.FORBIDDEN, TEXT, b"this server answers to the names of this machine alone\n")
            return
        path = urllib.parse.urlsplit(self.path).path
        snapshot = self.reader.snapshot()
        if path == "/":
            self._send(HTTPStatus.OK, HTML, snapshot.html)
        elif path == "/page.json":
            self._send_page(snapshot)
        elif path == "/status.json":
            self._send(HTTPStatus.OK, JSON, snapshot.status)
        elif path == "/metrics":
            self._send(HTTPStatus.OK, openmetrics.CONTENT_TYPE, snapshot.metrics)
        elif path.startswith("/log/"):
            self._send_log(snapshot, path.removeprefix("/log/"))
        else:
            self._send(HTTPStatus.NOT_FOUND, TEXT, b"nothing is here; see /, /status.json and /metrics\n")

    do_HEAD = do_GET

    def _is_for_us(self) -> bool:
        """Whether the request names this machine: a page from elsewhere may have a name of its own resolve to it."""
        try:
            name = urllib.parse.urlsplit("//" + self.headers.get("Host", "")).hostname
        except ValueError:
            return False
        return self.hosts is None or name in self.hosts

    def _send_page(self, snapshot: Snapshot) -> None:
        headers = {"ETag": snapshot.version}
        if self.headers.get("If-None-Match") == snapshot.version:
            self._send(HTTPStatus.NOT_MODIFIED, JSON, b"", headers)
        elif "gzip" in self.headers.get("Accept-Encoding", ""):
            self._send(HTTPStatus.OK, JSON, snapshot.packed_page, headers | {"Content-Encoding": "gzip"})
        else:
            self._send(HTTPStatus.OK, JSON, snapshot.page, headers)

    def _send_log(self, snapshot: Snapshot, number: str) -> None:
        if not (number.isdecimal() and int(number) < len(snapshot.files)):
            self._send(HTTPStatus.NOT_FOUND, TEXT, b"no such log\n")
            return
        try:
            file = snapshot.files[int(number)].open("rb")
        except OSError:
            self._send(HTTPStatus.NOT_FOUND, TEXT, b"the log is gone\n")
            return
        with file:
            left = os.fstat(file.fileno()).st_size  # what is written meanwhile is for the next request
            self._head(HTTPStatus.OK, TEXT, left, {})
            while left > 0 and self.command != "HEAD" and (part := file.read(min(left, 1 << 16))):
                self.wfile.write(part)
                left -= len(part)

    def _send(self, code: HTTPStatus, kind: str, body: bytes, headers: dict[str, str] | None = None) -> None:
        self._head(code, kind, len(body), headers or {})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, code: HTTPStatus, kind: str, size: int, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {"Content-Type": kind, "Content-Length": str(size), **headers}.items():
            self.send_header(name, value)
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a page asks every few seconds."""


class Server(http.server.ThreadingHTTPServer):
    """A thread a request; those of people who went away do not keep it from ending."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """One who goes away in the middle of an answer is no error; anything else is shown."""
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


def make_server(folder: Path, host: str, port: int, every_s: float = EVERY_S) -> Server:
    """A server that is bound, and answers once ``serve_forever`` runs.

    Args:
        folder: a run or a folder of runs; it need not be there yet.
        host: name or address to bind to; on loopback, requests that call it by another name are refused.
        port: 0 picks a free one.
        every_s: seconds between two questions of a page.

    Raises:
        ValueError: an option that cannot be, or an address that cannot be had.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"--port is {port}; it must be 1 to 65535, or 0 for a free one")
    if not every_s >= 0.2:
        raise ValueError(f"--every is {every_s:g}; it must be 0.2 seconds or more")
    hosts = frozenset({"localhost", "127.0.0.1", "::1", host}) if is_loopback(host) else None
    handler = type("BoundHandler", (Handler,), {"reader": Reader(folder, every_s), "hosts": hosts})
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = type("BoundServer", (Server,), {"address_family": family})
    try:
        server: Server = bound((host, port), handler)
    except OSError as error:
        why = error.strerror or str(error)
        raise ValueError(f"--host {host} --port {port} cannot be had: {why}; --port 0 picks a free one") from error
    return server


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what is bound to ``host``."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def serve(folder: Path, host: str, port: int, every_s: float) -> None:
    """Serve until Ctrl-C.

    Raises:
        ValueError: an option that cannot be, or an address that cannot be had.
    """
    with make_server(folder, host, port, every_s) as server:
        shown = f"[{host}]" if ":" in host else host
        print(f"http://{shown}:{server.server_port}/ shows {folder}; Ctrl-C ends it", flush=True)
        if not folder.exists():
            print(f"{folder} is not there yet; the page fills once it is", flush=True)
        if not is_loopback(host):
            print("whoever reaches this address can read the logs", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
