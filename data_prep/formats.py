"""Reading images of other formats with the promises of g3n.nifti: headers checked first, bounded, named errors."""

from __future__ import annotations

import gzip
import io
import math
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from nibabel.freesurfer.mghformat import MGHError, MGHHeader
from nibabel.nifti1 import Nifti1PairHeader
from nibabel.spatialimages import HeaderDataError
from nibabel.spm99analyze import Spm99AnalyzeHeader

from g3n.config import G3nError
from g3n.nifti import read_volume

SUFFIXES = (".nii", ".nii.gz", ".hdr", ".img", ".mgz", ".mgh")
_MGH_BYTES = 284
_HDR_BYTES = 348


def read_image(path: str | Path, max_voxels: int = 2**28) -> tuple[np.ndarray, np.ndarray]:
    """float32 [X, Y, Z] and the affine [4, 4] to RAS+ mm of a NIfTI file or pair, Analyze 7.5, MGH or MGZ.

    Analyze stores no orientation: its axes are taken as nibabel does (x to the left), which is why such cohorts need a
    plan of their axes. Raises G3nError as ``read_volume`` does.
    """
    path = Path(path)
    name = path.name.lower()
    try:
        if name.endswith((".hdr", ".img")):
            return _read_pair(path, max_voxels)
        if name.endswith((".mgz", ".mgh")):
            return _read_mgh(path, max_voxels)
    except EOFError as error:
        raise G3nError(f"'{path}' is truncated: its gzip stream ends early; copy it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise G3nError(f"'{path}' is damaged ({error}); copy it again") from error
    except OSError as error:
        raise G3nError(f"'{path}' cannot be read ({error.strerror or error})") from error
    return read_volume(path, max_voxels)


def orientation_known(path: Path) -> bool:
    """Whether the header says how the voxels lie: NIfTI by a qform or sform code, MGH by its flag; Analyze never does."""
    name = path.name.lower()
    if name.endswith((".hdr", ".img")):
        path = path.with_suffix(".hdr")
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        start = (gzip.GzipFile(fileobj=file) if zipped else file).read(540)
    if name.endswith((".mgz", ".mgh")):
        return start[28:30] != b"\0\0"
    if start[4:7] in (b"n+2", b"ni2"):
        return any(start[344:352])
    return start[344:347] in (b"n+1", b"ni1") and any(start[252:256])


def _read_pair(path: Path, max_voxels: int) -> tuple[np.ndarray, np.ndarray]:
    with open(path.with_suffix(".hdr"), "rb") as head:
        start = head.read(_HDR_BYTES)
    if len(start) < _HDR_BYTES:
        raise G3nError(f"'{path}' is cut off in its header; copy it again")
    kind = Nifti1PairHeader if start[344:347] == b"ni1" else Spm99AnalyzeHeader
    if start[344:347] != b"ni1" and int.from_bytes(start[:4], "little") != _HDR_BYTES != int.from_bytes(
        start[:4], "big"
    ):
        raise G3nError(f"'{path}' is not an Analyze or NIfTI header; expected one of 348 bytes")
    header, shape, dtype, affine = _header(path, kind, start, max_voxels)
    slope, inter = _scaling(header)
    offset = float(header["vox_offset"]) if kind is Nifti1PairHeader else 0.0
    if not 0 <= offset <= 1 << 24:
        raise G3nError(f"'{path}' has a damaged header (voxels start at byte {offset:g})")
    image = path.with_suffix(".img")
    zipped = not image.is_file()
    with open(f"{image}.gz" if zipped else image, "rb") as file:
        stream = gzip.GzipFile(fileobj=file) if zipped else file
        return _voxels(path, stream, int(offset), shape, dtype, slope, inter), affine


def _read_mgh(path: Path, max_voxels: int) -> tuple[np.ndarray, np.ndarray]:
    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        stream: BinaryIO | gzip.GzipFile = gzip.GzipFile(fileobj=file) if zipped else file
        start = stream.read(_MGH_BYTES)
        if len(start) < _MGH_BYTES or int.from_bytes(start[:4], "big") != 1:
            raise G3nError(f"'{path}' is not an MGH file; expected version 1 and 284 bytes of header")
        _, shape, dtype, affine = _header(path, MGHHeader, start, max_voxels)
        return _voxels(path, stream, 0, shape, dtype, 1.0, 0.0), affine


def _header(
    path: Path, kind: Any, start: bytes, max_voxels: int
) -> tuple[Any, tuple[int, ...], np.dtype[Any], np.ndarray]:
    try:
        header = kind.from_fileobj(io.BytesIO(start), check=False)
        shape = tuple(int(n) for n in header.get_data_shape())
        dtype, affine = header.get_data_dtype(), np.array(header.get_best_affine(), np.float64)
    except (HeaderDataError, MGHError, ValueError, KeyError, TypeError, OverflowError, IndexError) as error:
        raise G3nError(f"'{path}' has a damaged header ({' '.join(str(error).split())[:100]})") from error
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or min(shape) < 1 or math.prod(shape) > max_voxels:
        raise G3nError(
            f"'{path}' announces {'x'.join(map(str, shape))} voxels; expected one volume of at most {max_voxels}"
        )
    if dtype.kind not in "iuf":
        raise G3nError(f"'{path}' holds {dtype} voxels; expected integers or real numbers")
    if not (np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 1e-9):
        raise G3nError(f"'{path}' has an affine that cannot be inverted; repair its header")
    return header, shape, dtype, affine


def _scaling(header: Any) -> tuple[float, float]:
    try:
        slope, inter = header.get_slope_inter()
    except HeaderDataError:
        return 1.0, 0.0
    return (1.0 if slope is None or not math.isfinite(slope) else float(slope)), float(inter or 0)


def _voxels(
    path: Path, stream: Any, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any], slope: float, inter: float
) -> np.ndarray:
    count = math.prod(shape) * dtype.itemsize
    stream.read(offset)
    data = stream.read(count)
    if len(data) < count:
        raise G3nError(f"'{path}' is truncated: {count - len(data)} bytes are missing")
    volume = np.ascontiguousarray(np.frombuffer(data, dtype).reshape(shape, order="F"), np.float32)
    if (slope, inter) != (1.0, 0.0):
        volume = volume * np.float32(slope) + np.float32(inter)
    bad = volume.size - int(np.isfinite(volume).sum())
    if bad:
        raise G3nError(f"'{path}' has {bad} NaN or infinite voxels; repair or leave out this scan")
    if not volume.any():
        raise G3nError(f"'{path}' is all zero; leave out this scan")
    return volume
