"""manifest.tsv: one row a scan, what every stage of data_prep hands to the next."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.schema import LICENSES, PHENOTYPES, SPACES, VALUES, Number, is_plain, valid
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
    run: int = 1  # of several images of one session and modality
    group: str | None = (
        None  # subjects of one group (a family, a person in two cohorts) share a split; None: the subject
    )
    license: str = "unknown"  # open, nc, dua or unknown
    space: str | None = None  # state of the file as it arrives (schema.SPACES); None: preprocess finds out
    axes: str | None = None  # "2,0,1": transpose of the voxels where the header is known to be wrong
    spacing_mm: str | None = None  # "1,1,1.25": true spacing after ``axes``
    mask: str | None = None  # brain mask on the scan's grid, relative to the root
    flag: str | None = None  # what preprocess found doubtful; pack refuses it unless told otherwise
    phenotypes: Mapping[str, str | float] = field(default_factory=dict)  # of schema.PHENOTYPES

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What identifies a scan."""
        return self.subject, self.session, self.modality, self.run

    @property
    def person(self) -> str:
        """Who must not be in two splits."""
        return self.group or self.subject

    @property
    def variables(self) -> dict[str, Any]:
        """The six clinical variables; a missing one is None."""
        names = ("modality", "age_years", "sex", "diagnosis", "cohort", "field_strength_t")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Manifest:
    root: Path
    scans: tuple[Scan, ...]


COLUMNS = tuple(f.name for f in dataclasses.fields(Scan) if f.name != "phenotypes")
_OPTIONAL = COLUMNS[COLUMNS.index("run") :]
_NUMBERS = ("age_years", "field_strength_t", "days_from_baseline")
_NEEDED = ("subject", "session", "modality", "path", "split")


def write_manifest(path: Path, root: Path, scans: list[Scan], about: dict[str, Any]) -> None:
    """Write manifest.tsv and, beside it, <name>.json with ``about`` and the root (Path(): the manifest's own folder)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    extra = [name for name in PHENOTYPES if any(name in scan.phenotypes for scan in scans)]
    lines = ["\t".join([*COLUMNS, *extra])]
    for scan in scans:
        cells = [_text(getattr(scan, name)) for name in COLUMNS]
        lines.append("\t".join(cells + [_text(scan.phenotypes.get(name)) for name in extra]))
    write_text(
        path.with_suffix(".json"),
        json.dumps({"root": "." if root == Path() else str(root.resolve()), **about}, indent=1) + "\n",
    )
    write_text(path, "\n".join(lines) + "\n")


def read_manifest(path: Path) -> Manifest:
    """Raises G3nError for a missing file, missing columns, a bad value (with its line) or paths that leave the root."""
    manifest, problems = parse_manifest(path)
    if problems:
        raise G3nError(problems[0])
    if not manifest.scans:
        raise G3nError(f"manifest '{path}' has no scans")
    return manifest


def parse_manifest(path: Path) -> tuple[Manifest, list[str]]:
    """The rows that are right, and a line for each that is not. Raises G3nError where the file itself cannot be read."""
    about = path.with_suffix(".json")
    if not path.is_file():
        raise G3nError(f"manifest '{path}' does not exist; make one with python -m data_prep scan")
    try:
        root = path.parent / json.loads(about.read_text(encoding="utf-8"))["root"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise G3nError(f"'{about}' is missing or damaged; it belongs beside '{path.name}': scan again") from error
    scans, problems = [], []
    seen: dict[tuple[str, str, str, int], int] = {}
    split_of: dict[str, str] = {}
    for line, row in enumerate(read_table(path), 2):
        try:
            scan = _scan(path, line, row)
        except G3nError as error:
            problems.append(str(error))
            continue
        first = seen.setdefault(scan.key, line)
        if first != line:
            problems.append(f"manifest '{path}' lines {first} and {line} are the same scan; keep one")
        elif split_of.setdefault(scan.person, scan.split) != scan.split:
            problems.append(f"manifest '{path}' line {line}: subject '{scan.person}' is in two splits; keep it in one")
        else:
            scans.append(scan)
    return Manifest(root, tuple(scans)), problems


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
    where = f"manifest '{path}' line {line}"
    missing = [name for name in COLUMNS if name not in row and name not in _OPTIONAL]
    if missing:
        raise G3nError(f"{where} lacks {', '.join(missing)}; expected columns {', '.join(COLUMNS)}")
    values: dict[str, Any] = {name: None if row.get(name, "") in ("", "n/a") else row[name] for name in COLUMNS}
    for name in _NUMBERS:
        values[name] = _number(values[name], f"{where}: {name}")
    for name in _NEEDED:
        if values[name] is None:
            raise G3nError(f"{where}: {name} is missing")
    values["license"] = values["license"] or "unknown"
    known_levels = {"modality": MODALITIES, "split": SPLITS, "license": LICENSES, "space": (None, *SPACES)}
    for name, known in known_levels.items():
        if values[name] not in known:
            raise G3nError(f"{where}: {name} is '{values[name]}'; known: {', '.join(str(k) for k in known)}")
    if not (values["run"] or "1").isdigit() or not 1 <= int(values["run"] or 1) <= 999:
        raise G3nError(f"{where}: run is '{values['run']}'; expected a number from 1 to 999")
    values["run"] = int(values["run"] or 1)
    for name in ("path", "mask"):
        if values[name] and (Path(values[name]).is_absolute() or ".." in Path(values[name]).parts):
            raise G3nError(f"{where}: {name} '{values[name]}' leaves the root; keep it relative")
    for name in ("subject", "session"):
        if not (values[name].isalnum() and values[name].isascii() and len(values[name]) <= 64):
            raise G3nError(f"{where}: {name} '{values[name]}' must be at most 64 letters and digits, as in BIDS")
    for name in ("diagnosis", "cohort"):
        if values[name] is not None and not is_plain(values[name]):
            raise G3nError(
                f"{where}: {name} '{values[name][:60]}' must be at most 40 letters, digits and . _ + / -, no date"
            )
    for name, form in (("axes", "three different of 0, 1, 2"), ("spacing_mm", "three numbers above 0")):
        if values[name] is not None and not _three(name, values[name]):
            raise G3nError(f"{where}: {name} is '{values[name]}'; expected {form}")
    return Scan(**values, phenotypes=_phenotypes(row, where))


def _three(name: str, text: str) -> bool:
    if name == "axes":
        return sorted(text.split(",")) == ["0", "1", "2"]
    return re.fullmatch(r"(\d{1,2}(\.\d{1,6})?,){2}\d{1,2}(\.\d{1,6})?", text) is not None and "0" not in text.split(
        ","
    )


def _phenotypes(row: Mapping[str, str], where: str) -> dict[str, str | float]:
    found: dict[str, str | float] = {}
    for name in PHENOTYPES:
        if row.get(name, "") in ("", "n/a"):
            continue
        numeric = isinstance(VALUES[name], Number)
        value = _number(row[name], f"{where}: {name}") if numeric else row[name]
        assert value is not None
        if not valid(name, value):
            raise G3nError(f"{where}: {name} is '{row[name][:60]}', which data_prep/schema.py does not allow")
        found[name] = value
    return found


def _number(text: str | None, what: str) -> float | None:
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise G3nError(f"{what} is '{text}'; expected a number or n/a")
    return value


def _text(value: Any) -> str:
    if value is None:
        return "n/a"
    return f"{value:.10g}" if isinstance(value, float) else str(value)
