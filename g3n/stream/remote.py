"""Reading parts of files behind a URL: local, http(s) or s3. What is slow or fails for a while is tried again."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar, cast

import requests
import urllib3

from g3n.config import G3nError

T = TypeVar("T")
CONNECT_SECONDS = 10.0
STALL_SECONDS = 30.0  # without a byte for so long, an answer is given up
ATTEMPTS = 6
FIRST_PAUSE_SECONDS = 0.5  # before the second attempt; doubled each time, plus or minus a half
DEADLINE_SECONDS = 120.0  # no further attempt after so long
_PIECE = 1 << 18
_PROTOCOL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+(?:::[^/]*)?):")
_REMOTE = ("http", "https", "s3")
_TRANSIENT_STATUS = (408, 425, 429)
_threads = threading.local()


class Missing(OSError):
    """There is no such file."""


class Refused(OSError):
    """The storage answered, and trying again will not change the answer."""


class Broken(OSError):
    """The storage did not answer, or not to the end; another attempt may succeed."""


def local_path(url: str) -> str | None:
    """The path of a local folder or file, None for http(s) and s3. Raises G3nError for any other protocol."""
    found = _PROTOCOL.match(url)
    if found is None:
        return os.path.expanduser(url)
    protocol = found[1].lower()
    if protocol == "file" and url[len("file:") :].startswith("///"):
        return url[len("file://") :]
    if protocol not in _REMOTE or not url[len(protocol) :].startswith("://"):
        raise G3nError(f"'{url}' is of no protocol that shards are read by; give a folder, http(s):// or s3://")
    return None


def persist(url: str, read: Callable[[], T]) -> T:
    """``read()``, tried again with growing pauses while it raises Broken.

    Raises Missing, and G3nError once it is refused or has failed ``ATTEMPTS`` times or for ``DEADLINE_SECONDS``.
    """
    start = time.monotonic()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return read()
        except Refused as error:
            raise G3nError(f"'{url}' cannot be read: {error}; check the address and who may read it") from error
        except Broken as error:
            passed = time.monotonic() - start
            if attempt == ATTEMPTS or passed > DEADLINE_SECONDS:
                raise G3nError(
                    f"'{url}' cannot be read after {attempt} attempts in {passed:.0f} s: {error}; check the network and "
                    f"the server, or copy the shards to a local folder"
                ) from error
        time.sleep(FIRST_PAUSE_SECONDS * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
    raise AssertionError("the last attempt returns or raises")


@contextlib.contextmanager
def open_range(url: str, start: int, stop: int) -> Iterator[tuple[bool, BinaryIO]]:
    """(False, the bytes from ``start`` to ``stop``), or (True, the whole file) where a server ignores ranges; to be read on.

    They end early where the remote file does. Raises Missing, Refused or Broken, also while they are read.
    """
    if url.startswith("s3://"):
        yield False, io.BytesIO(_s3_range(url, start, stop))
        return
    try:
        with _session().get(
            url,
            headers={"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"},
            stream=True,
            timeout=(CONNECT_SECONDS, STALL_SECONDS),
        ) as answer:
            if answer.status_code == 416:  # the file ends before ``start``
                yield False, io.BytesIO()
                return
            _check_status(answer)
            if answer.status_code == 206 and _first_byte(answer) != start:
                raise Broken(f"the server sent {answer.headers.get('Content-Range')!r} for bytes {start}-{stop - 1}")
            yield answer.status_code != 206, cast(BinaryIO, _Watched(answer.raw))
    except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
        raise Broken(_reason(error)) from error


def read_some(file: BinaryIO, size: int) -> bytes:
    """``size`` bytes, fewer at the end of the file. Raises Broken where they take longer than DEADLINE_SECONDS."""
    start, pieces, left = time.monotonic(), [], size
    while left > 0 and (piece := file.read(min(_PIECE, left))):
        pieces.append(piece)
        left -= len(piece)
        if time.monotonic() - start > DEADLINE_SECONDS:
            raise Broken(f"{size - left} of {size} bytes in {DEADLINE_SECONDS:.0f} s")
    return b"".join(pieces)


def read_file(url: str, limit: int) -> bytes:
    """The first ``limit`` bytes of a small file, local or remote. Raises G3nError, and OSError where it is not there."""
    path = local_path(url)
    if path is not None:
        with open(path, "rb") as file:
            return read_some(file, limit)  # in pieces: ``read`` allocates all of ``limit`` at once

    def read() -> bytes:
        with open_range(url, 0, limit) as (_, file):
            return read_some(file, limit)

    return persist(url, read)


class _Watched:
    """An answer's body; what its connection raises while it is read is Broken."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw

    def read(self, size: int) -> bytes:
        try:
            return bytes(self._raw.read(size, decode_content=False))
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise Broken(_reason(error)) from error


def _session() -> requests.Session:
    """A session of this thread: connections stay open; proxies and certificates come from the environment."""
    if not hasattr(_threads, "session"):
        _threads.session = requests.Session()
    return cast(requests.Session, _threads.session)


def _check_status(answer: requests.Response) -> None:
    status = answer.status_code
    words = f"HTTP {status} {answer.reason}".rstrip()
    if status in (404, 410):
        raise Missing(words)
    if status in (200, 206):
        return
    raise Broken(words) if status >= 500 or status in _TRANSIENT_STATUS else Refused(words)


def _first_byte(answer: requests.Response) -> int | None:
    found = re.fullmatch(r"bytes (\d+)-\d+/(?:\d+|\*)", answer.headers.get("Content-Range", "").strip())
    return int(found[1]) if found else None


def _s3_range(url: str, start: int, stop: int) -> bytes:
    """Raises Missing, Refused or Broken."""
    filesystem, no_credentials = _s3()
    try:
        return bytes(filesystem.cat_file(url, start=start, end=stop))
    except FileNotFoundError as error:
        raise Missing("no such object") from error
    except (PermissionError, no_credentials) as error:
        raise Refused(_reason(error)) from error
    except Exception as error:  # aiohttp's, botocore's and s3fs's own
        if "InvalidRange" in str(error) or "range is not satisfiable" in str(error):
            return b""
        raise Broken(_reason(error)) from error


@functools.cache
def _s3() -> tuple[Any, type[Exception]]:
    """The file system and its error for credentials that are not there, which come from the environment as boto reads it."""
    try:
        import s3fs
        from botocore.exceptions import NoCredentialsError
    except ImportError as error:
        raise G3nError("s3:// needs s3fs, which is not installed; pip install 'g3n[s3]'") from error
    timeouts = {"connect_timeout": CONNECT_SECONDS, "read_timeout": STALL_SECONDS, "retries": {"max_attempts": 1}}
    filesystem = s3fs.S3FileSystem(config_kwargs=timeouts, use_listings_cache=False, skip_instance_cache=True)
    filesystem.retries = 1  # ``persist`` tries again
    return filesystem, NoCredentialsError


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
