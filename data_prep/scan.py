"""From a BIDS folder to manifest.tsv: which scans there are, of whom, and in which split. No image is read."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from data_prep.manifest import SPLITS, Scan, read_table, write_manifest
from g3n.config import G3nError

_SUBJECT = re.compile(r"sub-[A-Za-z0-9]+")
_SESSION = re.compile(r"ses-[A-Za-z0-9]+")
_FILE = re.compile(r"(?P<entities>(?:[A-Za-z]+-[A-Za-z0-9+]+_)*)(?P<suffix>[A-Za-z0-9]+)\.nii(\.gz)?")
_SUFFIXES = {
    "t1w": "T1", "t1": "T1", "mprage": "T1",
    "t1c": "T1c", "t1ce": "T1c", "t1gd": "T1c", "t1cw": "T1c",
    "t2w": "T2", "t2": "T2",
    "flair": "FLAIR", "t2flair": "FLAIR",
}  # fmt: skip

# Names of columns, lower case without anything but letters and digits; the first one present counts.
_COLUMNS = {
    "age": ("age", "ageyears", "ageatscan", "scanage", "ageatvisit", "ageatsession", "agey", "patientage"),
    "sex": ("sex", "gender", "patientsex"),
    "diagnosis": ("diagnosis", "dx", "group", "participantgroup", "condition", "pathology", "disease"),
    "cohort": ("cohort", "dataset", "study", "site", "source"),
    "field": ("fieldstrengtht", "fieldstrength", "magneticfieldstrength", "tesla", "scannerfield"),
    "days": ("daysfrombaseline", "daysfromfirst", "dayssincebaseline", "days", "daysfromfirstscan", "elapseddays"),
    "subject": ("participantid", "subjectid", "subject", "participant"),
    "session": ("sessionid", "session", "visit", "visitid"),
}
_SEX = {"f": "F", "female": "F", "w": "F", "woman": "F", "2": "F", "m": "M", "male": "M", "man": "M", "1": "M"}
_DIAGNOSES = {
    **dict.fromkeys(("hc", "cn", "control", "controls", "healthy", "healthycontrol", "normal", "nc"), "HC"),
    **dict.fromkeys(("ad", "alzheimer", "alzheimers", "alzheimersdisease", "alzheimerdisease"), "AD"),
}
_MISSING = ("", "n/a", "na", "nan", "none", "null", "unknown", "-", "?", ".")


@dataclass(frozen=True)
class Found:
    """One image that counts."""

    subject: str
    session: str
    modality: str
    path: Path


def scan_bids(root: Path, output: Path, seed: int, val: float, test: float) -> list[str]:
    """Write ``output`` (and its .json) and return lines that say what was found and what was left out.

    Raises G3nError for a folder that is missing or has no scans, or shares that leave nothing to train on.
    """
    if not (0 <= val < 1 and 0 <= test < 1 and val + test < 1):
        raise G3nError(f"val {val:g} and test {test:g} must be shares that leave something to train on")
    if not root.is_dir():
        raise G3nError(f"BIDS folder '{root}' does not exist")
    skipped: dict[str, str] = {}
    found = find_scans(root, skipped)
    if not found:
        raise G3nError(
            f"'{root}' has no T1w, T2w or FLAIR scan in sub-*/[ses-*/]anat/*.nii.gz ({len(skipped)} other files); "
            f"expected a BIDS folder"
        )
    notes: list[str] = []
    people = _participants(root, notes)
    split_of = split_subjects(sorted({f.subject for f in found}), seed, val, test)
    license_tag = _license(root)
    by_subject: dict[str, list[Found]] = defaultdict(list)
    for image in found:
        by_subject[image.subject].append(image)
    sessions = _session_rows(root, sorted(by_subject))
    scans = [
        scan
        for subject, images in sorted(by_subject.items())
        for scan in _scans(
            root, images, people.get(subject, {}), sessions.get(subject, {}), split_of[subject], license_tag, notes
        )
    ]
    notes += [f"participants.tsv: '{p}' has no scan here" for p in sorted(set(people) - set(by_subject))]
    notes += [f"participants.tsv has no row for '{s}'" for s in sorted(set(by_subject) - set(people)) if people]
    about = {"seed": seed, "shares": {"train": 1 - val - test, "val": val, "test": test}}
    write_manifest(output, root, scans, {**about, "skipped": skipped, "notes": notes})
    return report_lines(scans, skipped, notes, output)


def _license(root: Path) -> str:
    """open, nc or unknown by the License of dataset_description.json."""
    try:
        text = str(json.loads((root / "dataset_description.json").read_text(encoding="utf-8")).get("License", ""))
    except (OSError, ValueError, AttributeError):
        return "unknown"
    plain = re.sub(r"[^a-z0-9]", "", text.lower())
    if "nc" in plain.removeprefix("cc").removeprefix("by")[:2] or "noncommercial" in plain:
        return "nc"
    return "open" if plain.startswith(("cc0", "ccby", "pddl", "pd", "publicdomain")) else "unknown"


def find_scans(root: Path, skipped: dict[str, str]) -> list[Found]:
    """The images of the raw data, one a subject, session and modality; ``skipped`` gets every other one and why."""
    chosen: dict[tuple[str, str, str], Found] = {}
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and _SUBJECT.fullmatch(p.name)):
        for path in sorted(p for p in folder.rglob("*") if p.name.endswith((".nii", ".nii.gz"))):
            where = path.relative_to(root)
            middle = where.parts[1:-1]
            session = middle[0][4:] if middle and _SESSION.fullmatch(middle[0]) else "01"
            modality = modality_of(path.name)
            if middle[-1:] != ("anat",) or len(middle) > 2:
                skipped[str(where)] = "not in an anat folder"
            elif modality is None:
                skipped[str(where)] = "not T1w, contrast T1w, T2w or FLAIR"
            elif not path.is_file():
                skipped[str(where)] = "a link to nothing; fetch the file first"
            else:
                key = (folder.name[4:], session, modality)
                first = chosen.setdefault(key, Found(*key, where))
                if first.path != where:
                    skipped[str(where)] = f"a second {modality} of this session; '{first.path.name}' is used"
    return list(chosen.values())


def modality_of(name: str) -> str | None:
    """T1, T1c, T2, FLAIR by the file's BIDS suffix and ce- entity, or None."""
    match = _FILE.fullmatch(name)
    if not match:
        return None
    modality = _SUFFIXES.get(match["suffix"].lower())
    contrast = any(part.lower().startswith("ce-") for part in match["entities"].split("_"))
    if contrast:
        return "T1c" if modality in ("T1", "T1c") else None
    return modality


