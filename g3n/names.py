"""What names of scans say, and keyed hashes of subject labels: the only names that leave a folder of raw data."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from pathlib import Path

from g3n.config import G3nError

_BIDS_FILE = re.compile(r"(?P<entities>(?:[A-Za-z]+-[A-Za-z0-9+]+_)*)(?P<suffix>[A-Za-z0-9]+)\.nii(\.gz)?")
_SUFFIXES = {
    "t1w": "T1", "t1": "T1", "mprage": "T1",
    "t1c": "T1c", "t1ce": "T1c", "t1gd": "T1c", "t1cw": "T1c",
    "t2w": "T2", "t2": "T2",
    "flair": "FLAIR", "t2flair": "FLAIR",
}  # fmt: skip


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


def bids_entities(name: str) -> dict[str, str]:
    """The entities of a BIDS file name (``sub``, ``ses``, ``run``, ...), keys in lower case; empty for any other name."""
    match = _BIDS_FILE.fullmatch(name)
    parts = match["entities"].split("_")[:-1] if match else []
    return {key.lower(): value for key, _, value in (part.partition("-") for part in parts)}


def modality_of(name: str) -> str | None:
    """T1, T1c, T2, FLAIR by the file's BIDS suffix and ce- entity, or None."""
    match = _BIDS_FILE.fullmatch(name)
    if not match:
        return None
    modality = _SUFFIXES.get(match["suffix"].lower())
    if "ce" in bids_entities(name):
        return "T1c" if modality in ("T1", "T1c") else None
    return modality
