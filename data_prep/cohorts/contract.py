"""What a cohort adapter is: three functions and a few facts. Adding one: docs/adding_a_cohort.md."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Harmonise = Literal["clean", "paper"]
"""clean: labels as true at the scan. paper: label semantics of the published harmonisation, where they move its figures."""


@dataclass(frozen=True)
class Image:
    """One image file, known from its path alone; ``discover`` never opens an image.

    ``subject`` is the cohort's own id as its tables write it. ``date`` (of the scan) and ``session`` are for joining and
    for time order; neither id nor date leaves the manifest's folder.
    """

    path: str  # relative to the cohort's root, with /
    subject: str
    modality: str  # T1, T1c, T2 or FLAIR
    session: str = "1"
    run: int = 1
    acq: str = ""
    date: datetime.date | None = None
    site: str | None = None
    space: str = "native"  # one of schema.SPACES: the state in which the file arrives
    mask: str | None = None  # a brain mask on the image's grid, relative to root
    person: str | None = None  # who this is in every cohort, where cohorts share people
    values: Mapping[str, str | float] = field(default_factory=dict)  # what the path alone tells; tables come before it


@dataclass(frozen=True)
class Row:
    """Values of one subject: at a ``session``, at a ``date``, or (with neither) at every scan.

    Names are those of schema.VALUES, besides ``birth_date`` (a date, from which the age at each scan is computed) and
    ``family`` (text; relatives share a split). Several rows may hold one visit; a table each is natural.
    """

    subject: str
    values: Mapping[str, str | float | datetime.date | None]
    session: str | None = None
    date: datetime.date | None = None
    site: str | None = None  # where ids are unique within a site only


@dataclass(frozen=True)
class Plan:
    """How preprocess must treat an image (docs/data_preparation.md has the routes)."""

    space: str
    axes: tuple[int, int, int] | None = None  # transpose of the voxel array, where the header is known to be wrong
    spacing_mm: tuple[float, float, float] | None = None  # true spacing after ``axes``, where the header's is wrong
    use_mask: bool = False  # multiply by Image.mask first


def plan_by_space(image: Image) -> Plan:
    """The plan of a cohort without peculiarities."""
    return Plan(image.space, use_mask=image.mask is not None)


@dataclass(frozen=True)
class Cohort:
    """``phenotypes`` takes the root and the harmonise mode. Shares are of 1: ``min_match`` of images that must find a
    row, ``female_share`` of subjects (checked to +-0.05 on 50 or more subjects, a warning), ``site_female_share`` of the
    subjects whom the tables give to a site (10 or more)."""

    name: str
    license: str  # open, nc or dua
    discover: Callable[[Path], list[Image]]
    phenotypes: Callable[[Path, Harmonise], list[Row]]
    plan: Callable[[Image], Plan] = plan_by_space
    min_match: float = 0.0
    female_share: float | None = None
    site_female_share: Mapping[str, float] = field(default_factory=dict)
    ids_unique_within: Literal["cohort", "site"] = "cohort"
    has_relatives: bool = False  # without a family in the rows they may fall into two splits: a warning
    sites_must_pass: bool = False  # a site's female share off by over 0.15 is an error: sex codes are probably inverted
