"""One session of one subject, from raw scans to volumes on the atlas grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from data_prep.atlas import Atlas, atlas_on
from data_prep.brain import brain_mask, looks_stripped, remove_bias, volume_ml
from data_prep.formats import read_image
from data_prep.manifest import Scan
from data_prep.quality import extent_mm, flags_of, measure
from data_prep.recipe import Recipe
from data_prep.register import register
from g3n.config import G3nError
from g3n.nifti import place_on_atlas, resample, to_grid

_CENTER_ORDER = ("T1", "T1c", "T2", "FLAIR")
_MIN_BRAIN_SHARE = 0.02  # of the grid's voxels
_ON_MNI = ("mni", "mni_stripped")
_REGISTERED_DICE = 0.88  # a scan that claims to lie on the atlas must overlap it so well

Reader = Callable[[Path], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Loaded:
    """``head`` and ``volume`` float32 [X, Y, Z] >= 0 (as it came, and stripped), ``affine`` [4, 4] voxel -> scan world mm."""

    scan: Scan
    head: np.ndarray
    volume: np.ndarray
    affine: np.ndarray
    brain: np.ndarray
    stripped: bool
    came_stripped: bool


@dataclass(frozen=True)
class Done:
    """``volume`` float32 on the grid, ``about`` its sidecar's facts: route, transform, quality, flags."""

    volume: np.ndarray
    about: dict[str, Any]


def process_session(root: Path, scans: list[Scan], recipe: Recipe, read: Reader = read_image) -> list[Done | str]:
    """Each scan's result or, where it failed, why, in the order of ``scans``. One scan's failure leaves the others.

    The center scan (T1 before T1c, T2, FLAIR) is stripped and registered to the atlas; the others are registered to it
    and reach the atlas through it, so the modalities of a session stay together. Each volume is interpolated once.
    """
    results: dict[int, Done | str] = {}
    loaded: list[tuple[int, Loaded]] = []
    order = sorted(range(len(scans)), key=lambda i: (_CENTER_ORDER.index(scans[i].modality), scans[i].run))
    for i in order:
        try:
            loaded.append((i, load(root, scans[i], read)))
        except Exception as error:  # a tool's or the disk's own trouble with this scan must not end the other scans
            results[i] = reason_of(error)
    center: Loaded | None = None
    center_to_atlas = np.eye(4)
    route = ""
    for i, image in loaded:
        try:
            if center is None:
                ready = strip(image, recipe)
                to_atlas, route = align(ready, recipe)
                moved = np.eye(4)
                center, center_to_atlas = ready, to_atlas
            else:
                moved = to_center(image, center, recipe)
                ready = strip_like(image, center, moved, recipe)
            results[i] = finish(ready, center_to_atlas @ moved, route, recipe, center is ready)
        except Exception as error:
            results[i] = reason_of(error)
    return [results[i] for i in range(len(scans))]


def reason_of(error: Exception) -> str:
    """One line; the name of the error where it is not ours."""
    text = str(error) if isinstance(error, G3nError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:300]


def load(root: Path, scan: Scan, read: Reader) -> Loaded:
    """Read a scan, repair what its plan says of the header, apply its mask, clip negatives."""
    volume, affine = read(root / scan.path)
    if scan.axes is not None or scan.spacing_mm is not None:
        volume, affine = impose(volume, affine, scan)
    volume = np.maximum(volume, 0)
    if not volume.any():
        raise G3nError(f"'{root / scan.path}' has no positive voxel; leave out this scan")
    if scan.mask:
        mask = read(root / scan.mask)[0] > 0
        if mask.shape != volume.shape:
            raise G3nError(f"mask '{scan.mask}' is {mask.shape}, its scan {volume.shape}; give the mask of this scan")
        volume = np.where(mask, volume, 0)
    known = scan.space in ("native_stripped", "mni_stripped", "brats")
    stripped = known or scan.mask is not None or looks_stripped(volume, affine)
    return Loaded(scan, volume, volume, affine, volume > 0, stripped, stripped)


def impose(volume: np.ndarray, affine: np.ndarray, scan: Scan) -> tuple[np.ndarray, np.ndarray]:
    """Axes and spacing of a header known to be wrong: the array transposed to run along L, P, S, at the true spacing."""
    if scan.axes is not None:
        volume = np.ascontiguousarray(volume.transpose([int(a) for a in scan.axes.split(",")]))
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if scan.spacing_mm is not None:
        spacing = np.array([float(mm) for mm in scan.spacing_mm.split(",")])
    step = np.diag([-spacing[0], -spacing[1], spacing[2]])
    fixed = np.eye(4)
    fixed[:3, :3] = step
    fixed[:3, 3] = -step @ ((np.array(volume.shape) - 1) / 2)
    return volume, fixed


def strip(image: Loaded, recipe: Recipe) -> Loaded:
    """Leave the brain alone: unless it came so, by the recipe's tool; then remove the bias field."""
    if image.stripped or recipe.strip == "none":
        return unbias(image, recipe)
    brain = brain_mask(image.volume, image.affine, recipe.strip, recipe.strip_command)
    return unbias(replace(image, brain=brain, stripped=True), recipe)


