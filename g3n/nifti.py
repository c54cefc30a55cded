"""NIfTI in and out, and the grids volumes live on. Nothing is trusted before the header is checked."""

from __future__ import annotations

import math
import os
import uuid
import zlib
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from g3n.config import G3nError

# World (RAS+) center in mm of the ICBM152 2009a brain's bounding box: the middle of the embedded atlas grid.
ATLAS_CENTER_MM = (0.0, -18.0, 4.0)


@dataclass(frozen=True)
class Grid:
    """Voxel counts and the 4x4 affine from voxel index to world mm (RAS+, as NIfTI)."""

    shape: tuple[int, int, int]
    affine: tuple[tuple[float, ...], ...]

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        x, y, z = np.linalg.norm(np.array(self.affine)[:3, :3], axis=0)
        return float(x), float(y), float(z)


def atlas_grid(shape: tuple[int, int, int], spacing_mm: float) -> Grid:
    """The embedded atlas grid: axes run to L, P, S and the box is centered on the ICBM152 brain.

    160x192x160 at 1 mm and 40x48x40 at 4 mm cover the same box.
    """
    direction = (-1.0, -1.0, 1.0)
    rows = []
    for i, (sign, n, center) in enumerate(zip(direction, shape, ATLAS_CENTER_MM, strict=True)):
        row = [0.0, 0.0, 0.0, center - sign * spacing_mm * (n - 1) / 2]
        row[i] = sign * spacing_mm
        rows.append(tuple(row))
    return Grid(shape, (*rows, (0.0, 0.0, 0.0, 1.0)))


def read_volume(path: str | Path, max_voxels: int = 2**28) -> tuple[np.ndarray, np.ndarray]:
    """(float32 [X, Y, Z], affine float64 [4, 4]).

    Raises G3nError for a file that is missing, not NIfTI, truncated, not 3-D (a last axis of 1 is dropped), over ``max_voxels``
    (the header is checked before any data is read), all zero, or holds NaN or infinite voxels.
    """
    path = Path(path)
    if not path.is_file():
        raise G3nError(f"scan '{path}' does not exist")
    try:
        image = nib.load(path)
    except (nib.filebasedimages.ImageFileError, OSError, EOFError, ValueError, zlib.error) as error:
        raise G3nError(f"scan '{path}' is not a readable NIfTI file ({_short(error)})") from error
    shape = image.shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or min(shape) < 1:
        raise G3nError(f"scan '{path}' has shape {image.shape}, expected one 3-D volume; split it first")
    if math.prod(shape) > max_voxels:
        raise G3nError(f"scan '{path}' says it has {math.prod(shape)} voxels, more than the limit of {max_voxels}")
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise G3nError(f"scan '{path}' has an affine that is not invertible; repair its header")
    try:
        volume = np.asarray(image.dataobj, dtype=np.float32).reshape(shape)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise G3nError(f"scan '{path}' is truncated or damaged ({_short(error)})") from error
    if not np.isfinite(volume).all():
        raise G3nError(
            f"scan '{path}' holds {int((~np.isfinite(volume)).sum())} NaN or infinite voxels; repair it first"
        )
    if not volume.any():
        raise G3nError(f"scan '{path}' is all zero")
    return volume, affine


def write_volume(path: str | Path, volume: np.ndarray, affine: np.ndarray) -> None:
    """Write ``volume`` (float32 or an integer dtype, kept) as .nii.gz under a temporary name, then rename it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(volume, np.asarray(affine, dtype=np.float64))
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = b"g3n"
    part = path.with_name(f".{uuid.uuid4().hex}.nii.gz")
    try:
        nib.save(image, part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def resample(volume: np.ndarray, affine: np.ndarray, grid: Grid, order: int = 1) -> np.ndarray:
    """``volume`` on ``grid`` by the two affines: float32 grid.shape, 0 outside; no smoothing."""
    matrix = np.linalg.inv(affine) @ np.array(grid.affine)
    return ndimage.affine_transform(
        volume.astype(np.float32), matrix[:3, :3], matrix[:3, 3], output_shape=grid.shape, order=order, cval=0.0
    )


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
