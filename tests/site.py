"""A web server for tests that counts what it is asked, and can be slow, fail, cut or alter its answers."""

from __future__ import annotations

import functools
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Site(SimpleHTTPRequestHandler):
    """Serves a folder. The attributes are of one server; names are of files without their folder."""

    protocol_version = "HTTP/1.1"
    ranges: bool
    asked: Counter[str]
    parts: Counter[tuple[str, str]]  # (name, Range header)
    sent: Counter[str]  # bytes
    cut: dict[str, int]  # how many more times an answer ends early
    flipped: dict[str, tuple[int, int]]  # name -> (byte of the file, how many more times it is sent wrong)
    status: dict[str, int]  # an error for good
    faults: bool  # one answer in three is a 503, breaks off, or stalls
    delay_seconds: float
    stall_seconds: float
    under_way: int
    most_under_way: int
    lock: threading.Lock

    def do_GET(self) -> None:
        kind, name = type(self), self.path.rsplit("/", 1)[-1]
        with kind.lock:
            kind.asked[name] += 1
            kind.parts[name, self.headers.get("Range", "")] += 1
            number = sum(kind.asked.values())
            kind.under_way += 1
            kind.most_under_way = max(kind.most_under_way, kind.under_way)
        try:
            time.sleep(kind.delay_seconds)
            self.answer(name, "" if not kind.faults or number % 3 else ("503", "cut", "stall")[number // 3 % 3])
        finally:
            with kind.lock:
                kind.under_way -= 1

    def answer(self, name: str, fault: str) -> None:
        kind, path = type(self), Path(self.translate_path(self.path))
        code = 503 if fault == "503" else kind.status.get(name, 200 if path.is_file() else 404)
        if code != 200:
            return self.finish_with(code, b"", 0)
        content = bytearray(path.read_bytes())
        with kind.lock:
            place, times = kind.flipped.get(name, (0, 0))
            if times > 0:
                content[place] ^= 0x10
                kind.flipped[name] = (place, times - 1)
            broken = kind.cut.get(name, 0) > 0
            kind.cut[name] = kind.cut.get(name, 0) - broken
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if kind.ranges else None
        if asked is None:
            return self.finish_with(200, bytes(content), len(content), fault, broken)
        first, last = int(asked[1]), min(int(asked[2]), len(content) - 1)
        if first >= len(content):
            return self.finish_with(416, b"", 0)
        body = bytes(content[first : last + 1])
        return self.finish_with(206, body, len(body), fault, broken, f"bytes {first}-{last}/{len(content)}")

    def finish_with(
        self, code: int, body: bytes, length: int, fault: str = "", broken: bool = False, where: str | None = None
    ) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(length))
        if where:
            self.send_header("Content-Range", where)
        self.end_headers()
        if broken or fault == "cut":
            body, self.close_connection = body[: len(body) // 2], True
        if fault == "stall":
            self.wfile.write(body[:10])
            self.wfile.flush()
            time.sleep(type(self).stall_seconds)
            body = body[10:]
        try:
            self.wfile.write(body)
            type(self).sent[self.path.rsplit("/", 1)[-1]] += len(body)
        except OSError:  # the reader has had enough
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


@contextmanager
def site(folder: Path) -> Iterator[tuple[str, type[Site]]]:
    """(address of ``folder``/data, the attributes of its server)."""
    attributes = {
        "ranges": True, "asked": Counter(), "parts": Counter(), "sent": Counter(), "cut": {}, "flipped": {}, "status": {},
        "faults": False, "delay_seconds": 0.0, "stall_seconds": 0.0, "under_way": 0, "most_under_way": 0,
        "lock": threading.Lock(),
    }  # fmt: skip
    handler = type("OneSite", (Site,), attributes)
    with _Server(("127.0.0.1", 0), functools.partial(handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/data", handler
        finally:
            server.shutdown()
            thread.join()