def strip_like(image: Loaded, center: Loaded, image_to_center: np.ndarray, recipe: Recipe) -> Loaded:
    """``image`` with the center's brain mask, where the center has one. ``image_to_center`` [4, 4] between worlds in mm."""
    if image.stripped or not center.stripped:
        return unbias(image, recipe)
    to_voxel = np.linalg.inv(center.affine) @ image_to_center @ image.affine
    brain = ndimage.affine_transform(
        center.brain.astype(np.float32), to_voxel[:3, :3], to_voxel[:3, 3], image.volume.shape, order=1
    )
    return unbias(replace(image, brain=brain >= 0.5, stripped=True), recipe)


def unbias(image: Loaded, recipe: Recipe) -> Loaded:
    inside = image.brain & (image.volume > 0)
    volume = image.volume
    if recipe.bias == "n4":
        volume = remove_bias(volume, image.affine, inside if inside.any() else volume > 0)
    return replace(image, volume=np.where(image.brain, volume, 0) if image.stripped else volume)


def align(image: Loaded, recipe: Recipe) -> tuple[np.ndarray, str]:
    """[4, 4] scan world mm -> atlas world mm, and how it was found.

    ``header`` trusts the file unless it puts the brain over 30 mm off (files on the SRI24 grid have their origin in a
    corner): those are centered. ``affine`` registers, unless the scan says it lies on the atlas already and does.
    """
    if recipe.align != "affine":
        moved = place_on_atlas(image.volume, image.affine, always=recipe.align == "center")
        shift = moved @ np.linalg.inv(image.affine)
        return shift, "header" if moved is image.affine else "center"
    atlas = recipe.atlas
    on_icbm152 = image.scan.space in _ON_MNI and atlas.name == "icbm152" and image.stripped
    if on_icbm152 and overlap(image, atlas) >= _REGISTERED_DICE:
        return np.eye(4), "registered"
    return np.linalg.inv(register(image.volume, image.affine, atlas.t1, atlas.affine, "Affine")), "affine"


def overlap(image: Loaded, atlas: Atlas) -> float:
    """Dice of the scan's brain, by its header, with the atlas's, at 4 mm."""
    grid = atlas.grid((44, 52, 44), 4.0)
    mine = resample(image.brain.astype(np.float32), image.affine, grid) >= 0.5
    _, theirs = atlas_on(atlas, grid)
    return 2 * float((mine & theirs).sum()) / max(1, int(mine.sum() + theirs.sum()))


def to_center(image: Loaded, center: Loaded, recipe: Recipe) -> np.ndarray:
    """[4, 4] image world mm -> center world mm. Scans on one grid were brought there by who made them."""
    same = image.volume.shape == center.volume.shape and np.allclose(image.affine, center.affine, atol=1e-3)
    together = image.scan.space in (*_ON_MNI, "brats") and image.scan.space == center.scan.space
    if recipe.align != "affine" or (same and (together or image.came_stripped)):
        return np.eye(4)
    return np.linalg.inv(register(image.head, image.affine, center.head, center.affine, "Rigid"))


def finish(image: Loaded, to_atlas: np.ndarray, route: str, recipe: Recipe, is_center: bool) -> Done:
    """Interpolate onto the grid, measure, and say what was done."""
    grid = recipe.grid
    affine = to_atlas @ image.affine
    volume = to_grid(image.volume, affine, grid)
    share = float((volume > 0).mean())
    if share < _MIN_BRAIN_SHARE:
        raise G3nError(f"only {share:.1%} of the atlas grid is covered; is the affine right? try --align center")
    if volume[volume > 0].std() == 0:
        raise G3nError("all voxels have one value")
    filled = ndimage.binary_fill_holes(image.brain)
    brain = resample(filled.astype(np.float32), affine, grid) >= 0.5
    quality: dict[str, Any] = {
        "brain_ml": round(volume_ml(filled, image.affine), 1),
        "extent_mm": extent_mm(image.volume.shape, image.affine),
        "spacing_mm": [round(float(s), 3) for s in np.linalg.norm(image.affine[:3, :3], axis=0)],
        "stripped": image.stripped,
        **measure(volume, brain, *atlas_on(recipe.atlas, grid)),
    }
    if image.scan.space in _ON_MNI:
        quality["dice_header"] = round(overlap(image, recipe.atlas), 4)
    about: dict[str, Any] = {
        "modality": image.scan.modality,
        "align": route,
        "strip": "as it came" if image.came_stripped else recipe.strip if image.stripped else "none",
        "bias": recipe.bias,
        "center": is_center,
        "scan_to_atlas": [[round(float(x), 6) for x in row] for row in to_atlas],
        "quality": quality,
        "flags": flags_of(quality, route in ("affine", "registered"), is_center),
    }
    return Done(volume, about)
