"""From found images and tables of people to manifest.tsv: whose each scan is, what is known, and in which split."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import xxhash

from data_prep.fields import Codebook, age_of, number, sex_of, word_of
from data_prep.manifest import SPLITS, Scan, write_manifest
from g3n.config import G3nError

DAYS_PER_YEAR = 365.25
_MAX_SIDECAR_BYTES = 1 << 22


@dataclass(frozen=True)
class Found:
    """One image that counts; ``path`` and ``mask`` are relative to the root, ``run`` counts images alike from 1."""

    subject: str
    session: str
    modality: str
    path: Path
    run: int = 1
    space: str | None = None
    mask: str | None = None


@dataclass(frozen=True)
class People:
    """What tables say, with the columns of ``fields.COLUMNS``: of a subject, and of a subject's session."""

    subjects: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    sessions: Mapping[str, Mapping[str, Mapping[str, str]]] = field(default_factory=dict)
    codes: Codebook = field(default_factory=Codebook)

    def of(self, subject: str, session: str) -> dict[str, str]:
        return {**self.subjects.get(subject, {}), **self.sessions.get(subject, {}).get(session, {})}

    def group(self, subject: str, session: str) -> str | None:
        """Who must share a split with ``subject``: the same person under another label, or a family."""
        row = self.of(subject, session)
        if row.get("person"):
            return row["person"]
        return f"family:{row['family']}" if row.get("family") else None


@dataclass(frozen=True)
class Shares:
    """Of subjects: what goes to validation and test, decided by ``seed``."""

    val: float
    test: float
    seed: int

    def __post_init__(self) -> None:
        if not (0 <= self.val < 1 and 0 <= self.test < 1 and self.val + self.test < 1):
            raise G3nError(f"val {self.val:g} and test {self.test:g} must be shares that leave something to train on")


def write_scans(
    root: Path,
    output: Path,
    found: Sequence[Found],
    people: People,
    shares: Shares,
    skipped: Mapping[str, str],
    notes: list[str],
) -> list[str]:
    """Write ``output`` (and its .json); lines that say what was found and what was left out."""
    by_subject: dict[str, list[Found]] = defaultdict(list)
    for image in found:
        by_subject[image.subject].append(image)
    groups = {s: people.group(s, images[0].session) or s for s, images in by_subject.items()}
    split_of = split_subjects(sorted(set(groups.values())), shares.seed, shares.val, shares.test)
    license_tag = license_of(root)
    scans = [
        scan
        for subject, images in sorted(by_subject.items())
        for scan in _scans(root, images, people, split_of[groups[subject]], license_tag, notes)
    ]
    known = set(people.subjects) | set(people.sessions)
    notes += [f"'{p}' of the table of participants has no scan here" for p in sorted(known - set(by_subject))]
    notes += [f"'{s}' has no row in the table of participants" for s in sorted(set(by_subject) - known) if known]
    parts = {"train": 1 - shares.val - shares.test, "val": shares.val, "test": shares.test}
    write_manifest(
        output, root, scans, {"seed": shares.seed, "shares": parts, "skipped": dict(skipped), "notes": notes}
    )
    return report_lines(scans, skipped, notes, output)


def license_of(root: Path) -> str:
    """open, nc or unknown by the License of dataset_description.json."""
    try:
        text = str(json.loads((root / "dataset_description.json").read_text(encoding="utf-8")).get("License", ""))
    except (OSError, ValueError, AttributeError, RecursionError):
        return "unknown"
    plain = re.sub(r"[^a-z0-9]", "", text.lower())
    if "nc" in plain.removeprefix("cc").removeprefix("by")[:2] or "noncommercial" in plain:
        return "nc"
    return "open" if plain.startswith(("cc0", "ccby", "pddl", "pd", "publicdomain")) else "unknown"


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


def _scans(
    root: Path, images: Sequence[Found], people: People, split: str, license_tag: str, notes: list[str]
) -> list[Scan]:
    """The rows of one subject, in time order."""
    subject = images[0].subject
    who, codes = f"'{subject}'", people.codes
    labels = sorted({image.session for image in images})
    own = {s: people.sessions.get(subject, {}).get(s, {}) for s in labels}
    given = {s: number(own[s].get("days"), f"{who} session {s} days", -1e6, 1e6, notes) for s in labels}
    ages = {s: age_of(own[s].get("age"), f"{who} session {s} age", codes, notes) for s in labels}
    days = _days(labels, given, ages)
    first_age = age_of(people.subjects.get(subject, {}).get("age"), f"{who} age", codes, notes)
    rows = []
    for image in images:
        row = people.of(subject, image.session)
        day, age = days[image.session], ages[image.session]
        if age is None and first_age is not None and (day is not None or len(labels) == 1):
            age = round(first_age + (day or 0) / DAYS_PER_YEAR, 2)
        field_t = number(row.get("field"), f"{who} field strength", 0.01, 30, notes)
        rows.append(
            Scan(
                subject=subject,
                session=image.session,
                modality=image.modality,
                path=image.path.as_posix(),
                age_years=age,
                sex=sex_of(row.get("sex"), who, codes, notes),
                diagnosis=word_of(row.get("diagnosis"), f"{who} diagnosis", codes.diagnosis, notes),
                cohort=word_of(row.get("cohort"), f"{who} cohort", {}, notes),
                field_strength_t=_sidecar_field(root / image.path, notes) or field_t,
                days_from_baseline=day,
                split=split,
                run=image.run,
                group=people.group(subject, images[0].session),
                license=license_tag,
                space=image.space,
                mask=image.mask,
            )
        )
    order = {label: i for i, label in enumerate(labels)}
    return sorted(
        rows,
        key=lambda r: (
            math.inf if r.days_from_baseline is None else r.days_from_baseline,
            order[r.session],
            r.modality,
            r.run,
        ),
    )


def _days(
    labels: Sequence[str], given: Mapping[str, float | None], ages: Mapping[str, float | None]
) -> dict[str, float | None]:
    """Days from the first visit: as given, else from the ages; 0 for an only visit; None where nothing is known."""
    days = dict(given)
    if any(d is None for d in days.values()):
        days = {s: None if (age := ages[s]) is None else age * DAYS_PER_YEAR for s in labels}
    known = [d for d in days.values() if d is not None]
    if len(labels) == 1:
        return {labels[0]: 0.0}
    return {s: None if (d := days[s]) is None else float(round(d - min(known))) for s in labels}


def _sidecar_field(image: Path, notes: list[str]) -> float | None:
    path = image.with_name(re.sub(r"\.nii(\.gz)?$", ".json", image.name))
    if path == image or not path.is_file() or path.stat().st_size > _MAX_SIDECAR_BYTES:
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get("MagneticFieldStrength")
    except (OSError, ValueError, AttributeError, RecursionError):
        notes.append(f"'{path.name}' is not a JSON object; its field strength is missing")
        return None
    return number(None if value is None else str(value), f"'{path.name}' MagneticFieldStrength", 0.01, 30, notes)


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
    general = [note for note in notes if not note.startswith("'")]
    lines += [f"note: {note}" for note in general[:10]]
    if len(notes) > len(general):  # they name people: a terminal's output is passed on easily
        lines.append(f"note: {len(notes) - len(general)} on single subjects or files")
    if notes or skipped:
        lines.append(f"all of it stands in {output.with_suffix('.json')}")
    return lines
