"""From a cohort's folder, through its adapter, to manifest.tsv."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from data_prep.cohorts import load_cohort
from data_prep.cohorts.contract import Cohort, Harmonise, Image
from data_prep.cohorts.join import Joined, Report, join
from data_prep.manifest import MODALITIES, Scan, write_manifest
from data_prep.scan import DAYS_PER_YEAR, Shares, report_lines, split_subjects
from data_prep.schema import PHENOTYPES
from g3n.config import G3nError


def scan_cohort(root: Path, name: str, output: Path, harmonise: Harmonise, shares: Shares) -> list[str]:
    """Write ``output`` (and its .json) for one of the known cohorts; lines that say what was found.

    Raises G3nError for a folder without the cohort's images, tables that do not fit them, or an unknown code.
    """
    cohort = load_cohort(name)
    if not root.is_dir():
        raise G3nError(f"folder '{root}' of cohort {name} does not exist")
    images = cohort.discover(root)
    if not images:
        raise G3nError(
            f"'{root}' has no image named as in {name}; data_prep/cohorts/{name}.py shows the expected names"
        )
    report = Report()
    joined = join(cohort, images, cohort.phenotypes(root, harmonise), report)
    split_of = split_subjects(sorted({j.group for j in joined}), shares.seed, shares.val, shares.test)
    scans = _scans(cohort, joined, split_of)
    about = {
        "cohort": name,
        "harmonise": harmonise,
        "seed": shares.seed,
        "warnings": report.warnings,
        "notes": report.notes,
    }
    write_manifest(output, root, scans, about)
    lines = report_lines(scans, {}, report.notes, output)
    return [*(f"warning: {warning}" for warning in report.warnings), *lines]


def _scans(cohort: Cohort, joined: Sequence[Joined], split_of: dict[str, str]) -> list[Scan]:
    days = _days(joined)
    labels = _labels(joined)
    runs = _runs(joined)
    scans = []
    for j in joined:
        plan = cohort.plan(j.image)
        given = _number(j, "days_from_baseline")
        scans.append(
            Scan(
                subject=labels[_subject(j.image)],
                session=_plain(j.image.session),
                modality=j.image.modality,
                path=j.image.path,
                age_years=_number(j, "age_years"),
                sex=_text(j, "sex"),
                diagnosis=_text(j, "diagnosis"),
                cohort=cohort.name,
                field_strength_t=_number(j, "field_strength_t"),
                days_from_baseline=days[j.image.path] if given is None else given,
                split=split_of[j.group],
                run=runs[j.image.path],
                group=j.group,
                license="open" if j.values.get("commercial_use") == "yes" else cohort.license,
                space=plan.space,
                axes=None if plan.axes is None else ",".join(map(str, plan.axes)),
                spacing_mm=None if plan.spacing_mm is None else ",".join(f"{mm:g}" for mm in plan.spacing_mm),
                mask=j.image.mask if plan.use_mask else None,
                phenotypes=_phenotypes(j),
            )
        )
    order = {m: i for i, m in enumerate(MODALITIES)}
    return sorted(
        scans,
        key=lambda s: (s.subject, s.days_from_baseline or 0.0, s.session, order[s.modality], s.run),
    )


def _phenotypes(j: Joined) -> dict[str, str | float]:
    found = {name: value for name, value in j.values.items() if name in PHENOTYPES}
    return found if j.delay_days is None else {**found, "score_delay_days": float(j.delay_days)}


def _subject(image: Image) -> tuple[str, str]:
    """Ids may be unique within a site only, so a site is part of the name; harmless where they are unique anyway."""
    return image.site or "", image.subject


def _labels(joined: Sequence[Joined]) -> dict[tuple[str, str], str]:
    """A BIDS label a person: letters and digits of the id, with the site before it where ids repeat between sites."""
    sites: dict[str, set[str]] = defaultdict(set)
    for j in joined:
        sites[_plain(j.image.subject)].add(j.group)
    labels = {}
    for j in joined:
        plain = _plain(j.image.subject)
        repeated = len(sites[plain]) > 1
        labels[_subject(j.image)] = _plain(j.image.site or "") + plain if repeated else plain
    return labels


def _runs(joined: Sequence[Joined]) -> dict[str, int]:
    """A number from 1 for each image of one subject, session and modality, by run, then acquisition: none overwrites another."""
    together: dict[tuple[str, ...], list[Image]] = defaultdict(list)
    for j in joined:
        together[(*_subject(j.image), _plain(j.image.session), j.image.modality)].append(j.image)
    runs = {}
    for images in together.values():
        for i, image in enumerate(sorted(images, key=lambda i: (i.run, i.acq, i.path)), 1):
            runs[image.path] = i
    return runs


def _days(joined: Sequence[Joined]) -> dict[str, float | None]:
    """Days from each subject's first scan: by dates, else by exact ages; 0 for an only session."""
    by_subject: dict[tuple[str, str], list[Joined]] = defaultdict(list)
    for j in joined:
        by_subject[_subject(j.image)].append(j)
    days: dict[str, float | None] = {}
    for visits in by_subject.values():
        when: dict[str, float | None] = {}
        exact = all(v.values.get("age_precision", "exact") == "exact" for v in visits)
        for v in visits:
            age = v.values.get("age_years")
            if all(x.image.date for x in visits) and v.image.date:
                when[v.image.path] = float(v.image.date.toordinal())
            elif len({x.image.session for x in visits}) == 1:
                when[v.image.path] = 0.0
            else:
                when[v.image.path] = float(age) * DAYS_PER_YEAR if exact and isinstance(age, float | int) else None
        known = [d for d in when.values() if d is not None]
        distinct = len({v.image.session for v in visits}) == 1 or len(set(known)) > 1
        for path, d in when.items():
            days[path] = float(round(d - min(known))) if d is not None and distinct else None
    return days


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]", "", text) or "x"


def _text(j: Joined, name: str) -> str | None:
    value = j.values.get(name)
    return value if isinstance(value, str) else None


def _number(j: Joined, name: str) -> float | None:
    value = j.values.get(name)
    return float(value) if isinstance(value, float | int) else None
