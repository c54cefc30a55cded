"""Volumes on disk and on grids: bounded NIfTI reading, atomic writing, resampling by affines, the atlas grid."""

from __future__ import annotations

import gzip
import io
import math
import os
import uuid
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from scipy import ndimage

from g3n.config import G3nError

# Center of the bounding box of the ICBM152 2009a brain (nilearn's 1 mm template), RAS+ world mm.
ATLAS_CENTER_MM = (0.0, -17.0, 5.0)
BRAIN_CENTER_MM = (0.0, -22.1, 9.5)  # center of mass of the ICBM152 brain, RAS+
MAX_OFF_CENTER_MM = 30.0
MAX_SIDE = 4096
_MAX_REST_BYTES = 1 << 24
_HEADER_BYTES = {b"n+1": 348, b"n+2": 540}


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a volume lie: ``affine`` is 4 x 4, voxel index -> world mm (RAS+ world, as in NIfTI)."""

    shape: tuple[int, int, int]
    affine: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if not all(0 < n <= MAX_SIDE for n in self.shape):
            raise ValueError(f"grid shape {self.shape} must lie in 1 to {MAX_SIDE}")
        if len(self.affine) != 4 or any(len(row) != 4 for row in self.affine):
            raise ValueError("grid affine must be 4 x 4")
        if not abs(np.linalg.det(self.matrix)) > 1e-9:
            raise ValueError(f"grid affine {self.affine} cannot be inverted")

    @property
    def matrix(self) -> np.ndarray:
        """The affine as float64 [4, 4]."""
        return np.array(self.affine, np.float64)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance of neighboring voxels along each axis."""
        x, y, z = np.linalg.norm(self.matrix[:3, :3], axis=0)
        return float(x), float(y), float(z)


def atlas_grid(shape: tuple[int, int, int], spacing_mm: float) -> Grid:
    """The atlas grid: axes run to L, P, S; the box is centered on the ICBM152 brain.

    160 x 192 x 160 at 1 mm and 40 x 48 x 40 at 4 mm cover the same box. Raises G3nError for an impossible size.
    """
    if not (math.isfinite(spacing_mm) and spacing_mm > 0):
        raise G3nError(f"spacing {spacing_mm} mm is impossible; give a positive number")
    step = np.diag([-spacing_mm, -spacing_mm, spacing_mm])
    corner = np.array(ATLAS_CENTER_MM) - step @ ((np.array(shape) - 1) / 2)
    rows = [*np.column_stack([step, corner]).tolist(), [0.0, 0.0, 0.0, 1.0]]
    try:
        return Grid((shape[0], shape[1], shape[2]), tuple(tuple(x + 0.0 for x in row) for row in rows))
    except ValueError as error:
        raise G3nError(str(error)) from error


