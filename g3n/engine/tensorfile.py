"""One .safetensors file written by many: where each number goes follows from names and shapes alone.

So every rank writes what it owns straight to its place, nothing is gathered, and the file does not depend on who wrote it.
Format: https://huggingface.co/docs/safetensors (8 bytes length, JSON header, data without holes).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL"}


@dataclass(frozen=True)
class Layout:
    """``begin`` of each tensor in bytes from the start of the file."""

    header: bytes
    begin: Mapping[str, int]
    bytes: int


def layout(tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> Layout:
    """The file of tensors with these shapes and types."""
    table, spans, at = {}, {}, 0
    for name in sorted(tensors):
        shape, dtype = tensors[name]
        size = math.prod(shape) * dtype.itemsize
        table[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        spans[name] = at
        at += size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return Layout(header, {name: len(header) + begin for name, begin in spans.items()}, len(header) + at)


def write_header(path: Path, plan: Layout) -> None:
    """Raises OSError."""
    _write_at(path, [(0, plan.header)])


def write_parts(path: Path, plan: Layout, parts: list[tuple[str, int, Tensor]]) -> None:
    """Write flat CPU tensors to their places: (name, first number of the flattened tensor, values). Raises OSError."""
    places = [(plan.begin[name] + start * values.element_size(), values) for name, start, values in parts]
    _write_at(path, [(at, values.numpy().data.cast("B")) for at, values in places if values.numel()])


def _write_at(path: Path, chunks: list[tuple[int, bytes | memoryview]]) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        for at, chunk in chunks:
            done = 0
            while done < len(chunk):
                done += os.pwrite(fd, chunk[done : done + (1 << 30)], at + done)
        os.fsync(fd)
    finally:
        os.close(fd)
