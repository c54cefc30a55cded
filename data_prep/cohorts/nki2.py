"""NKI-Rockland, second release: images in MNI space of people of nki (https://fcon_1000.projects.nitrc.org/indi/enhanced), CC BY-NC."""

from __future__ import annotations

from pathlib import Path

from data_prep.cohorts.contract import Cohort, Harmonise, Image, Row
from data_prep.cohorts.derived import one_version
from data_prep.cohorts.nki import find
from data_prep.cohorts.nki import phenotypes as nki_phenotypes


def discover(root: Path) -> list[Image]:
    return one_version((0 if "_space-MNI" in image.path else 1, image) for image in find(root, "mni"))


def phenotypes(root: Path, harmonise: Harmonise) -> list[Row]:
    """Its own table holds ids alone: put nki's beside it as nki_participants.tsv. Ages are then those at enrolment in nki,
    for the 114 of 256 people who were there."""
    return nki_phenotypes(root, harmonise)


COHORT = Cohort("nki2", "nc", discover, phenotypes, min_match=0.35)
