"""The phenotypes a manifest row may carry, with their ranges and levels: nothing else leaves a cohort's tables."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass

DIAGNOSES = (
    "HC", "MCI", "AD", "PD", "PRODROMAL", "SWEDD", "ASD", "ADHD", "SCZ", "SZA", "BP", "GBM", "GLIOMA", "PED_MIXED",
)  # fmt: skip
LICENSES = ("open", "nc", "dua", "unknown")
SPACES = ("native", "native_defaced", "native_stripped", "mni", "mni_stripped", "t88", "oasis2_raw", "brats")
"""State of an image as it arrives: with skull or stripped, native or already on an atlas (docs/data_preparation.md)."""


@dataclass(frozen=True)
class Number:
    low: float
    high: float


Levels = tuple[str, ...]
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+/-]{0,39}")
_NOT_PLAIN = re.compile(r"[^A-Za-z0-9 ._+/-]+")
_DATE = re.compile(r"\d{4}[-./]?[01]\d[-./]?[0-3]\d|[0-3]?\d[-./][01]?\d[-./](19|20)\d\d")

# The first five are clinical variables of the model, the others are for probes and splits by site.
VALUES: dict[str, Number | Levels | None] = {
    "age_years": Number(0, 120),
    "sex": ("F", "M"),
    "diagnosis": DIAGNOSES,
    "field_strength_t": Number(0.01, 30),
    "days_from_baseline": Number(-1, 40000),
    "age_precision": ("exact", "month", "year", "bin2", "bin5", "enrol"),
    "diagnosis_source": ("visit", "baseline", "cohort_default"),
    "diagnosis_detail": None,
    "site": None,
    "manufacturer": None,
    "scanner_model": None,
    "handedness": ("R", "L", "A"),
    "education_years": Number(0, 30),
    "apoe_e4_count": Number(0, 2),
    "mmse": Number(0, 30),
    "moca": Number(0, 30),
    "cdr_global": Number(0, 3),
    "cdr_sb": Number(0, 18),
    "mds_updrs_iii": Number(0, 132),
    "updrs_state": ("OFF", "ON", "UNTREATED"),
    "gds15": Number(0, 15),
    "scopa_aut": Number(0, 69),
    "who_grade": Number(1, 4),
    "idh": ("wildtype", "mutant"),
    "mgmt": ("methylated", "unmethylated"),
    "mgmt_index": Number(0, 17),
    "codel_1p19q": ("intact", "codeleted"),
    "os_days": Number(0, 20000),
    "os_event": Number(0, 1),
    "resection": ("GTR", "STR", "biopsy"),
    "kps": Number(0, 100),
    "commercial_use": ("yes", "no"),
    "score_delay_days": Number(0, 180),  # largest distance of a joined value's visit from the scan
}
"""Name -> range, levels, or None for a short plain name. A value outside is dropped and noted, never passed on."""

MODEL_VARIABLES = ("age_years", "sex", "diagnosis", "field_strength_t", "days_from_baseline")
PHENOTYPES = tuple(name for name in VALUES if name not in MODEL_VARIABLES)


def valid(name: str, value: str | float) -> bool:
    """Whether ``value`` may stand for ``name``. Raises KeyError for a name that is not in VALUES."""
    kind = VALUES[name]
    if isinstance(kind, Number):
        return not isinstance(value, str) and math.isfinite(value) and kind.low <= value <= kind.high
    if not isinstance(value, str):
        return False
    return value in kind if kind is not None else is_plain(value)


def is_plain(text: str) -> bool:
    """A short name of letters, digits and few signs, without a date: what a level of a variable may look like."""
    return _PLAIN.fullmatch(text) is not None and not _DATE.search(text)


def plain_name(text: str) -> str | None:
    """``text`` without accents and odd signs, at most 40 characters; None where nothing is left or it holds a date."""
    ascii_text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    name = " ".join(_NOT_PLAIN.sub(" ", ascii_text).split()).lstrip(" ._+/-")[:40].strip()
    return name if is_plain(name) else None


def clean(values: Mapping[str, str | float | None], who: str, notes: list[str]) -> dict[str, str | float]:
    """The values that are there and valid; each invalid one adds a line to ``notes``."""
    kept: dict[str, str | float] = {}
    for name, value in values.items():
        if value is None:
            continue
        if valid(name, value):
            kept[name] = value
        else:
            notes.append(f"{who}: {name} is {str(value)[:60]!r}; expected {_expected(name)}, taken as missing")
    return kept


def _expected(name: str) -> str:
    kind = VALUES[name]
    if isinstance(kind, Number):
        return f"a number from {kind.low:g} to {kind.high:g}"
    return "a short plain name" if kind is None else f"one of {', '.join(kind)}"
