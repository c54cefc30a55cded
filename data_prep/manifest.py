"""manifest.tsv: one row a scan, what every stage of data_prep hands to the next."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.shards import write_text
from g3n.config import G3nError

MODALITIES = ("T1", "T1c", "T2", "FLAIR")
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Scan:
    """``subject`` and ``session`` are BIDS labels without their prefix, ``path`` is relative to the manifest's root."""

    subject: str
    session: str
    modality: str
    path: str
    age_years: float | None
    sex: str | None
    diagnosis: str | None
    cohort: str | None
    field_strength_t: float | None
    days_from_baseline: float | None
    split: str

    @property
    def variables(self) -> dict[str, Any]:
        """The six clinical variables; a missing one is None."""
        names = ("modality", "age_years", "sex", "diagnosis", "cohort", "field_strength_t")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Manifest:
    root: Path
    scans: tuple[Scan, ...]


COLUMNS = tuple(f.name for f in dataclasses.fields(Scan))
_NUMBERS = ("age_years", "field_strength_t", "days_from_baseline")
_NEEDED = ("subject", "session", "modality", "path", "split")


def write_manifest(path: Path, root: Path, scans: list[Scan], about: dict[str, Any]) -> None:
    """Write manifest.tsv and, beside it, <name>.json with the root and ``about``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(COLUMNS)]
    lines += ["\t".join(_text(getattr(scan, name)) for name in COLUMNS) for scan in scans]
    write_text(path.with_suffix(".json"), json.dumps({"root": str(root.resolve()), **about}, indent=1) + "\n")
    write_text(path, "\n".join(lines) + "\n")


def read_manifest(path: Path) -> Manifest:
    """Raises G3nError for a missing file, missing columns, a bad value (with its line) or paths that leave the root."""
    about = path.with_suffix(".json")
    if not path.is_file():
        raise G3nError(f"manifest '{path}' does not exist; make one with python -m data_prep scan")
    try:
        root = Path(json.loads(about.read_text(encoding="utf-8"))["root"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise G3nError(f"'{about}' is missing or damaged; it belongs beside '{path.name}': scan again") from error
    rows = read_table(path)
    scans = tuple(_scan(path, line, row) for line, row in enumerate(rows, 2))
    if not scans:
        raise G3nError(f"manifest '{path}' has no scans")
    seen: dict[tuple[str, str, str], int] = {}
    split_of: dict[str, str] = {}
    for line, scan in enumerate(scans, 2):
        first = seen.setdefault((scan.subject, scan.session, scan.modality), line)
        if first != line:
            raise G3nError(f"manifest '{path}' lines {first} and {line} are the same scan; keep one")
        if split_of.setdefault(scan.subject, scan.split) != scan.split:
            raise G3nError(f"manifest '{path}' line {line}: subject '{scan.subject}' is in two splits; keep it in one")
    return Manifest(root, scans)


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a tab-separated file with a header; names and values stripped. Raises G3nError where it cannot be read."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            header = [name.strip() for name in next(rows, [])]
            return [dict(zip(header, (v.strip() for v in row), strict=False)) for row in rows if any(row)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise G3nError(f"table '{path}' cannot be read: {error}; expected tab-separated UTF-8 text") from error


def _scan(path: Path, line: int, row: dict[str, str]) -> Scan:
    missing = [name for name in COLUMNS if name not in row]
    if missing:
        raise G3nError(
            f"manifest '{path}' line {line} lacks {', '.join(missing)}; expected columns {', '.join(COLUMNS)}"
        )
    values: dict[str, Any] = {name: None if row[name] in ("", "n/a") else row[name] for name in COLUMNS}
    for name in _NUMBERS:
        try:
            values[name] = None if values[name] is None else float(values[name])
        except ValueError:
            values[name] = math.nan
        if values[name] is not None and not math.isfinite(values[name]):
            raise G3nError(f"manifest '{path}' line {line}: {name} is '{row[name]}'; expected a number or n/a")
    for name in _NEEDED:
        if values[name] is None:
            raise G3nError(f"manifest '{path}' line {line}: {name} is missing")
    for name, known in (("modality", MODALITIES), ("split", SPLITS)):
        if values[name] not in known:
            raise G3nError(f"manifest '{path}' line {line}: {name} is '{values[name]}'; known: {', '.join(known)}")
    if Path(values["path"]).is_absolute() or ".." in Path(values["path"]).parts:
        raise G3nError(f"manifest '{path}' line {line}: path '{values['path']}' leaves the root; keep it relative")
    for name in ("subject", "session"):
        if not values[name].isalnum():
            raise G3nError(
                f"manifest '{path}' line {line}: {name} '{values[name]}' must be letters and digits, as in BIDS"
            )
    return Scan(**values)


def _text(value: Any) -> str:
    if value is None:
        return "n/a"
    return f"{value:.10g}" if isinstance(value, float) else str(value)
