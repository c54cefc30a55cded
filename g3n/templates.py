"""The ICBM152 2009a templates in the nilearn wheel: where a brain's ventricles lie on an atlas grid."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy import ndimage

from g3n.config import G3nError
from g3n.nifti import Grid, read_volume, resample

FAR_MM = 30.0  # distances to the ventricles are exact up to here


def _file(name: str) -> Path:
    spec = importlib.util.find_spec("nilearn")  # its data only: importing nilearn itself takes seconds
    if spec is None or spec.origin is None:
        raise G3nError("the ICBM152 templates come with nilearn, which is missing; run pip install 'g3n[prep]'")
    path = Path(spec.origin).parent / "datasets" / "data" / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz"
    if not path.is_file():
        raise G3nError(f"nilearn has no '{path.name}'; run pip install 'nilearn>=0.12,<0.15'")
    return path


def read_template(name: str) -> tuple[np.ndarray, np.ndarray]:
    """'t1', 'gm' or 'wm' of ICBM152 2009a at 1 mm, scaled to 0..1, with its affine. Raises G3nError without nilearn."""
    volume, affine = read_volume(_file(name))
    return volume / 255, affine


def lateral_ventricles(t1: np.ndarray, csf: np.ndarray) -> np.ndarray:
    """bool [X, Y, Z] at 1 mm: the two largest pieces of dark CSF that do not touch the outer one."""
    labels, _ = ndimage.label((csf > 0.5) & (t1 < 0.45))
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return np.isin(labels, np.argsort(sizes)[-3:-1])


def signed_distance_mm(inside: np.ndarray) -> np.ndarray:
    """float32 [X, Y, Z] at 1 mm: distance to the surface of ``inside``, negative within, at most FAR_MM."""
    around = tuple(
        slice(max(0, s.start - int(FAR_MM)), s.stop + int(FAR_MM))
        for s in ndimage.find_objects(inside.astype(np.uint8))[0]
    )
    part = inside[around]
    distance_mm = np.full(inside.shape, FAR_MM, np.float32)
    signed = ndimage.distance_transform_edt(~part) - ndimage.distance_transform_edt(part)
    distance_mm[around] = ndimage.gaussian_filter(np.minimum(signed, FAR_MM), 0.7)
    return distance_mm


@lru_cache(maxsize=4)
def ventricle_distance_mm(grid: Grid) -> np.ndarray:
    """float32 grid.shape: distance to the template's lateral ventricles, negative inside, at most FAR_MM."""
    t1, affine = read_template("t1")
    csf = np.clip((t1 > 0) - read_template("gm")[0] - read_template("wm")[0], 0, 1)
    return resample(signed_distance_mm(lateral_ventricles(t1, csf)) - FAR_MM, affine, grid) + FAR_MM