def split_subjects(subjects: Sequence[str], seed: int, val: float, test: float) -> dict[str, str]:
    """train, val or test by a seeded hash of the label: a subject keeps its split when others come or go.

    Only where so few subjects left a wanted split empty, the nearest subject is moved there.
    """
    place = {s: xxhash.xxh3_64_intdigest(f"{seed}:{s}") / 2**64 for s in subjects}
    split_of = {s: "test" if u < test else "val" if u < test + val else "train" for s, u in place.items()}
    for split, share, edge in (("train", 1 - val - test, 1.0), ("val", val, test + val), ("test", test, 0.0)):
        if share > 0 and split not in split_of.values():
            counts = Counter(split_of.values())
            spare = [s for s in subjects if counts[split_of[s]] > 1]
            if spare:
                split_of[min(spare, key=lambda s: abs(place[s] - edge))] = split
    return split_of


def _participants(root: Path, notes: list[str]) -> dict[str, dict[str, str]]:
    path = root / "participants.tsv"
    if not path.is_file():
        notes.append("no participants.tsv: age, sex, diagnosis and cohort are missing")
        return {}
    return {_label(row.get("subject", ""), "sub-"): row for row in map(_named, read_table(path))}


def _session_rows(root: Path, subjects: Sequence[str]) -> dict[str, dict[str, dict[str, str]]]:
    """Rows of sessions.tsv (one for all subjects) or sub-X/sub-X_sessions.tsv by subject and session."""
    table: dict[str, dict[str, dict[str, str]]] = defaultdict(dict)
    if (root / "sessions.tsv").is_file():
        for row in map(_named, read_table(root / "sessions.tsv")):
            table[_label(row.get("subject", ""), "sub-")][_label(row.get("session", ""), "ses-")] = row
    for subject in subjects:
        path = root / f"sub-{subject}" / f"sub-{subject}_sessions.tsv"
        if path.is_file():
            for row in map(_named, read_table(path)):
                table[subject][_label(row.get("session", ""), "ses-")] = row
    return table


def _named(row: Mapping[str, str]) -> dict[str, str]:
    """A row with our names of columns, missing values left out."""
    plain = {re.sub(r"[^a-z0-9]", "", name.lower()): value for name, value in row.items()}
    named = {}
    for name, aliases in _COLUMNS.items():
        value = next((plain[a] for a in aliases if a in plain), "")
        if value.lower() not in _MISSING:
            named[name] = value
    return named


