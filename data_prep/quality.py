"""Numbers that tell whether a scan lies on the atlas, and the flags that follow from them."""

from __future__ import annotations

from typing import Any

import numpy as np

MIN_EXTENT_MM = 80.0
MIN_DICE = 0.80
MIN_CORRELATION = 0.2
BRAIN_ML = (600.0, 2300.0)
FLAGS = {
    "spacing": "the header spans less than 80 mm along an axis: its spacing is probably lost",
    "overlap": "Dice with the atlas brain under 0.80",
    "volume": "brain volume outside 600 to 2300 mL",
    "contrast": "hardly any correlation with the atlas T1: turned over, or not a brain",
    "skull": "more than a brain is left: a face may be recognizable",
}


def extent_mm(shape: tuple[int, ...], affine: np.ndarray) -> list[float]:
    """How far the field of view reaches along each voxel axis."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    return [round(float(n * s), 1) for n, s in zip(shape, spacing, strict=True)]


def measure(result: np.ndarray, brain: np.ndarray, atlas_t1: np.ndarray, atlas_mask: np.ndarray) -> dict[str, Any]:
    """Quality numbers of one volume on the atlas grid.

    ``result`` float32 >= 0 with background 0, ``brain`` bool (where the brain is, holes filled), the atlas on the same
    grid. ``correlation`` is the absolute Pearson r of the two within both brains (T2 and FLAIR anticorrelate).
    """
    both = brain & atlas_mask & (result > 0)
    overlap = 2 * float((brain & atlas_mask).sum()) / max(1, int(brain.sum() + atlas_mask.sum()))
    r = 0.0
    if both.sum() > 10 and result[both].std() > 0:
        r = abs(float(np.corrcoef(result[both], atlas_t1[both])[0, 1]))
    levels = np.percentile(result[result > 0], [1, 50, 99, 99.9]) if (result > 0).any() else np.zeros(4)
    return {
        "dice_atlas": round(overlap, 4),
        "correlation_atlas": round(r, 4),
        "background_share": round(float((result == 0).mean()), 4),
        "atlas_covered": round(float((brain & atlas_mask).sum() / max(1, atlas_mask.sum())), 4),
        **{f"p{name}": float(f"{level:.6g}") for name, level in zip(("1", "50", "99", "99_9"), levels, strict=True)},
    }


def flags_of(quality: dict[str, Any], registered: bool, center: bool) -> list[str]:
    """Names of FLAGS that hold. Overlap and contrast are judged only where the scan was registered to the atlas, contrast
    (with the atlas's T1) of the session's center scan alone: lesions and FLAIR make it say little of the others."""
    found = []
    if min(quality["extent_mm"]) < MIN_EXTENT_MM:
        found.append("spacing")
    if not quality["stripped"]:
        found.append("skull")
    elif not BRAIN_ML[0] <= quality["brain_ml"] <= BRAIN_ML[1]:
        found.append("volume")
    if registered and quality["stripped"] and quality["dice_atlas"] < MIN_DICE:
        found.append("overlap")
    if registered and center and quality["stripped"] and quality["correlation_atlas"] < MIN_CORRELATION:
        found.append("contrast")
    return found
