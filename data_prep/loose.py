"""Images in any folders, with or without a table: whose they are and what they show, by words of their paths."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from data_prep.cohorts.tables import read_table
from data_prep.fields import modality_of_words, named, plain, read_codebook
from data_prep.formats import SUFFIXES
from data_prep.manifest import MODALITIES
from data_prep.scan import Found, People, Shares, write_scans
from g3n.config import G3nError

_LONGEST_ID = 8  # words
_MAX_SIDECAR = 1 << 22
_Row = dict[str, str]


def scan_loose(
    root: Path, output: Path, shares: Shares, table: Path | None = None, sex_codes: str | None = None
) -> list[str]:
    """Write ``output`` (and its .json) for NIfTI, Analyze, MGH or MGZ files anywhere below ``root``.

    ``table`` (CSV, TSV or Excel) has a row a file (a column ``path``, relative to ``root``) or a row a subject (or a
    subject's session) whose id is found as words of the path. Without a table the first folder is the subject.
    Modalities come from the column ``modality``, else from the words of the file's and its folders' names. Raises
    G3nError where nothing is found, a file of the table is missing, or two ids would have one label.
    """
    if not root.is_dir():
        raise G3nError(f"folder '{root}' does not exist")
    if not table and (root.name.startswith("sub-") or any(root.glob("ses-*")) or (root / "anat").is_dir()):
        raise G3nError(f"'{root}' looks like one subject of a BIDS folder; give the folder that holds sub-*")
    skipped: dict[str, str] = {}
    notes: list[str] = []
    rows = [named(row) for row in read_table(table)] if table else []
    if table and not all("subject" in row for row in rows):
        raise G3nError(f"table '{table}' has rows without a subject; name its column participant_id, subject or id")
    labels = _labels(row["subject"] for row in rows)
    if any("path" in row for row in rows):
        found = _by_row(root, rows, labels, skipped)
    else:
        found = _by_words(root, rows, labels, skipped)
    if not found:
        reasons = "; ".join(sorted(set(skipped.values())))[:300] or f"no {', '.join(SUFFIXES)} below it"
        raise G3nError(f"'{root}' has no scan that can be placed: {reasons}")
    codes = read_codebook(root / "participants.json", sex_codes, notes)
    subjects: dict[str, _Row] = {}
    sessions: dict[str, dict[str, _Row]] = defaultdict(dict)
    for row in rows:
        label = labels[row["subject"]]
        if "session" in row or "path" in row:
            sessions[label].setdefault(_label(row.get("session", "01")), row)
        else:
            subjects[label] = row
    return write_scans(root, output, _numbered(found), People(subjects, sessions, codes), shares, skipped, notes)


def _by_row(root: Path, rows: Sequence[_Row], labels: dict[str, str], skipped: dict[str, str]) -> list[Found]:
    found = []
    for row in rows:
        if "path" not in row:
            continue
        path = Path(row["path"])
        if path.is_absolute() or ".." in path.parts or not (root / path).is_file():
            raise G3nError(f"the table's file '{path}' is not below '{root}'; give paths relative to it")
        modality = _modality(row.get("modality")) or _modality_of(root, path)
        if modality is None:
            skipped[path.as_posix()] = "neither a column modality nor its name says T1, T1c, T2 or FLAIR"
        else:
            found.append(Found(labels[row["subject"]], _label(row.get("session", "01")), modality, path))
    return found


def _by_words(root: Path, rows: Sequence[_Row], labels: dict[str, str], skipped: dict[str, str]) -> list[Found]:
    ids = {plain(name): label for name, label in labels.items()}
    visits: dict[str, dict[str, str]] = defaultdict(dict)
    for row in rows:
        if "session" in row:
            visits[labels[row["subject"]]][plain(row["session"])] = _label(row["session"])
    found = []
    for path in _files(root):
        where = path.as_posix()
        modality = _modality_of(root, path)
        if modality is None:
            skipped[where] = "its name does not say T1, T1c, T2 or FLAIR"
            continue
        if not rows and len(path.parts) < 2:
            skipped[where] = "not in a subject's folder, and no table says whose it is"
            continue
        subject = _longest(where, ids) if rows else _label(path.parts[0])
        if subject is None:
            skipped[where] = "no id, or more than one, of the table in its path"
            continue
        session = _longest(where, visits[subject]) if visits[subject] else _visit(path, subject)
        if session is None:
            skipped[where] = "no session, or more than one, of the table in its path"
            continue
        found.append(Found(subject, session, modality, path))
    return found


def _numbered(found: Sequence[Found]) -> list[Found]:
    """Images of one subject, session and modality get runs 1, 2, ... in the order of their paths."""
    number: dict[tuple[str, str, str], int] = defaultdict(int)
    result = []
    for f in sorted(found, key=lambda f: f.path.as_posix()):
        key = (f.subject, f.session, f.modality)
        number[key] += 1
        result.append(Found(*key, f.path, number[key]))
    return result


def _files(root: Path) -> list[Path]:
    found = []
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(d for d in inner if not d.startswith("."))
        base = Path(folder).relative_to(root)
        for name in sorted(names):
            # of a pair of files the header stands for both
            if name.lower().endswith(SUFFIXES) and not name.lower().endswith(".img"):
                found.append(base / name)
    return found


def _modality_of(root: Path, path: Path) -> str | None:
    """By the file's name, else by its folders' from the inside; T1 is T1c where dcm2niix's sidecar names a contrast agent."""
    for word in (path.name, *reversed(path.parts[:-1])):
        modality = modality_of_words(word)
        if modality is not None:
            return "T1c" if modality == "T1" and _has_contrast(root / path) else modality or None
    return None


def _has_contrast(image: Path) -> bool:
    sidecar = image.with_name(re.sub(r"\.nii(\.gz)?$", "", image.name) + ".json")
    try:
        with open(sidecar, encoding="utf-8") as file:
            agent = json.loads(file.read(_MAX_SIDECAR)).get("ContrastBolusAgent", "")
    except (OSError, ValueError, AttributeError, RecursionError):
        return False
    return plain(str(agent)) not in ("", "no", "none", "nocontrast", "without", "na", "0")


def _modality(text: str | None) -> str | None:
    if text is None:
        return None
    return text if text in MODALITIES else modality_of_words(text) or None


def _longest(where: str, ids: dict[str, str]) -> str | None:
    """The label of the longest id that stands in ``where`` as whole words; None where there is none or a draw."""
    words = [plain(w) for w in re.split(r"[^A-Za-z0-9]+", where) if w]
    joined = {
        "".join(words[i : i + n]) for n in range(1, _LONGEST_ID + 1) for i in range(len(words) - n + 1)
    } & ids.keys()
    longest = [j for j in joined if len(j) == max(map(len, joined))]
    return ids[longest[0]] if len(longest) == 1 else None


def _visit(path: Path, subject: str) -> str:
    """The folder below the subject's, unless it only says what the image shows."""
    for i, part in enumerate(path.parts[:-2]):
        inner = path.parts[i + 1]
        if subject in (_label(part), plain(part)) and not modality_of_words(inner):
            return _label(inner)
    return "01"


def _labels(ids: Iterable[str]) -> dict[str, str]:
    labels: dict[str, str] = {}
    for name in ids:
        labels[name] = _label(name)
    owner: dict[str, str] = {}
    for name, label in labels.items():
        if owner.setdefault(label.lower(), name) != name:
            raise G3nError(f"ids '{owner[label.lower()]}' and '{name}' differ in signs alone; rename one of them")
    return labels


def _label(text: str) -> str:
    label = re.sub(r"[^A-Za-z0-9]", "", text)[:64]
    if not label:
        raise G3nError(f"id '{text}' has no letter or digit; rename it")
    return label
