"""Reading, writing and resampling volumes, against nibabel and scipy."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.processing import resample_from_to
from scipy import ndimage

from g3n.config import G3nError, build, to_plain
from g3n.nifti import Grid, atlas_grid, read_volume, resample, to_grid, write_volume
from g3n.templates import read_template

AFFINE = np.array([[-1.5, 0.1, 0, 40], [0.1, 2.0, 0.2, -30], [0, -0.2, 2.5, 7], [0, 0, 0, 1]], float)


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE, slope: float | None = None) -> Path:
    image = nib.Nifti1Image(array, affine)
    if slope:
        image.header.set_slope_inter(slope, 3)
    nib.save(image, path)
    return path


@pytest.fixture
def volume() -> np.ndarray:
    return np.random.default_rng(0).integers(1, 1000, (9, 11, 7)).astype(np.int16)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("dtype", [np.uint8, np.int16, ">i2", np.float32, np.float64])
def test_read_agrees_with_nibabel(tmp_path: Path, volume: np.ndarray, name: str, kind: type, dtype: str) -> None:
    image = kind(volume.astype(dtype), AFFINE)
    image.header.set_slope_inter(0.25, -3)
    nib.save(image, tmp_path / name)
    found, affine = read_volume(tmp_path / name)
    oracle = nib.load(tmp_path / name)
    np.testing.assert_allclose(found, oracle.get_fdata(), rtol=1e-6)
    np.testing.assert_array_equal(affine, oracle.affine)
    assert found.dtype == np.float32
    assert affine.dtype == np.float64


def test_write_then_read(tmp_path: Path, volume: np.ndarray) -> None:
    write_volume(tmp_path / "a.nii.gz", volume, AFFINE)
    found, affine = read_volume(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(found, volume)
    np.testing.assert_allclose(affine, AFFINE, atol=1e-6)
    image = nib.load(tmp_path / "a.nii.gz")
    assert image.get_data_dtype() == np.int16
    assert nib.aff2axcodes(image.affine) == ("L", "A", "S")
    write_volume(tmp_path / "b.nii.gz", volume.astype(np.float64), AFFINE)
    assert nib.load(tmp_path / "b.nii.gz").get_data_dtype() == np.float32
    first = (tmp_path / "a.nii.gz").read_bytes()
    write_volume(tmp_path / "a.nii.gz", volume, AFFINE)
    assert (tmp_path / "a.nii.gz").read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.nii.gz", "b.nii.gz"]


def test_trailing_axis_of_one_is_dropped(tmp_path: Path, volume: np.ndarray) -> None:
    found, _ = read_volume(save(tmp_path / "a.nii.gz", volume[..., None]))
    np.testing.assert_array_equal(found, volume)


def test_bad_input_is_named(tmp_path: Path, volume: np.ndarray) -> None:
    good = save(tmp_path / "good.nii.gz", volume)
    plain = save(tmp_path / "plain.nii", volume)

    def expect(words: str, name: str, content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(G3nError, match=words) as caught:
            read_volume(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)

    expect("truncated", "cut.nii.gz", good.read_bytes()[:-400])
    expect("truncated", "cut.nii", plain.read_bytes()[:-1])
    expect("damaged|truncated", "flipped.nii.gz", good.read_bytes()[:500] + b"\0\0\0\0" + good.read_bytes()[504:])
    expect("not a NIfTI", "text.nii", b"hello")
    expect("not a single-file NIfTI", "zeros.nii", bytes(4000))
    header = bytearray(plain.read_bytes())
    header[42:48] = np.array([2000, 2000, 2000], "<i2").tobytes()
    expect("announces 2000x2000x2000 voxels", "huge.nii", bytes(header))
    header[42:48] = np.array([90, 110, 70], "<i2").tobytes()
    expect("truncated", "lies.nii", bytes(header))
    expect("truncated", "lies.nii.gz", gzip.compress(bytes(header)))
    header[42:48] = np.array([-9, 11, 7], "<i2").tobytes()
    expect("announces|damaged", "negative.nii", bytes(header))
    header = bytearray(plain.read_bytes())
    header[280:328] = bytes(48)
    header[252:256] = np.array([0, 1], "<i2").tobytes()
    expect("affine", "flat.nii", bytes(header))

    arrays = {
        "4-D 9x11x7x2": np.stack([volume, volume], -1),
        "2-D": volume[..., 0],
        "all zero": np.zeros_like(volume),
        "complex64": volume.astype(np.complex64),
    }
    for words, array in arrays.items():
        with pytest.raises(G3nError, match=words):
            read_volume(save(tmp_path / "x.nii.gz", array))
    for bad in (np.nan, np.inf):
        broken = volume.astype(np.float32)
        broken[1, 2, 3] = bad
        with pytest.raises(G3nError, match="1 NaN or infinite"):
            read_volume(save(tmp_path / "x.nii.gz", broken))
    with pytest.raises(G3nError, match=r"none\.nii"):
        read_volume(tmp_path / "none.nii")
    with pytest.raises(G3nError, match="announces"):
        read_volume(good, max_voxels=692)
    with pytest.raises(G3nError, match=r"ending in \.nii\.gz"):
        write_volume(tmp_path / "a.nii", volume, AFFINE)


def test_huge_header_is_refused_before_data_is_read(tmp_path: Path, volume: np.ndarray) -> None:
    """A small gzip file that would unpack to gigabytes is turned down by its header."""
    header = bytearray(save(tmp_path / "a.nii", volume).read_bytes()[:352])
    header[42:48] = np.array([30000, 30000, 30000], "<i2").tobytes()
    (tmp_path / "bomb.nii.gz").write_bytes(gzip.compress(bytes(header) + bytes(1 << 22)))
    with pytest.raises(G3nError, match="announces 30000x30000x30000"):
        read_volume(tmp_path / "bomb.nii.gz")


@pytest.mark.parametrize("order", [0, 1])
def test_resample_agrees_with_nibabel(volume: np.ndarray, order: int) -> None:
    turn = np.array([[0, -1.2, 0.1, 39], [1.1, 0, 0.2, -30], [0.1, 0, 1.3, 6], [0, 0, 0, 1]], float)
    grid = Grid((12, 9, 10), tuple(map(tuple, turn.tolist())))
    image = nib.Nifti1Image(volume.astype(np.float32), AFFINE)
    oracle = resample_from_to(image, (grid.shape, grid.matrix), order=order).get_fdata()
    found = resample(volume, AFFINE, grid, order)
    assert found.dtype == np.float32
    assert (oracle > 0).mean() > 0.2
    np.testing.assert_allclose(found, oracle, atol=1e-2)


def test_coarse_grid_averages_instead_of_picking() -> None:
    """A pattern finer than the grid comes out as its mean; picking voxels would give stripes."""
    x = np.arange(64)
    stripes = 100 + 50 * np.where((x // 2) % 2, 1.0, -1.0)[:, None, None] * np.ones((64, 64, 64))
    grid = Grid((12, 12, 12), ((4.0, 0, 0, 9.0), (0, 4.0, 0, 9.0), (0, 0, 4.0, 9.0), (0, 0, 0, 1.0)))
    found = resample(stripes, np.eye(4), grid)
    assert abs(found.mean() - 100) < 2
    assert found.std() < 5
    picked = ndimage.affine_transform(stripes, np.eye(3) * 4, 9.0, (12, 12, 12), order=1)
    assert abs(picked.mean() - 100) > 40


def test_to_grid_keeps_background_zero_and_rim_bright() -> None:
    ball = (np.indices((80, 80, 80)) - 39.5).__pow__(2).sum(0) < 30**2
    volume = np.where(ball, 200.0, 0.0)
    volume[~ball & (np.indices((80, 80, 80))[0] < 5)] = -20
    affine = np.eye(4)
    affine[:3, 3] = np.array([0, -17, 5]) - 39.5
    grid = atlas_grid((40, 48, 40), 4.0)
    found = to_grid(volume, affine, grid)
    np.testing.assert_allclose(found[found != 0], 200, rtol=1e-4)
    assert (found > 0).sum() * 64 == pytest.approx(ball.sum(), rel=0.03)


def test_atlas_grid() -> None:
    fine, coarse = atlas_grid((160, 192, 160), 1.0), atlas_grid((40, 48, 40), 4.0)
    assert nib.aff2axcodes(fine.matrix) == ("L", "P", "S")
    assert coarse.spacing_mm == (4.0, 4.0, 4.0)
    for grid in (fine, coarse):  # the outer faces of both boxes are the same
        corners = grid.matrix @ np.array([[-0.5, -0.5, -0.5, 1], [*(np.array(grid.shape) - 0.5), 1]]).T
        np.testing.assert_allclose(corners[:3].T, [[80, 79, -75], [-80, -113, 85]])
    assert build(Grid, json.loads(json.dumps(to_plain(fine))), "grid") == fine
    for shape, spacing in (((0, 4, 4), 1.0), ((4, 4, 9999), 1.0), ((4, 4, 4), 0.0), ((4, 4, 4), float("nan"))):
        with pytest.raises(G3nError):
            atlas_grid(shape, spacing)
    with pytest.raises(G3nError, match="inverted"):
        build(Grid, {"shape": [2, 2, 2], "affine": [[0.0] * 4] * 4}, "grid")


def test_atlas_box_holds_the_icbm_brain() -> None:
    pytest.importorskip("nilearn")
    t1, affine = read_template("t1")
    where = np.argwhere(t1 > 0) @ affine[:3, :3].T + affine[:3, 3]
    index = (where - np.array(atlas_grid((160, 192, 160), 1.0).affine)[:3, 3]) * [-1, -1, 1]
    assert (index.min(0) >= 0).all()
    assert (index.max(0) <= [159, 191, 159]).all()