def _scans(
    root: Path,
    images: Sequence[Found],
    person: Mapping[str, str],
    sessions: Mapping[str, Mapping[str, str]],
    split: str,
    license_tag: str,
    notes: list[str],
) -> list[Scan]:
    """The rows of one subject, in time order."""
    who = f"sub-{images[0].subject}"
    labels = sorted({image.session for image in images})
    given = {s: _number(sessions.get(s, {}).get("days"), f"{who} ses-{s} days", -1e6, 1e6, notes) for s in labels}
    ages = {s: _number(sessions.get(s, {}).get("age"), f"{who} ses-{s} age", 0, 120, notes) for s in labels}
    days = _days(labels, given, ages)
    first_age = _number(person.get("age"), f"{who} age", 0, 120, notes)
    rows = []
    for image in images:
        row = {**person, **sessions.get(image.session, {})}
        day, age = days[image.session], ages[image.session]
        if age is None and first_age is not None and (day is not None or len(labels) == 1):
            age = round(first_age + (day or 0) / 365.25, 2)
        field = _number(row.get("field"), f"{who} field strength", 0.01, 30, notes)
        rows.append(
            Scan(
                subject=image.subject,
                session=image.session,
                modality=image.modality,
                path=image.path.as_posix(),
                age_years=age,
                sex=_word(row.get("sex"), _SEX, f"{who} sex", notes, strict=True),
                diagnosis=_word(row.get("diagnosis"), _DIAGNOSES, f"{who} diagnosis", notes),
                cohort=_word(row.get("cohort"), {}, f"{who} cohort", notes),
                field_strength_t=_sidecar_field(root / image.path, notes) or field,
                days_from_baseline=day,
                split=split,
                license=license_tag,
                space="mni" if "_space-MNI" in image.path.name else None,
            )
        )
    order = {label: i for i, label in enumerate(labels)}
    return sorted(
        rows,
        key=lambda r: (
            math.inf if r.days_from_baseline is None else r.days_from_baseline,
            order[r.session],
            r.modality,
        ),
    )


def _days(
    labels: Sequence[str], given: Mapping[str, float | None], ages: Mapping[str, float | None]
) -> dict[str, float | None]:
    """Days from the first visit: as given, else from the ages; 0 for an only visit; None where nothing is known."""
    days = dict(given)
    if any(d is None for d in days.values()):
        days = {s: None if (age := ages[s]) is None else age * 365.25 for s in labels}
    known = [d for d in days.values() if d is not None]
    if len(labels) == 1:
        return {labels[0]: 0.0}
    return {s: None if (d := days[s]) is None else float(round(d - min(known))) for s in labels}


def _sidecar_field(image: Path, notes: list[str]) -> float | None:
    path = image.with_name(re.sub(r"\.nii(\.gz)?$", ".json", image.name))
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get("MagneticFieldStrength")
    except (OSError, ValueError, AttributeError):
        notes.append(f"'{path.name}' is not a JSON object; its field strength is missing")
        return None
    return _number(None if value is None else str(value), f"'{path.name}' MagneticFieldStrength", 0.01, 30, notes)


def _number(text: str | None, what: str, low: float, high: float, notes: list[str]) -> float | None:
    """A number within bounds; '42Y', '042y' and '90+' are understood, anything else is noted and missing."""
    if text is None:
        return None
    match = re.fullmatch(r"[+]?(-?\d+(?:[.,]\d+)?)\s*(?:[yY]|years?|[tT]|\+)?", text.strip())
    value = float(match[1].replace(",", ".")) if match else math.nan
    if not low <= value <= high:
        notes.append(f"{what} is '{text}'; expected a number from {low:g} to {high:g}, taken as missing")
        return None
    return value


def _word(
    text: str | None, aliases: Mapping[str, str], what: str, notes: list[str], strict: bool = False
) -> str | None:
    """A level's name: an alias harmonized, anything else as it stands (or, if ``strict``, noted and missing)."""
    if text is None:
        return None
    plain = re.sub(r"[^a-z0-9]", "", text.lower())
    if plain in aliases:
        return aliases[plain]
    if strict or not text.isprintable() or len(text) > 80:
        known = f"one of {', '.join(sorted(set(aliases.values())))}" if strict else "at most 80 printable characters"
        notes.append(f"{what} is {text[:80]!r}; expected {known}, taken as missing")
        return None
    return text


def _label(text: str, prefix: str) -> str:
    return text.removeprefix(prefix)


def report_lines(scans: Sequence[Scan], skipped: Mapping[str, str], notes: Sequence[str], output: Path) -> list[str]:
    """What a scan command prints: counts, what is missing, what was left out."""
    subjects = {s: {x.subject for x in scans if x.split == s} for s in SPLITS}
    counts = Counter(scan.modality for scan in scans)
    lines = [
        f"{len(scans)} scans of {len({s.subject for s in scans})} subjects in {output}",
        "subjects: " + ", ".join(f"{split} {len(subjects[split])}" for split in SPLITS),
        "modalities: " + ", ".join(f"{m} {n}" for m, n in sorted(counts.items())),
    ]
    unknown = {
        name: n
        for name in ("age_years", "sex", "diagnosis", "cohort", "field_strength_t", "days_from_baseline")
        if (n := sum(getattr(scan, name) is None for scan in scans))
    }
    if unknown:
        lines.append("missing: " + ", ".join(f"{name} of {n} scans" for name, n in unknown.items()))
    reasons = Counter(reason.split(";")[0] for reason in skipped.values())
    lines += [f"left out: {n} files, {reason}" for reason, n in sorted(reasons.items())]
    lines += [f"note: {note}" for note in notes[:10]]
    if len(notes) > 10 or skipped:
        lines.append(f"all of it stands in {output.with_suffix('.json')}")
    return lines
