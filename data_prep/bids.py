"""A BIDS folder, raw or derivatives: its images by their names and its tables. No image is read."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from data_prep.fields import named, read_codebook
from data_prep.manifest import read_table
from data_prep.scan import Found, People, Shares, write_scans
from g3n.config import G3nError
from g3n.names import bids_entities, modality_of

_SUBJECT = re.compile(r"sub-[A-Za-z0-9]+")
_SESSION = re.compile(r"ses-[A-Za-z0-9]+")
_NO_VOLUME = ("scout", "inplane", "mp2rageinv", "localizer")  # in acq-


def is_bids(root: Path) -> bool:
    """Whether ``root`` has sub-* folders."""
    return any(p.is_dir() and _SUBJECT.fullmatch(p.name) for p in root.iterdir())


def scan_bids(root: Path, output: Path, shares: Shares, sex_codes: str | None = None) -> list[str]:
    """Write ``output`` (and its .json) and return lines that say what was found and what was left out.

    Raises G3nError for a folder that is missing or has no scans.
    """
    if not root.is_dir():
        raise G3nError(f"BIDS folder '{root}' does not exist")
    skipped: dict[str, str] = {}
    notes: list[str] = []
    found = find_images(root, skipped)
    if not found:
        raise G3nError(
            f"'{root}' has no T1w, T2w or FLAIR scan in sub-*/[ses-*/]anat/*.nii.gz ({len(skipped)} other files); "
            f"expected a BIDS folder"
        )
    return write_scans(root, output, found, _people(root, found, sex_codes, notes), shares, skipped, notes)


def find_images(root: Path, skipped: dict[str, str]) -> list[Found]:
    """Every image a run and acquisition; ``skipped`` gets every other file and why.

    Versions of one image (native and in a template's space, reconstructions, echoes) count once: the native one first. A
    derivative's brain mask goes with it.
    """
    versions: dict[tuple[str, str, str, int, str], list[Path]] = defaultdict(list)
    for subject in sorted(p.name for p in root.iterdir() if p.is_dir() and _SUBJECT.fullmatch(p.name)):
        for where in _images_below(root, subject):
            entities = bids_entities(where.name)
            middle = where.parts[1:-1]
            session = middle[0][4:] if middle and _SESSION.fullmatch(middle[0]) else "01"
            modality = modality_of(where.name)
            acq = entities.get("acq", "")
            if middle[-1:] != ("anat",) or len(middle) > 2:
                skipped[str(where)] = "not in an anat folder"
            elif modality is None:
                skipped[str(where)] = "not T1w, contrast T1w, T2w or FLAIR"
            elif any(word in acq.lower() for word in _NO_VOLUME) or "inv" in entities:
                skipped[str(where)] = "a scout, an in-plane or an inversion image"
            elif entities.get("part", "mag") != "mag":
                skipped[str(where)] = "not a magnitude image"
            elif not (root / where).is_file():
                skipped[str(where)] = "a link to nothing; fetch the file first"
            else:
                run = entities.get("run", "1")
                key = (subject[4:], session, modality, int(run) if run.isdigit() else 1, acq)
                versions[key].append(where)
    images = []
    number: dict[tuple[str, str, str], int] = defaultdict(int)
    for (subject, session, modality, _, _), paths in sorted(versions.items()):
        best = min(paths, key=lambda p: (len(bids_entities(p.name)), "space" in bids_entities(p.name), p.name))
        for other in sorted(set(paths) - {best}):
            skipped[str(other)] = f"another version of an image; '{best.name}' is used"
        number[subject, session, modality] += 1
        space = "mni" if "_space-MNI" in best.name else None
        images.append(
            Found(subject, session, modality, best, number[subject, session, modality], space, _mask(root, best))
        )
    return images


def _images_below(root: Path, subject: str) -> list[Path]:
    found = []
    for folder, inner, names in os.walk(root / subject):
        inner.sort()
        base = Path(folder).relative_to(root)
        found += [base / name for name in sorted(names) if name.endswith((".nii", ".nii.gz"))]
    return found


def _mask(root: Path, image: Path) -> str | None:
    """fMRIPrep's and sMRIPrep's desc-preproc images keep the skull; their brain mask lies beside."""
    name = re.sub(r"_desc-preproc_[A-Za-z0-9]+(?=\.nii)", "_desc-brain_mask", image.name)
    mask = image.with_name(name)
    return mask.as_posix() if mask != image and (root / mask).is_file() else None


def _people(root: Path, found: Sequence[Found], sex_codes: str | None, notes: list[str]) -> People:
    """participants.tsv; sessions.tsv (one for all subjects) or sub-X/sub-X_sessions.tsv."""
    subjects: dict[str, dict[str, str]] = {}
    if (root / "participants.tsv").is_file():
        rows = [named(row) for row in read_table(root / "participants.tsv")]
        subjects = {row.get("subject", "").removeprefix("sub-"): row for row in rows}
    else:
        notes.append("no participants.tsv: age, sex, diagnosis and cohort are missing")
    sessions: dict[str, dict[str, dict[str, str]]] = defaultdict(dict)
    tables: list[tuple[str | None, Path]] = [(None, root / "sessions.tsv")]
    tables += [(s, root / f"sub-{s}" / f"sub-{s}_sessions.tsv") for s in sorted({f.subject for f in found})]
    for owner, path in tables:
        if path.is_file():
            for row in map(named, read_table(path)):
                subject = owner or row.get("subject", "").removeprefix("sub-")
                sessions[subject][row.get("session", "").removeprefix("ses-")] = row
    return People(subjects, sessions, read_codebook(root / "participants.json", sex_codes, notes))
