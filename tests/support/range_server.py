"""A server of files by HTTP with ranges, for tests and benchmarks: it counts, and fails when it is told to."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Asked:
    """A request, and the bytes of content that went out for it."""

    method: str
    path: str
    begin: int = 0
    sent: int = 0
    headers: dict[str, str] = field(default_factory=dict)


Fault = Callable[[Asked], int | str | None]
"""Returns a status to answer with; ``cut``: close the connection in the middle of the content; ``short``: say and send
half of it; or None for no fault."""


class RangeServer:
    """Files of a folder, while it is entered.

    Attributes:
        requests: what was asked for so far.
        fault: what goes wrong.
        tags: entity tags by path, instead of those made of time and size; None for no tag.
        whole: send whole files, whatever range is asked for.
        answer: called first, with a handler; returns True if it has answered.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requests: list[Asked] = []
        self.fault: Fault = lambda asked: None
        self.tags: dict[str, str | None] = {}
        self.whole = False
        self.answer: Callable[[Any], bool] = lambda handler: False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def sent(self) -> int:
        """Bytes of content so far."""
        return sum(each.sent for each in self.requests)

    def __enter__(self) -> RangeServer:
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@contextmanager
def serving(folder: Path) -> Iterator[RangeServer]:
    with RangeServer(folder) as server:
        yield server


def _handler(server: RangeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, headers: dict[str, str], content: bytes = b"") -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_PUT(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            asked = Asked(self.command, path, headers=dict(self.headers))
            server.requests.append(asked)
            if server.answer(self):
                return
            try:
                file = (server.folder / path.lstrip("/")).open("rb")
            except OSError:
                self.answer(404, {})
                return
            with file:
                self._send(file, path, asked)

        def _send(self, file: Any, path: str, asked: Asked) -> None:
            stat = os.fstat(file.fileno())
            tag = server.tags.get(path, f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"')
            begin, end, status = 0, stat.st_size, 200
            given = self.headers.get("Range")
            found = re.fullmatch(r"bytes=(\d*)-(\d*)", given or "")
            if found and not server.whole:
                status = 206
                if found[1]:
                    begin, end = int(found[1]), min(int(found[2]) + 1 if found[2] else end, end)
                else:
                    begin = max(end - int(found[2]), 0)
                if begin >= end:
                    self.answer(416, {"Content-Range": f"bytes */{stat.st_size}"})
                    return
            asked.begin = begin
            wanted = self.headers.get("If-Match")
            if wanted is not None and wanted != tag:
                self.answer(412, {})
                return
            fault = server.fault(asked)
            if isinstance(fault, int):
                self.answer(fault, {}, b"<Code>SlowDown</Code>" if fault == 503 else b"")
                return
            if fault == "short":
                end = begin + (end - begin) // 2
            headers = {"Content-Length": str(end - begin), "Accept-Ranges": "bytes"}
            headers["Last-Modified"] = formatdate(stat.st_mtime, usegmt=True)
            if tag is not None:
                headers["ETag"] = tag
            if status == 206:
                headers["Content-Range"] = f"bytes {begin}-{end - 1}/{stat.st_size}"
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.flush()
            if self.command == "HEAD":
                return
            if fault == "cut":
                end = begin + (end - begin) // 2
                self.close_connection = True
            with suppress(OSError):  # the other side has closed
                while begin < end:
                    done = os.sendfile(self.connection.fileno(), file.fileno(), begin, end - begin)
                    if not done:
                        break
                    begin += done
                    asked.sent += done

    return Handler


if __name__ == "__main__":
    with serving(Path(sys.argv[1])) as running:
        print(running.url, flush=True)  # noqa: T201 - for the one that started it
        sys.stdin.read()
