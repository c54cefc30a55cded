"""DICOM folders to a tree of NIfTI files with the same folders, by dcm2niix (https://github.com/rordenlab/dcm2niix)."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import tempfile
from functools import partial
from pathlib import Path

from data_prep.progress import run_all
from data_prep.shards import write_text
from g3n.config import G3nError

_TIMEOUT_S = 1800
_MAGIC_AT = 128
# internal zlib, anonymized sidecar, this folder alone, no defaults file; the name says what the scanner called the series
_OPTIONS = ("-z", "i", "-b", "y", "-ba", "y", "-d", "0", "-g", "i", "-f", "%d_s%s")


def convert(root: Path, output: Path, workers: int | None = None) -> tuple[int, list[tuple[str, str]]]:
    """Convert every folder with DICOM files below ``root`` into the same folder below ``output``.

    How many folders are converted there now, and (folder, reason) of each that failed, which failures.tsv lists too. A
    folder that an earlier call converted is kept. Raises G3nError without dcm2niix or DICOM files.
    """
    tool = find_dcm2niix()
    if not root.is_dir():
        raise G3nError(f"folder '{root}' does not exist")
    if output.resolve().is_relative_to(root.resolve()):
        raise G3nError(f"output '{output}' lies inside '{root}'; give another folder")
    folders = dicom_folders(root)
    if not folders:
        raise G3nError(f"'{root}' has no DICOM file; expected files with 'DICM' at byte {_MAGIC_AT}, or named .dcm")
    work = partial(_convert_folder, tool, str(root), str(output))
    reasons = list(run_all(work, folders, workers, "convert"))
    failed = [(folder, reason) for folder, reason in zip(folders, reasons, strict=True) if reason is not None]
    output.mkdir(parents=True, exist_ok=True)
    lines = ["folder\treason", *(f"{folder}\t{reason}" for folder, reason in failed)]
    write_text(output / "failures.tsv", "\n".join(lines) + "\n")
    return len(folders) - len(failed), failed


def find_dcm2niix() -> str:
    """The program on PATH, else of the PyPI wheel. Raises G3nError where there is neither."""
    if found := shutil.which("dcm2niix"):
        return found
    try:
        return str(importlib.import_module("dcm2niix").bin)
    except (ImportError, AttributeError):
        raise G3nError("converting DICOM needs dcm2niix; run pip install 'g3n[dicom]', or put it on PATH") from None


def dicom_folders(root: Path) -> list[str]:
    """Folders (relative to ``root``, '.' for itself) that hold a DICOM file, sorted."""
    found = []
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(d for d in inner if not d.startswith("."))
        if any(_is_dicom(Path(folder) / name) for name in sorted(names)):
            found.append(Path(folder).relative_to(root).as_posix())
    return sorted(found)


def _is_dicom(path: Path) -> bool:
    if path.name == "DICOMDIR" or path.name.startswith("."):
        return False
    if path.suffix.lower() in (".dcm", ".ima"):
        return True
    try:
        with open(path, "rb") as file:
            file.seek(_MAGIC_AT)
            return file.read(4) == b"DICM"
    except OSError:
        return False


def _convert_folder(tool: str, root: str, output: str, folder: str) -> str | None:
    """None, or why it failed. The folder's NIfTI files appear when all of them are whole."""
    target = Path(output) / folder
    mark = target / ".converted"
    if mark.is_file():
        return None
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".part-") as part:
        command = [tool, *_OPTIONS, "-o", part, str((Path(root) / folder).resolve())]
        try:
            done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            return f"dcm2niix took over {_TIMEOUT_S} s"
        except OSError as error:
            return f"dcm2niix cannot be run ({error.strerror})"
        made = sorted(Path(part).iterdir())
        if done.returncode or not any(p.name.endswith(".nii.gz") for p in made):
            said = (done.stderr or done.stdout).decode("utf-8", "replace").strip().splitlines()
            return f"dcm2niix ended with code {done.returncode}: {said[-1][:200] if said else 'no image'}"
        for path in made:
            os.replace(path, target / path.name)
    mark.touch()
    return None
