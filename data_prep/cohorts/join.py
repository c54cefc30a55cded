"""Images and table rows of a cohort -> values of each image: by session, else the nearest date, with the delay kept."""

from __future__ import annotations

import datetime
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from data_prep.cohorts.contract import Cohort, Image, Row
from data_prep.scan import DAYS_PER_YEAR
from data_prep.schema import clean
from g3n.config import G3nError

TOLERANCE_DAYS = 180
_FEW = 50  # subjects below which a share says nothing
_FEW_OF_A_SITE = 10


@dataclass(frozen=True)
class Joined:
    """One image with what the tables say of it. ``delay_days`` is the largest distance of a joined value's visit."""

    image: Image
    values: dict[str, str | float]
    group: str
    delay_days: int | None
    matched: bool


@dataclass
class Report:
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def join(cohort: Cohort, images: Sequence[Image], rows: Sequence[Row], report: Report) -> list[Joined]:
    """Values of each image, in the order of ``images``.

    For each value: rows of the image's session, else the nearest row within 180 days, else rows that hold for every scan.
    Rows equally near that disagree leave the value missing, with a note. Raises G3nError where fewer than
    ``cohort.min_match`` of the images find a row, or a site's share of women is far off and the cohort forbids that.
    """
    with_site = cohort.ids_unique_within == "site"
    table: dict[tuple[str | None, str], list[Row]] = defaultdict(list)
    for row in rows:
        table[row.site if with_site else None, row.subject].append(row)
    joined = [
        _join_one(cohort, image, table[image.site if with_site else None, image.subject], report) for image in images
    ]
    known = {(i.site if with_site else None, i.subject) for i in images}
    orphans = len({key for key, found in table.items() if found} - known)
    if orphans:
        report.notes.append(f"{orphans} subjects of the tables have no image here")
    matched = sum(j.matched for j in joined)
    report.notes.append(f"{matched} of {len(joined)} images found a row ({matched / max(1, len(joined)):.0%})")
    if joined and matched < cohort.min_match * len(joined):
        raise G3nError(
            f"{cohort.name}: only {matched} of {len(joined)} images found a row in the tables, expected at least "
            f"{cohort.min_match:.0%}; are tables and images of one release, and are ids written alike?"
        )
    _check_sexes(cohort, joined, rows, report)
    if cohort.has_relatives and not any(row.values.get("family") for row in rows):
        report.warnings.append(
            f"{cohort.name}: relatives take part and no table tells who; they may be in two splits. Add the families' table"
        )
    return joined


def _join_one(cohort: Cohort, image: Image, rows: Sequence[Row], report: Report) -> Joined:
    who = f"'{image.subject}'"
    values: dict[str, str | float | datetime.date | None] = {}
    delay: int | None = None
    for name in sorted({name for row in rows for name, value in row.values.items() if value is not None}):
        nearest, distance = _nearest(image, [row for row in rows if row.values.get(name) is not None])
        found = {row.values[name] for row in nearest}
        if len(found) > 1:
            report.notes.append(f"{who}: {len(nearest)} rows disagree on {name}; taken as missing")
        elif found:
            values[name] = found.pop()
            if distance is not None:
                delay = max(delay or 0, distance)
    if "diagnosis" not in values:
        values.pop("diagnosis_source", None)
    birth, family = values.pop("birth_date", None), values.pop("family", None)
    if isinstance(birth, datetime.date) and image.date and values.get("age_years") is None:
        values["age_years"] = round((image.date - birth).days / DAYS_PER_YEAR, 2)
    if image.site and values.get("site") is None:
        values["site"] = image.site
    plain = {name: value for name, value in values.items() if not isinstance(value, datetime.date)}
    plain = {**image.values, **plain}
    own = f"{image.site}:{image.subject}" if cohort.ids_unique_within == "site" else image.subject
    group = f"{cohort.name}:family:{family}" if family else image.person or f"{cohort.name}:{own}"
    return Joined(image, clean(plain, who, report.notes), group, delay, bool(rows))


def _nearest(image: Image, rows: Sequence[Row]) -> tuple[list[Row], int | None]:
    """The rows that count for ``image`` and their distance in days (None: not known by date)."""
    same = [row for row in rows if row.session is not None and row.session == image.session]
    if same:
        dated = [abs((row.date - image.date).days) for row in same if row.date and image.date]
        return same, max(dated, default=None)
    if image.date:
        near = [(abs((row.date - image.date).days), row) for row in rows if row.date is not None]
        near = [(distance, row) for distance, row in near if distance <= TOLERANCE_DAYS]
        if near:
            least = min(distance for distance, _ in near)
            return [row for distance, row in near if distance == least], least
    return [row for row in rows if row.session is None and row.date is None], None


def _check_sexes(cohort: Cohort, joined: Sequence[Joined], rows: Sequence[Row], report: Report) -> None:
    """Shares of women: of all who have images here, and of each site in the whole table (few of a site may be imaged)."""
    found = {(j.image.site, j.image.subject): str(j.values["sex"]) for j in joined if "sex" in j.values}
    if cohort.female_share is not None and len(found) >= _FEW:
        _check_share(cohort, None, list(found.values()), cohort.female_share, report)
    for site, expected in cohort.site_female_share.items():
        sexes = {r.subject: str(r.values["sex"]) for r in rows if r.values.get("sex") and _is_of(r, site)}
        if len(sexes) >= _FEW_OF_A_SITE:
            _check_share(cohort, site, list(sexes.values()), expected, report)


def _is_of(row: Row, site: str) -> bool:
    """'UM' is 'UM' or 'UM_1', not 'UMass'."""
    return str(row.site or row.values.get("site") or "").lower().split("_")[0] == site.lower()


def _check_share(cohort: Cohort, site: str | None, sexes: list[str], expected: float, report: Report) -> None:
    share = sexes.count("F") / len(sexes)
    off = round(abs(share - expected), 6)
    if off <= 0.05:
        return
    line = (
        f"{cohort.name}{f' site {site}' if site else ''}: {share:.0%} of {len(sexes)} subjects are women, expected "
        f"about {expected:.0%}; are the sex codes read the right way round?"
    )
    if site is not None and cohort.sites_must_pass and off > 0.15:
        raise G3nError(line)
    report.warnings.append(line)
