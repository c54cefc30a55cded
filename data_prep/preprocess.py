"""From raw scans to the atlas grid: one file a scan, one bad scan never stops the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.manifest import Scan, read_manifest, write_manifest
from data_prep.progress import run_all
from data_prep.shards import fingerprint_of, write_text
from g3n.config import G3nError, to_plain
from g3n.nifti import Grid, atlas_grid, place_on_atlas, read_volume, to_grid, write_volume

VERSION = 1
_MIN_BRAIN_SHARE = 0.02  # of the grid's voxels


@dataclass(frozen=True)
class Recipe:
    """What determines the result, besides the scan."""

    shape: tuple[int, int, int]
    spacing_mm: float
    align: str = "header"  # header, center or affine
    strip: str = "none"  # none or deepbet

    @property
    def grid(self) -> Grid:
        return atlas_grid(self.shape, self.spacing_mm)

    def describe(self) -> dict[str, Any]:
        """The recipe as it is written beside the volumes; ``fingerprint`` covers all the rest but the versions."""
        what = {"preprocess": VERSION, "align": self.align, "strip": self.strip, "grid": to_plain(self.grid)}
        tools = ["g3n", "numpy", "scipy", "nibabel"]
        tools += ["antspyx"] * (self.align == "affine") + ["deepbet"] * (self.strip == "deepbet")
        return {**what, "fingerprint": fingerprint_of(what), "versions": {name: _version(name) for name in tools}}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def parse_shape(text: str) -> tuple[int, int, int]:
    """'40,48,40' -> (40, 48, 40)."""
    try:
        x, y, z = (int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise G3nError(f"shape is '{text}'; expected three whole numbers such as 160,192,160") from None
    return x, y, z


@dataclass(frozen=True)
class Outcome:
    """What became of one scan: ``align`` is what was used, ``reason`` why it failed (None: its volume is there)."""

    align: str
    reason: str | None = None


def preprocess_all(manifest_path: Path, output: Path, recipe: Recipe, workers: int | None = None) -> list[Outcome]:
    """Preprocess each scan of a manifest; their outcomes in its order. What an earlier call wrote is kept.

    Writes <output>/sub-*/ses-*/anat/*.nii.gz with a sidecar each, manifest.tsv, recipe.json and failures.tsv. Raises G3nError for a
    bad manifest, a missing optional package, or an output folder made by another recipe.
    """
    for package, needed in (("ants", recipe.align == "affine"), ("deepbet", recipe.strip == "deepbet")):
        if needed and importlib.util.find_spec(package) is None:
            raise G3nError(f"this needs the package '{package}', which is missing; run pip install 'g3n[prep]'")
    manifest = read_manifest(manifest_path)
    about = recipe.describe()
    _open_output(output, manifest.root, about)
    work = partial(_preprocess_one, str(manifest.root), str(output), recipe, about)
    outcomes = list(run_all(work, manifest.scans, workers, "preprocess"))
    done, failures = [], ["path\treason"]
    for scan, outcome in zip(manifest.scans, outcomes, strict=True):
        if outcome.reason is None:
            done.append(replace(scan, path=volume_path(scan)))
        else:
            failures.append(f"{scan.path}\t{outcome.reason}")
    write_text(output / "failures.tsv", "\n".join(failures) + "\n")
    write_manifest(output / "manifest.tsv", output, done, {"recipe": about["fingerprint"]})
    return outcomes


def volume_path(scan: Scan) -> str:
    """Where a scan's volume lies below the output folder."""
    stem = f"sub-{scan.subject}_ses-{scan.session}_{scan.modality}"
    return f"sub-{scan.subject}/ses-{scan.session}/anat/{stem}.nii.gz"


def _open_output(output: Path, root: Path, about: dict[str, Any]) -> None:
    mark = output / "recipe.json"
    if output.resolve() == root.resolve():
        raise G3nError(f"output '{output}' is the folder of the raw scans; give another one")
    if mark.is_file():
        try:
            found = json.loads(mark.read_text(encoding="utf-8"))
            same = found["fingerprint"] == about["fingerprint"]
        except (ValueError, KeyError, TypeError) as error:
            raise G3nError(f"'{mark}' is damaged; give an empty folder") from error
        if not same:
            keys = [k for k in ("align", "strip", "grid", "preprocess") if found.get(k) != about[k]]
            raise G3nError(f"'{output}' was made by another recipe ({', '.join(keys)} differ); give an empty folder")
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise G3nError(f"'{output}' is not an empty folder; give a new one")
    output.mkdir(parents=True, exist_ok=True)
    write_text(mark, json.dumps(about, indent=1) + "\n")


def _preprocess_one(root: str, output: str, recipe: Recipe, about: dict[str, Any], scan: Scan) -> Outcome:
    source, target = Path(root) / scan.path, Path(output) / volume_path(scan)
    sidecar = target.with_name(target.name.removesuffix(".nii.gz") + ".json")
    try:
        stamp = _stamp(source)
        made = {"recipe": about["fingerprint"], "source": stamp, "versions": about["versions"]}
        if (used := _done(target, sidecar, made)) is not None:
            return Outcome(used)
        for stale in (sidecar, target):
            stale.unlink(missing_ok=True)
        volume, affine = read_volume(source)
        volume = np.maximum(volume, 0)
        if not volume.any():
            raise G3nError(f"'{source}' has no positive voxel; leave out this scan")
        if recipe.strip == "deepbet":
            volume = strip_skull(volume, affine)
        affine, used = align(volume, affine, recipe.align)
        result = to_grid(volume, affine, recipe.grid)
        share = float((result > 0).mean())
        if share < _MIN_BRAIN_SHARE:
            raise G3nError(f"only {share:.1%} of the atlas grid is covered; is the affine right? try --align center")
        if result[result > 0].std() == 0:
            raise G3nError("all voxels have one value")
        write_volume(target, result, recipe.grid.matrix)
        text = json.dumps({**made, "align": used, "strip": recipe.strip, "bytes": target.stat().st_size})
        write_text(sidecar, text + "\n")
        return Outcome(used)
    except G3nError as error:
        return Outcome(recipe.align, " ".join(str(error).split()))
    except Exception as error:  # a tool's or the disk's own trouble with this scan must not end the other scans
        return Outcome(recipe.align, " ".join(f"{type(error).__name__}: {error}".split())[:300])


def _stamp(path: Path) -> list[int]:
    try:
        info = path.stat()
    except OSError as error:
        raise G3nError(f"'{path}' cannot be read ({error.strerror}); is the manifest's root right?") from error
    return [info.st_size, info.st_mtime_ns]


def _done(target: Path, sidecar: Path, made: dict[str, Any]) -> str | None:
    """The alignment used where an earlier call finished this scan by the same recipe, else None."""
    try:
        found = json.loads(sidecar.read_text(encoding="utf-8"))
        same = all(found[key] == made[key] for key in ("recipe", "source"))
        return str(found["align"]) if same and found["bytes"] == target.stat().st_size else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def align(volume: np.ndarray, affine: np.ndarray, how: str) -> tuple[np.ndarray, str]:
    """The affine (voxel -> atlas world mm) under which ``volume`` lies on the atlas, and how it was found.

    ``header`` takes the file's affine, unless it puts the brain over 30 mm off (files on the SRI24 grid have their
    origin in a corner, for example): those are centered.
    """
    if how == "affine":
        return np.linalg.inv(register(volume, affine)) @ affine, how
    moved = place_on_atlas(volume, affine, always=how == "center")
    return moved, "header" if moved is affine else "center"


def register(volume: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Affine registration to the ICBM152 T1 by antspyx (mutual information): atlas world mm -> scan world mm, [4, 4]."""
    os.environ.setdefault("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "1")  # one thread gives the same result each time
    import ants

    from g3n.templates import read_template

    fixed = _to_ants(*read_template("t1"))
    fixed = ants.resample_image(fixed, (2.0, 2.0, 2.0), False, 0)
    moving = _to_ants(volume, affine)
    result = ants.registration(fixed, moving, "Affine", random_seed=1)
    try:
        found = ants.read_transform(result["fwdtransforms"][0])
    finally:
        for path in {*result["fwdtransforms"], *result["invtransforms"]}:
            Path(path).unlink(missing_ok=True)
    matrix, shift = np.array(found.parameters[:9]).reshape(3, 3), np.array(found.parameters[9:])
    center = np.array(found.fixed_parameters)
    lps = np.eye(4)
    lps[:3, :3], lps[:3, 3] = matrix, shift + center - matrix @ center
    flip = np.diag([-1.0, -1.0, 1.0, 1.0])
    return flip @ lps @ flip


def _to_ants(volume: np.ndarray, affine: np.ndarray) -> Any:
    import ants

    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    # ITK takes rotations only; a shear of the header stays as the small difference it is.
    u, _, v = np.linalg.svd(lps[:3, :3] / spacing)
    return ants.from_numpy(np.asarray(volume, np.float32), lps[:3, 3].tolist(), spacing.tolist(), u @ v)


def strip_skull(volume: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """``volume`` with everything but the brain set to 0, by deepbet (doi:10.1016/j.compbiomed.2024.108845)."""
    import nibabel as nib
    from deepbet import BrainExtraction

    image = nib.Nifti1Image(volume, affine)
    _, mask, _ = BrainExtraction(no_gpu=True).run(image)
    brain = np.asarray(mask.dataobj) > 0
    if brain.shape != volume.shape or not brain.any():
        raise G3nError("deepbet found no brain")
    return np.where(brain, volume, 0)
