"""Made-up cohort folders: empty image files and tables with real headers and codes, no real row."""

from __future__ import annotations

from pathlib import Path

from data_prep.cohorts import load_cohort
from data_prep.cohorts.contract import Harmonise, Image
from data_prep.cohorts.join import Joined, Report, join


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")


def table(path: Path, header: str, *rows: str, encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(("\n".join([header, *rows]) + "\n").encode(encoding))


def images(name: str, root: Path) -> dict[str, Image]:
    """What is discovered, by path."""
    return {image.path: image for image in load_cohort(name).discover(root)}


def joined(name: str, root: Path, harmonise: Harmonise = "clean") -> tuple[dict[str, Joined], Report]:
    """Each image with its values, by path, and the report. The match-rate floor of the cohort holds."""
    cohort, report = load_cohort(name), Report()
    found = join(cohort, cohort.discover(root), cohort.phenotypes(root, harmonise), report)
    return {j.image.path: j for j in found}, report
