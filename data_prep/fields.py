"""What people write in tables and file names, read as they mean it: columns, sexes, ages, modalities."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.schema import plain_name
from g3n.config import G3nError

# Names of columns, lower case without anything but letters and digits; the first one present counts.
COLUMNS = {
    "age": ("age", "ageyears", "ageatscan", "scanage", "ageatvisit", "ageatsession", "agey", "patientage"),
    "sex": ("sex", "gender", "patientsex"),
    "diagnosis": ("diagnosis", "dx", "group", "participantgroup", "condition", "pathology", "disease"),
    "cohort": ("cohort", "dataset", "study", "site", "source"),
    "field": ("fieldstrengtht", "fieldstrength", "magneticfieldstrength", "tesla", "scannerfield"),
    "days": ("daysfrombaseline", "daysfromfirst", "dayssincebaseline", "days", "daysfromfirstscan", "elapseddays"),
    "subject": ("participantid", "subjectid", "subject", "participant", "patientid", "id"),
    "session": ("sessionid", "session", "visit", "visitid", "timepoint"),
    "family": ("familyid", "family"),
    "person": ("dupgroup", "personid", "person"),
    "path": ("path", "file", "filename", "filepath", "image", "nifti"),
    "modality": ("modality", "contrast", "sequence", "suffix"),
}
_SEX = {"f": "F", "female": "F", "w": "F", "woman": "F", "m": "M", "male": "M", "man": "M"}
_DIAGNOSES = {
    **dict.fromkeys(("hc", "cn", "control", "controls", "healthy", "healthycontrol", "normal", "nc"), "HC"),
    **dict.fromkeys(("ad", "alzheimer", "alzheimers", "alzheimersdisease", "alzheimerdisease"), "AD"),
}
_MISSING = ("", "n/a", "na", "nan", "none", "null", "unknown", "-", "?", ".")

# Words of a file or series name, lower case; those of a line are tried together, FLAIR before T2, contrast before T1.
_MODALITY_WORDS: tuple[tuple[str, frozenset[str]], ...] = (
    ("", frozenset(("t2star", "t2starw", "star", "hemo", "pd", "pdw", "dwi", "dti", "adc", "bold", "swi", "asl", "localizer", "scout",
                    "mask", "seg", "dseg", "label", "labels", "segm", "segmentation", "phase", "inv1", "inv2", "mra"))),
    ("FLAIR", frozenset(("flair", "t2f", "t2flair", "darkfluid"))),
    ("T1c", frozenset(("t1c", "t1gd", "t1ce", "t1wce", "t1cw", "t1post", "t1km"))),
    ("T2", frozenset(("t2", "t2w", "tse", "fse"))),
    ("T1", frozenset(("t1", "t1w", "t1n", "mprage", "mpr", "memprage", "fspgr", "spgr", "bravo", "tfe", "ffe", "t1mprage"))),
)  # fmt: skip
_CONTRAST = frozenset(("gd", "gad", "contrast", "km", "ce", "postcontrast"))
_SPELLINGS = ((r"T1\+C", "T1c"), (r"T2\*", "t2star"), (r"da(rk)?[-_ ]?fl(uid)?(?![a-z])", "darkfluid"))


@dataclass(frozen=True)
class Codebook:
    """What the codes of a table mean. ``sex`` and ``diagnosis`` map a code to a word; numbers mean nothing without one."""

    sex: Mapping[str, str] = field(default_factory=dict)
    diagnosis: Mapping[str, str] = field(default_factory=dict)
    months: bool = False  # ages are in months


def read_codebook(path: Path, sex_codes: str | None, notes: list[str]) -> Codebook:
    """The Levels and Units of participants.json (``path``, may be missing), and ``sex_codes`` such as "1=M,2=F".

    Raises G3nError for sex codes of another form.
    """
    tree: object = {}
    if path.is_file() and path.stat().st_size < 1 << 22:
        try:
            tree = json.loads(path.read_text(encoding="utf-8-sig"))
        except (OSError, ValueError, RecursionError):
            notes.append(f"{path.name} is not JSON: the meaning of codes is not known")
    about = {plain(name): value for name, value in tree.items()} if isinstance(tree, dict) else {}

    def of(name: str, key: str) -> object:
        column = next((about[a] for a in COLUMNS[name] if a in about), None)
        return column.get(key) if isinstance(column, dict) else None

    def levels(name: str) -> dict[str, str]:
        table = of(name, "Levels")
        rows = table.items() if isinstance(table, dict) else ()
        texts = {k: v.get("Description", v.get("Label")) if isinstance(v, dict) else v for k, v in rows}
        return {k.strip().lower(): v.strip() for k, v in texts.items() if isinstance(v, str)}

    sex = {k: s for k, v in levels("sex").items() if (s := _SEX.get(plain(v)))}
    if sex_codes:
        for pair in sex_codes.split(","):
            code, _, word = pair.partition("=")
            if plain(word) not in _SEX or not code.strip():
                raise G3nError(f"sex codes are '{sex_codes}'; expected codes of men and women such as 1=M,2=F")
            sex[code.strip().lower()] = _SEX[plain(word)]
    return Codebook(sex, levels("diagnosis"), "month" in str(of("age", "Units")).lower())


def named(row: Mapping[str, str]) -> dict[str, str]:
    """A row with our names of columns, missing values left out."""
    by_plain = {plain(name): value for name, value in row.items()}
    found = {}
    for name, aliases in COLUMNS.items():
        value = next((by_plain[a] for a in aliases if a in by_plain), "")
        if value.lower() not in _MISSING:
            found[name] = value
    return found


def number(text: str | None, what: str, low: float, high: float, notes: list[str]) -> float | None:
    """A number within bounds; '42Y', '042y' and '89+' are understood, anything else is noted and missing."""
    if text is None:
        return None
    match = re.fullmatch(r"[+]?(-?\d+(?:[.,]\d+)?)\s*(?:[yY]|years?|[tT]|\+)?", text.strip())
    value = float(match[1].replace(",", ".")) if match else math.nan
    if not low <= value <= high:
        notes.append(f"{what} is '{text}'; expected a number from {low:g} to {high:g}, taken as missing")
        return None
    return value


def age_of(text: str | None, what: str, codes: Codebook, notes: list[str]) -> float | None:
    """Age in years, from months where the codebook says so."""
    if not codes.months:
        return number(text, what, 0, 120, notes)
    months = number(text, f"{what} (months)", 0, 1440, notes)
    return None if months is None else round(months / 12, 3)


def sex_of(text: str | None, who: str, codes: Codebook, notes: list[str]) -> str | None:
    """F or M; a number only by the codebook: cohorts disagree on which is which."""
    if text is None:
        return None
    key = re.sub(r"^(-?\d+)\.0+$", r"\1", text.strip().lower())
    found = codes.sex.get(key) or _SEX.get(plain(text))
    if found is None and re.fullmatch(r"-?\d+", key):
        note = "sex is a number whose meaning participants.json does not say (Levels); give --sex-codes such as 1=M,2=F"
        if note not in notes:
            notes.append(note)
    elif found is None:
        notes.append(f"{who} sex is {text[:80]!r}; expected one of F, M, taken as missing")
    return found


def word_of(text: str | None, what: str, levels: Mapping[str, str], notes: list[str]) -> str | None:
    """A diagnosis or cohort: a code by its level, a known alias harmonized, anything else as it stands."""
    if text is None:
        return None
    text = levels.get(text.strip().lower(), text)
    if plain(text) in _DIAGNOSES:
        return _DIAGNOSES[plain(text)]
    name = plain_name(text)
    note = ""
    if name is None:
        note = f"{what} is {text[:80]!r}; expected a short name without a date, taken as missing"
    elif name != text:
        note = f"{text[:80]!r} of {what.rsplit(' ', 1)[-1]} is written as '{name}'"
    if note and note not in notes:
        notes.append(note)
    return name


def modality_of_words(text: str) -> str | None:
    """T1, T1c, T2 or FLAIR by the words of a file or series name in any order; '' for another kind of image, None where
    they tell nothing."""
    for spelling, word in _SPELLINGS:
        text = re.sub(spelling, word, text, flags=re.IGNORECASE)
    found = {w.lower() for w in re.findall(r"[A-Za-z0-9]+", text)}
    for modality, known in _MODALITY_WORDS:
        if known & found:
            return "T1c" if modality == "T1" and _CONTRAST & found else modality
    return None


def plain(text: str) -> str:
    """Lower case, letters and digits alone."""
    return re.sub(r"[^a-z0-9]", "", text.lower())
