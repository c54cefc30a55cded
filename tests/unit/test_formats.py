"""Analyze, NIfTI pairs, MGH and MGZ against nibabel; damage is named before it costs memory."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_prep.formats import read_image
from g3n.config import G3nError

AFFINE = np.array([[0, 0, 1.5, -40], [-1.0, 0, 0, 60], [0, 2, 0, -50], [0, 0, 0, 1]])
VOXELS = np.random.default_rng(0).integers(0, 900, (9, 11, 7))


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.float32])
@pytest.mark.parametrize("name", ["a.mgz", "a.mgh", "a.hdr", "a.img", "a.nii.gz"])
def test_round_trips(name: str, kind: type, tmp_path: Path) -> None:
    image_class = (
        nib.MGHImage if "mg" in name[-4:] and name != "a.img" else nib.Nifti1Image if "nii" in name else nib.Nifti1Pair
    )
    voxels = (VOXELS % 250).astype(kind)
    nib.save(image_class(voxels, AFFINE), tmp_path / name)
    volume, affine = read_image(tmp_path / name)
    np.testing.assert_array_equal(volume, voxels.astype(np.float32))
    np.testing.assert_allclose(affine, AFFINE, atol=1e-4)


@pytest.mark.parametrize("order", ["<", ">"])
def test_analyze_in_both_byte_orders(order: str, tmp_path: Path) -> None:
    header = nib.AnalyzeHeader(endianness=order)
    image = nib.AnalyzeImage(VOXELS.astype(np.int16)[..., None], np.diag([1, 1, 1.25, 1]), header)
    image.header.set_zooms((1, 1, 1.25, 1))
    nib.save(image, tmp_path / "a.hdr")
    volume, affine = read_image(tmp_path / "a.hdr")
    np.testing.assert_array_equal(volume, VOXELS)
    np.testing.assert_allclose(np.abs(np.diag(affine)[:3]), (1, 1, 1.25))
    (tmp_path / "a.img.gz").write_bytes(gzip.compress((tmp_path / "a.img").read_bytes()))
    (tmp_path / "a.img").unlink()
    np.testing.assert_array_equal(read_image(tmp_path / "a.hdr")[0], VOXELS)


def test_damage_is_named(tmp_path: Path) -> None:
    nib.save(nib.MGHImage(VOXELS.astype(np.float32), AFFINE), tmp_path / "a.mgh")
    whole = (tmp_path / "a.mgh").read_bytes()
    nan = bytearray(whole)
    nan[284:288] = struct.pack(">f", float("nan"))
    huge = bytearray(whole)
    huge[4:16] = struct.pack(">3i", 30000, 30000, 30000)
    for content, words in (
        (whole[:200], "not an MGH"),
        (whole[:900], "truncated"),
        (bytes(nan), "1 NaN"),
        (bytes(huge), "announces 30000x30000x30000"),
        (whole[:284] + bytes(len(whole) - 284), "all zero"),
    ):
        (tmp_path / "b.mgh").write_bytes(content)
        with pytest.raises(G3nError, match=words):
            read_image(tmp_path / "b.mgh")
    (tmp_path / "b.mgz").write_bytes(gzip.compress(whole)[:-30])
    with pytest.raises(G3nError, match="truncated"):
        read_image(tmp_path / "b.mgz")
    (tmp_path / "c.hdr").write_bytes(b"x" * 348)
    with pytest.raises(G3nError, match="not an Analyze"):
        read_image(tmp_path / "c.hdr")
    nib.save(nib.Nifti1Pair(VOXELS.astype(np.int16), AFFINE), tmp_path / "d.hdr")
    (tmp_path / "d.img").unlink()
    with pytest.raises(G3nError, match="cannot be read"):
        read_image(tmp_path / "d.hdr")
