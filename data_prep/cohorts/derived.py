"""What pipelines made of an image: count it once, and take its brain mask along."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from data_prep.cohorts.contract import Image
from data_prep.cohorts.tables import files, plain_id

_FILE = (
    r"(?:^|/)sub-(?P<sub>\d{7})/(?:ses-[A-Za-z0-9]+/)?anat/sub-\d{7}(?:_ses-(?P<ses>[A-Za-z0-9]+))?"
    r"(?:_acq-(?P<acq>[A-Za-z0-9]+))?(?:_run-(?P<run>\d+))?(?P<space>_space-MNI[A-Za-z0-9]*)?(?:_res-\d+)?"
    r"(?P<prep>_desc-preproc)?_T1w\.nii\.gz$"
)


def one_version(ranked: Iterable[tuple[int, Image]]) -> list[Image]:
    """Of each visit and modality the images of lowest rank; of those alike in run and acquisition, the shortest name.

    A folder may hold a raw image, what a pipeline made of it, and that in several spaces: one head must not count twice.
    """
    visits: dict[tuple[str | None, str, str, str], list[tuple[int, Image]]] = defaultdict(list)
    for rank, image in ranked:
        visits[image.site, image.subject, image.session, image.modality].append((rank, image))
    kept: list[Image] = []
    for found in visits.values():
        least = min(rank for rank, _ in found)
        alike: dict[tuple[int, str], Image] = {}
        for image in sorted((i for rank, i in found if rank == least), key=lambda i: (len(i.path), i.path)):
            alike.setdefault((image.run, image.acq), image)
        kept += alike.values()
    return kept


def brain_mask(root: Path, path: str) -> str | None:
    """The mask beside a desc-preproc image of fMRIPrep or qsiprep, which keeps the skull; None where there is none."""
    mask = re.sub(r"_desc-preproc_T1w(?=\.nii)", "_desc-brain_mask", path)
    return mask if mask != path and (root / mask).is_file() else None


def seven_digits(root: Path) -> Iterator[tuple[int, Image]]:
    """Ranked T1 images under INDI's seven-digit ids: fMRIPrep's in MNI space first, as in the published set, then its
    native ones, then raw, defaced heads. ``subject`` is without zeros, as tables write it."""
    for path, m in files(root, _FILE):
        rank = 0 if m["space"] else 1 if m["prep"] else 2
        subject = plain_id(m["sub"], path)
        session, run, acq = m["ses"] or "1", int(m["run"] or 1), m["acq"] or ""
        space = "mni" if m["space"] else "native_defaced"
        yield rank, Image(path, subject, "T1", session, run, acq, space=space, mask=brain_mask(root, path))
