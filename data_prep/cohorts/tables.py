"""Reading the tables of cohorts: text as text, codes by explicit maps, sentinels missing before any cast."""

from __future__ import annotations

import csv
import datetime
import io
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from g3n.config import G3nError

MAX_TABLE_BYTES = 1 << 28
Table = list[dict[str, str]]


def find_table(root: Path, *patterns: str, needed: bool = True) -> Path | None:
    """The newest file below ``root`` or ``root``/* that fits one of the patterns: by the date that ends its name ('_01Jan2026',
    '_20260101'), then by its name.

    Raises G3nError where none does and it is ``needed``.
    """
    for pattern in patterns:
        found = sorted(p for p in (*root.glob(pattern), *root.glob(f"*/{pattern}")) if p.is_file())
        if found:
            return max(found, key=lambda p: (day(p.stem.rpartition("_")[2]) or datetime.date.min, p.name))
    if needed:
        raise G3nError(f"'{root}' has no table {' or '.join(patterns)}; put the cohort's phenotype file there")
    return None


def read_table(path: Path, columns: Sequence[str] = ()) -> Table:
    """Rows of a .csv, .tsv, .txt, .xlsx or .xls: every value is stripped text ('' if empty), names of columns are stripped.

    UTF-8 (with or without BOM), else Latin-1; the delimiter is taken from the header line, whatever the file's name says.
    Raises G3nError for a file that cannot be read or lacks one of ``columns``.
    """
    try:
        if path.stat().st_size > MAX_TABLE_BYTES:
            raise G3nError(f"table '{path}' is larger than {MAX_TABLE_BYTES >> 20} MiB; is it the right file?")
        rows = _sheet(path) if path.suffix.lower() in (".xlsx", ".xls") else _text_rows(path)
    except (OSError, csv.Error) as error:
        raise G3nError(f"table '{path}' cannot be read: {error}") from error
    header = [name.strip() for name in rows[0]] if rows else []
    missing = [name for name in columns if name not in header]
    if missing:
        raise G3nError(f"table '{path}' lacks the column {', '.join(missing)}; it has {', '.join(header)[:300]}")
    table = [dict(zip(header, (v.strip() for v in row), strict=False)) for row in rows[1:] if any(row)]
    return [{name: row.get(name, "") for name in header} for row in table]


def _text_rows(path: Path) -> list[list[str]]:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    first = text.split("\n", 1)[0]
    delimiter = max("\t,;", key=first.count)
    return [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) if row]


def _sheet(path: Path) -> list[list[str]]:
    import pandas as pd

    try:
        frame = pd.read_excel(path, header=None, dtype=str, keep_default_na=False)
    except ImportError as error:
        raise G3nError(f"reading '{path.name}' needs openpyxl and xlrd; run pip install 'g3n[prep]'") from error
    except Exception as error:  # pandas passes on whatever the engine raises
        raise G3nError(f"table '{path}' cannot be read: {str(error)[:200]}") from error
    return [[str(value) for value in row] for row in frame.to_numpy().tolist()]


def number(text: str, missing: Sequence[str] = (), what: str = "a value") -> float | None:
    """A number, or None for '', 'n/a', 'NA', 'NaN', '.' and the cohort's own sentinels in ``missing`` (compared as numbers
    too: '-9999' covers '-9999.0'). Raises G3nError for other text, which names ``what`` it was."""
    plain = text.strip()
    if plain.lower() in ("", "n/a", "na", "nan", ".", "none", "null") or plain in missing:
        return None
    try:
        value = float(plain)
    except ValueError:
        raise G3nError(f"{what} is '{plain[:60]}', which is not a number; correct the table") from None
    sentinels = [float(m) for m in missing if re.fullmatch(r"-?\d+(\.\d+)?", m)]
    return None if not math.isfinite(value) or value in sentinels else value


def code(text: str, levels: Mapping[str, str | None], what: str) -> str | None:
    """``levels[text]``, text compared without case and '1.0' as '1'. '' and 'n/a' are missing; None in ``levels`` too.

    Raises G3nError for any other text: a new code must be looked up, not guessed.
    """
    plain = re.sub(r"^(-?\d+)\.0+$", r"\1", text.strip())
    if plain.lower() in ("", "n/a", "na", "nan"):
        return None
    by_lower = {name.lower(): level for name, level in levels.items()}
    if plain.lower() not in by_lower:
        raise G3nError(f"{what} has the code '{plain[:60]}'; known: {', '.join(levels)}. Look it up and add it")
    return by_lower[plain.lower()]


def plain_id(text: str, what: str) -> str:
    """An id of digits without leading zeros: '0050952', '50952' and '50952.0' (from a spreadsheet) are one subject.

    Raises G3nError for any other text.
    """
    match = re.fullmatch(r"0*(\d+)(?:\.0+)?", text.strip())
    if match is None:
        raise G3nError(f"{what} is '{text.strip()[:20]}'; expected a subject's number, is it the right table?")
    return match[1]


def e4_count(text: str, what: str, missing: Sequence[str] = ()) -> float | None:
    """How many of two APOE alleles are e4: 'E3/E4', '3/4', '34', or '34.0' and '3.0/4.0' from a spreadsheet.

    Raises G3nError for any other text: a genotype that is not understood is not a non-carrier.
    """
    plain = re.sub(r"\.0+(?!\d)", "", text.strip()).upper()
    if plain in ("", "N/A", "NA", "NAN", *missing):
        return None
    match = re.fullmatch(r"E?([234])/?E?([234])", plain)
    if match is None:
        raise G3nError(f"{what} has the genotype '{text.strip()[:20]}'; expected two of 2, 3 and 4, as in E3/E4")
    return float(match.groups().count("4"))


def day(text: str) -> datetime.date | None:
    """YYYY-MM-DD, YYYYMMDD, MM/DD/YYYY, 01Jan2026 or MM/YYYY (its first day), else None."""
    plain = text.strip()[:10]
    for form, length in (("%Y-%m-%d", 10), ("%m/%d/%Y", 10), ("%Y%m%d", 8), ("%d%b%Y", 9), ("%m/%Y", 7)):
        try:
            return datetime.datetime.strptime(plain[:length], form).date()
        except ValueError:
            continue
    return None


def files(root: Path, pattern: str, prune: Sequence[str] = ()) -> Iterator[tuple[str, re.Match[str]]]:
    """(path relative to ``root`` with /, match) of every file whose path has a match of ``pattern``, sorted.

    Folders named in ``prune`` and hidden ones are not entered.
    """
    regex = re.compile(pattern)
    found = []
    for folder, inner, names in os.walk(root):
        inner[:] = [d for d in inner if d not in prune and not d.startswith(".")]
        base = Path(folder).relative_to(root).as_posix()
        for name in names:
            path = name if base == "." else f"{base}/{name}"
            if match := regex.search(path):
                found.append((path, match))
    yield from sorted(found, key=lambda item: item[0])
