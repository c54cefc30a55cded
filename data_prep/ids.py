"""Keyed hashes of subject labels: the only names that leave the manifest's folder."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from pathlib import Path

from g3n.config import G3nError


def read_key(path: Path, output: Path) -> bytes:
    """The secret of the hashes, from ``path``; made there (32 random bytes, mode 0600) if missing.

    Raises G3nError for a key inside ``output`` (which may be passed on) or a damaged one.
    """
    if path.resolve().is_relative_to(output.resolve()):
        raise G3nError(f"key file '{path}' lies inside the output '{output}'; keep it elsewhere")
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_hex(32) + "\n")
        text = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise G3nError(f"key file '{path}' cannot be used: {error}") from error
    if not re.fullmatch(r"[0-9a-f]{64}", text):
        raise G3nError(f"key file '{path}' is damaged; expected 64 hexadecimal digits")
    return bytes.fromhex(text)


def hash_label(label: str, key: bytes) -> str:
    """Keyed BLAKE2b, 64 bits in hex: without the key neither a guess nor a list of labels finds a subject."""
    return hashlib.blake2b(label.encode(), digest_size=8, key=key).hexdigest()