def read_volume(path: str | Path, max_voxels: int = 2**28) -> tuple[np.ndarray, np.ndarray]:
    """A single-file NIfTI-1 or -2, gzipped or not: float32 [X, Y, Z] (slope applied), float64 affine [4, 4] to RAS+ mm.

    Trailing axes of length 1 are dropped. The header is checked before any voxel is read, and never more bytes are read
    than it announces. Raises G3nError for a missing file, not NIfTI, truncated or corrupt, not 3-D, more than
    ``max_voxels``, an affine that cannot be inverted, NaN or infinite voxels, all zero.
    """
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            return _read(path, gzip.GzipFile(fileobj=file) if zipped else file, max_voxels)
    except EOFError as error:
        raise G3nError(f"'{path}' is truncated: its gzip stream ends early; copy it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise G3nError(f"'{path}' is damaged ({error}); copy it again") from error
    except OSError as error:
        raise G3nError(f"'{path}' cannot be read ({error.strerror or error}); expected a .nii or .nii.gz") from error


def _read(path: str | Path, stream: BinaryIO | gzip.GzipFile, max_voxels: int) -> tuple[np.ndarray, np.ndarray]:
    start = _exactly(path, stream, 348, "NIfTI file")
    if start[344:347] not in (b"n+1", b"ni1"):
        start += _exactly(path, stream, 540 - 348, "NIfTI file")
    magic = start[344:347] if len(start) == 348 else start[4:7]
    if _HEADER_BYTES.get(magic) != len(start):
        raise G3nError(f"'{path}' is not a single-file NIfTI (.nii, .nii.gz); convert it first")
    kind = nib.Nifti1Header if magic == b"n+1" else nib.Nifti2Header
    try:
        header = kind.from_fileobj(io.BytesIO(start), check=False)
        shape, dtype, offset = header.get_data_shape(), header.get_data_dtype(), header.get_data_offset()
        affine = np.array(header.get_best_affine(), np.float64)
        slope, intercept = header.get_slope_inter()
    except (HeaderDataError, ImageFileError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise G3nError(f"'{path}' has a damaged NIfTI header ({' '.join(str(error).split())})") from error

    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise G3nError(
            f"'{path}' is {len(shape)}-D {_times(shape)}; expected one 3-D volume, split or average it first"
        )
    voxels = math.prod(int(n) for n in shape)
    if min(shape) < 1 or voxels > max_voxels:
        raise G3nError(f"'{path}' announces {_times(shape)} voxels; expected 1 to {max_voxels}")
    if dtype.kind not in "iuf":
        raise G3nError(f"'{path}' holds {dtype} voxels; expected integers or real numbers")
    if not (np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 1e-9):
        raise G3nError(f"'{path}' has an affine that cannot be inverted; repair its sform or qform")
    if not len(start) <= offset <= 1 << 24:
        raise G3nError(f"'{path}' has a damaged NIfTI header (voxels start at byte {offset})")

    _exactly(path, stream, int(offset) - len(start))
    data = np.frombuffer(_exactly(path, stream, voxels * dtype.itemsize), dtype).reshape(shape, order="F")
    stream.read(_MAX_REST_BYTES)  # at its end a gzip stream checks its checksum
    with np.errstate(over="ignore", invalid="ignore"):
        volume = np.ascontiguousarray(data, np.float32)
        if slope is not None and (slope, intercept) != (1.0, 0.0):
            volume = (volume * np.float64(slope) + np.float64(intercept)).astype(np.float32)
    bad = volume.size - int(np.isfinite(volume).sum())
    if bad:
        raise G3nError(f"'{path}' has {bad} NaN or infinite voxels; repair or leave out this scan")
    if not volume.any():
        raise G3nError(f"'{path}' is all zero; leave out this scan")
    return volume, affine


def _exactly(path: str | Path, stream: BinaryIO | gzip.GzipFile, count: int, what: str = "") -> bytes:
    data = stream.read(count)
    if len(data) < count:
        raise G3nError(
            f"'{path}' is not a {what}, or cut off in its header"
            if what
            else f"'{path}' is truncated: {count - len(data)} bytes are missing"
        )
    return data


def _times(shape: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in shape)


def write_volume(path: str | Path, volume: np.ndarray, affine: np.ndarray) -> None:
    """Write [X, Y, Z] as .nii.gz: floats as float32, integers as they are (at most 32 bits), ``affine`` as given.

    The same volume gives the same bytes. The file appears under its name only when it is whole.
    """
    path = Path(path)
    if not path.name.endswith(".nii.gz"):
        raise G3nError(f"'{path}' cannot be written: expected a name ending in .nii.gz")
    image = _image(volume, affine)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(part, "wb") as file, gzip.GzipFile("", "wb", 3, file, mtime=0) as stream:
            stream.write(image.to_bytes())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _image(volume: np.ndarray, affine: np.ndarray) -> nib.Nifti1Image:
    kind = np.dtype(np.float32) if volume.dtype.kind == "f" else volume.dtype
    if kind.kind == "b":
        kind = np.dtype(np.uint8)
    elif kind.itemsize > 4:
        kind = np.dtype(np.int32)
    image = nib.Nifti1Image(volume.astype(kind, copy=False), affine)
    image.set_sform(affine, code="aligned")
    image.set_qform(affine, code="aligned")
    image.header.set_xyzt_units("mm")
    return image


def canonical_header(volume: np.ndarray, affine: np.ndarray) -> bytes:
    """The 352 bytes that ``write_volume`` puts before the voxels: shape, type, scale and affine, nothing else."""
    header = _image(volume, affine).header.copy()
    header.set_slope_inter(1, 0)
    header["vox_offset"] = 352
    return bytes(header.binaryblock) + bytes(4)


def read_exactly_as_stored(path: str | Path, max_voxels: int = 2**28) -> tuple[np.ndarray, np.ndarray, bytes, int]:
    """[X, Y, Z] in the file's own type, its affine, all bytes of the (unzipped) file up to the last voxel, and how many
    follow (at most 16 MiB are looked at). For little-endian NIfTI-1 without scaling, as ``write_volume`` makes them; raises
    G3nError as ``read_volume`` does, and for any other file."""
    volume, affine = read_volume(path, max_voxels)
    with gzip.open(path, "rb") as stream:
        start = stream.read(352)
        header = nib.Nifti1Header.from_fileobj(io.BytesIO(start[:348]), check=False)
        dtype, offset = header.get_data_dtype(), int(header.get_data_offset())
        if header.endianness != "<" or header.get_slope_inter() not in ((None, None), (1.0, 0.0)):
            raise G3nError(f"'{path}' is scaled or big-endian; preprocess it")
        whole = start + stream.read(offset - len(start) + volume.size * dtype.itemsize)
        rest = len(stream.read(_MAX_REST_BYTES))
    stored = np.frombuffer(whole[offset:], dtype).reshape(volume.shape, order="F")
    return stored, affine, whole, rest


def resample(volume: np.ndarray, affine: np.ndarray, grid: Grid, order: int = 1) -> np.ndarray:
    """``volume`` [X, Y, Z] with ``affine`` [4, 4] on ``grid``: float32 grid.shape, outside = 0.

    Splines of ``order`` (0 nearest, 1 linear). Where the grid is coarser than the volume and order > 0, the volume is
    smoothed first, along each of its axes, so that a point's full width at half maximum grows from its own spacing to
    the grid's: sigma = sqrt(target^2 - source^2) / 2.355 (as Cardoso et al. 2015, doi:10.1007/978-3-319-24571-3_81).
    """
    grid_to_volume = np.linalg.inv(affine) @ grid.matrix
    volume = np.asarray(volume, np.float32)
    if order > 0:
        # How far one step on the grid goes along each axis of the volume, in its voxels.
        steps = np.linalg.norm(grid_to_volume[:3, :3], axis=1)
        sigma = np.sqrt(np.maximum(steps**2 - 1, 0)) / 2.355
        if sigma.max() > 0.05:
            volume = ndimage.gaussian_filter(volume, sigma, mode="constant", truncate=3.0)
    matrix, offset = grid_to_volume[:3, :3], grid_to_volume[:3, 3]
    return ndimage.affine_transform(volume, matrix, offset, grid.shape, np.float32, order=order, mode="constant")


def to_grid(volume: np.ndarray, affine: np.ndarray, grid: Grid) -> np.ndarray:
    """A scan's intensities on ``grid``, float32 >= 0: negatives clipped, background exactly 0.

    Intensity is averaged over foreground only and kept where at least half of a voxel is foreground, so a brain on
    zeros gets no dark rim. Every scan goes this way, in ``data_prep preprocess`` as in ``g3n forecast``.
    """
    volume = np.maximum(np.asarray(volume, np.float32), 0)
    share = resample(volume > 0, affine, grid)
    mixed = resample(volume, affine, grid)
    return np.where(share >= 0.5, mixed / np.maximum(share, 0.5), 0).astype(np.float32)


def place_on_atlas(volume: np.ndarray, affine: np.ndarray, always: bool = False) -> np.ndarray:
    """``affine`` itself, or moved so that the brain's center lies on the atlas's where it is over 30 mm off or ``always``.

    Files on the SRI24 grid, for example, have their origin in a corner.
    """
    off = np.array(BRAIN_CENTER_MM) - brain_center(volume, affine)
    if not always and np.linalg.norm(off) <= MAX_OFF_CENTER_MM:
        return affine
    moved = affine.copy()
    moved[:3, 3] += off
    return moved


def brain_center(volume: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """World mm of the center of mass of the foreground, of a head its upper 150 mm (below is face and neck)."""
    foreground = np.argwhere(volume > 0.1 * np.percentile(volume[volume > 0], 99.5))
    world = foreground @ affine[:3, :3].T + affine[:3, 3]
    height = world[:, 2]
    return world[height > np.percentile(height, 99.8) - 150].mean(0)
