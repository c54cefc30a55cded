"""Blocks of remote shards on the node's disk, shared by its processes and kept below a limit.

A block is written under another name and renamed, so a reader sees all of it or nothing; whoever needs room removes what was
read longest ago. A block that is gone is fetched again: no process relies on another.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import uuid
from collections import defaultdict
from pathlib import Path
from typing import BinaryIO

import xxhash

from g3n.stream.remote import open_range, persist, read_some

log = logging.getLogger(__name__)
BLOCK_BYTES = 8 << 20
_SHARE = 32  # of the free room, what a process may write before it looks again: others write too
_KEPT = 0.9  # of the limit, after something had to go
_opening = threading.Lock()


def default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "g3n"


def open_cache(folder: str | None, gib: float) -> BlockCache:
    """The cache of this process in ``folder`` (default ~/.cache/g3n), of at most ``gib`` GiB."""
    with _opening:
        return _cache_in(Path(folder) if folder else default_folder(), int(gib * 2**30))


@functools.cache
def _cache_in(folder: Path, limit_bytes: int) -> BlockCache:
    return BlockCache(folder, limit_bytes)


class BlockCache:
    """Aligned blocks of BLOCK_BYTES of remote files."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder, self.limit_bytes = folder / "blocks", limit_bytes
        self._room = 0  # what may be written before the folder is looked at again
        self._lock = threading.Lock()
        self._locks: dict[str, threading.Lock] = defaultdict(threading.Lock)  # one reader fetches, the others wait
        self._warned: set[str] = set()

    def read(self, url: str, version: str, file_bytes: int, start: int, size: int) -> bytes:
        """``size`` bytes from ``start`` of a file of ``file_bytes``; fewer where the remote file is shorter than that.

        ``version`` (its checksum) keeps the blocks of a file that changed apart. Raises remote.Missing, G3nError.
        """
        name = xxhash.xxh3_64_hexdigest(f"{url}\0{version}\0{file_bytes}\0{BLOCK_BYTES}")
        pieces = []
        end = min(start + size, file_bytes)
        for number in range(start // BLOCK_BYTES, -(-end // BLOCK_BYTES)):
            first = number * BLOCK_BYTES
            wanted = slice(max(start, first) - first, min(end, first + BLOCK_BYTES) - first)
            piece = self._piece(url, name, number, file_bytes, wanted)
            pieces.append(piece)
            if len(piece) < wanted.stop - wanted.start:
                break
        return b"".join(pieces)

    def drop(self, url: str, version: str, file_bytes: int, start: int, size: int) -> None:
        """Forget the blocks that these bytes lie in."""
        name = xxhash.xxh3_64_hexdigest(f"{url}\0{version}\0{file_bytes}\0{BLOCK_BYTES}")
        for number in range(start // BLOCK_BYTES, -(-(start + size) // BLOCK_BYTES)):
            self._path(name, number).unlink(missing_ok=True)

    def _piece(self, url: str, name: str, number: int, file_bytes: int, wanted: slice) -> bytes:
        found = self._cached(name, number, file_bytes, wanted)
        if found is not None:
            return found
        with self._locked(f"{name}-{number}"):
            found = self._cached(name, number, file_bytes, wanted)
            if found is not None:
                return found
            return persist(url, lambda: self._fetch(url, name, number, file_bytes, wanted))

    def _cached(self, name: str, number: int, file_bytes: int, wanted: slice) -> bytes | None:
        path = self._path(name, number)
        try:
            with open(path, "rb") as file:
                if os.fstat(file.fileno()).st_size != _length(number, file_bytes):
                    return None
                os.utime(file.fileno())  # the least recently read goes first
                return os.pread(file.fileno(), wanted.stop - wanted.start, wanted.start)
        except OSError:
            return None

    def _fetch(self, url: str, name: str, number: int, file_bytes: int, wanted: slice) -> bytes:
        start, length = number * BLOCK_BYTES, _length(number, file_bytes)
        with open_range(url, start, start + length) as (whole, file):
            if whole:
                with self._locked(name):  # once is enough
                    found = self._cached(name, number, file_bytes, wanted)
                    return self._pass_over(url, file, name, number, file_bytes)[wanted] if found is None else found
            block = read_some(file, length)
        self._store(name, number, file_bytes, block)
        return block[wanted]

    def _pass_over(self, url: str, file: BinaryIO, name: str, number: int, file_bytes: int) -> bytes:
        """Read a whole file and keep each block of it; block ``number``. Only up to there where nothing can be kept."""
        self._warn("ranges", f"the server of '{url}' ignores byte ranges: shards are fetched whole")
        result = b""
        for i in range(-(-file_bytes // BLOCK_BYTES)):
            block = read_some(file, _length(i, file_bytes))
            kept = self._store(name, i, file_bytes, block)
            if i == number:
                result = block
            if len(block) < _length(i, file_bytes) or (i >= number and not kept):
                break
        return result

    def _store(self, name: str, number: int, file_bytes: int, block: bytes) -> bool:
        """Keep a block if it is whole; where it cannot be kept, the run goes on without."""
        if len(block) < _length(number, file_bytes) or len(block) > self.limit_bytes:
            return False
        part = self.folder / f".{uuid.uuid4().hex}.part"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._make_room(len(block))
            part.write_bytes(block)
            os.replace(part, self._path(name, number))
        except OSError as error:
            part.unlink(missing_ok=True)
            self._warn(
                "disk", f"cache '{self.folder}' cannot be written ({error.strerror}): blocks are fetched each time"
            )
            return False
        return True

    def _make_room(self, size: int) -> None:
        with self._lock:
            if self._room < size:
                self._room = self._evict(size)
            self._room -= size

    def _evict(self, size: int) -> int:
        """Remove what was read longest ago until ``size`` more fit; how much this process may write before it looks again."""
        files = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                try:
                    info = entry.stat()
                except FileNotFoundError:
                    continue
                files.append((info.st_mtime_ns, info.st_size, entry.path))
        total = sum(n for _, n, _ in files)
        if total + size > self.limit_bytes:
            target = min(self.limit_bytes - size, int(self.limit_bytes * _KEPT))
            for _, n, path in sorted(files):
                if total <= target:
                    break
                Path(path).unlink(missing_ok=True)
                total -= n
        return max(size, (self.limit_bytes - total) // _SHARE)

    def _path(self, name: str, number: int) -> Path:
        return self.folder / f"{name}-{number:06d}"

    def _locked(self, name: str) -> threading.Lock:
        with self._lock:
            return self._locks[name]

    def _warn(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            log.warning("%s", message)


def _length(number: int, file_bytes: int) -> int:
    return min(BLOCK_BYTES, file_bytes - number * BLOCK_BYTES)
