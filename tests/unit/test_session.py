"""A session's way to the atlas: routes, registration, bias, planned repairs, flags."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from data_prep.atlas import load_atlas
from data_prep.brain import brain_mask, looks_stripped, need_tools, remove_bias
from data_prep.manifest import Scan
from data_prep.quality import flags_of
from data_prep.recipe import Recipe
from data_prep.register import register
from data_prep.session import Done, process_session
from g3n.config import G3nError
from g3n.nifti import Grid, atlas_grid, resample, to_grid, write_volume
from g3n.templates import read_template

pytest.importorskip("ants", reason="needs antspyx (pip install 'g3n[prep]')")
GRID = atlas_grid((60, 72, 60), 3.0)
RECIPE = Recipe(GRID.shape, 3.0, align="affine")


@pytest.fixture(scope="module")
def brain() -> np.ndarray:
    """The template's T1 at 3 mm, 0 to 1000."""
    t1, affine = read_template("t1")
    return 1000 * to_grid(t1, affine, GRID)


def moved(shift_mm: tuple[float, float, float], turn_degrees: float, scale: float = 1.0) -> np.ndarray:
    """[4, 4] atlas world -> another world."""
    angle = np.radians(turn_degrees)
    matrix = np.eye(4)
    matrix[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    matrix[:3, :3] *= scale
    matrix[:3, 3] = shift_mm
    return matrix


def scan(modality: str, path: str, **more: object) -> Scan:
    return replace(Scan("a", "1", modality, path, None, None, None, None, None, 0.0, "train"), **more)  # type: ignore[arg-type]


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * float((a & b).sum()) / float(a.sum() + b.sum())


def results(root: Path, scans: list[Scan], recipe: Recipe = RECIPE) -> list[Done]:
    found = process_session(root, scans, recipe)
    assert all(isinstance(f, Done) for f in found), found
    return [f for f in found if isinstance(f, Done)]


def test_registration_finds_a_known_transform(brain: np.ndarray) -> None:
    truth = moved((14, -22, 9), 8, 1.06)
    found = register(brain, truth @ GRID.matrix, brain, GRID.matrix, "Affine", 3.0)
    corners = np.array([[x, y, z, 1] for x in (-60, 60) for y in (-90, 60) for z in (-40, 70)]).T
    assert np.abs((found @ corners - truth @ corners)[:3]).max() < 2.0
    again = register(brain, truth @ GRID.matrix, brain, GRID.matrix, "Affine", 3.0)
    np.testing.assert_array_equal(found, again)


def test_a_session_reaches_the_atlas_through_its_t1(brain: np.ndarray, tmp_path: Path) -> None:
    """T1 tilted, shifted and small; the T2 moved against it as by a patient; both end where the template lies."""
    to_scan = moved((20, -30, 12), 10, 0.93)
    nudge = moved((6, -5, 8), 4)
    write_volume(tmp_path / "t1.nii.gz", brain, to_scan @ GRID.matrix)
    t2 = np.where(brain > 0, 1200 - brain, 0)
    write_volume(tmp_path / "t2.nii.gz", t2, nudge @ to_scan @ GRID.matrix)
    t1_done, t2_done = results(tmp_path, [scan("T1", "t1.nii.gz"), scan("T2", "t2.nii.gz")])
    assert (t1_done.about["align"], t1_done.about["center"], t2_done.about["center"]) == ("affine", True, False)
    for done, truth in ((t1_done, brain), (t2_done, t2)):
        assert dice(done.volume > 0, truth > 0) > 0.95
        inside = (done.volume > 0) & (truth > 0)
        assert np.corrcoef(done.volume[inside], truth[inside])[0, 1] > 0.85
        assert done.about["quality"]["dice_atlas"] > 0.93
        assert done.about["flags"] == []
    np.testing.assert_allclose(np.array(t1_done.about["scan_to_atlas"]) @ to_scan, np.eye(4), atol=2.5)


def test_without_a_t1_another_scan_is_the_center(brain: np.ndarray, tmp_path: Path) -> None:
    (tmp_path / "t1.nii.gz").write_bytes(b"no image")
    write_volume(tmp_path / "flair.nii.gz", brain, moved((30, 0, 0), 0) @ GRID.matrix)
    broken, done = process_session(tmp_path, [scan("T1", "t1.nii.gz"), scan("FLAIR", "flair.nii.gz")], RECIPE)
    assert isinstance(broken, str)
    assert "not a NIfTI" in broken
    assert isinstance(done, Done)
    assert done.about["center"]
    assert dice(done.volume > 0, brain > 0) > 0.95


def test_a_scan_on_the_atlas_keeps_its_place(brain: np.ndarray, tmp_path: Path) -> None:
    write_volume(tmp_path / "t1.nii.gz", brain, GRID.matrix)
    [done] = results(tmp_path, [scan("T1", "t1.nii.gz", space="mni_stripped")])
    assert done.about["align"] == "registered"
    np.testing.assert_allclose(done.volume, brain, atol=1e-2)
    off = moved((0, 25, 0), 0) @ GRID.matrix
    write_volume(tmp_path / "off.nii.gz", brain, off)
    [done] = results(tmp_path, [scan("T1", "off.nii.gz", space="mni_stripped")])
    assert done.about["align"] == "affine"
    assert dice(done.volume > 0, brain > 0) > 0.95


def test_axes_and_spacing_of_a_wrong_header_are_repaired(brain: np.ndarray, tmp_path: Path) -> None:
    """As OASIS-2 comes: axes (AP, SI, LR), identity header."""
    write_volume(tmp_path / "raw.nii.gz", brain.transpose(1, 2, 0), np.eye(4))
    plan = {"axes": "2,0,1", "spacing_mm": "3,3,3", "space": "oasis2_raw"}
    [done] = results(tmp_path, [scan("T1", "raw.nii.gz", **plan)], replace(RECIPE, align="center"))
    inside = (done.volume > 0) & (brain > 0)
    assert np.corrcoef(done.volume[inside], brain[inside])[0, 1] > 0.9


def test_a_mask_is_applied_first(brain: np.ndarray, tmp_path: Path) -> None:
    head = brain + 300.0
    write_volume(tmp_path / "head.nii.gz", head, GRID.matrix)
    write_volume(tmp_path / "mask.nii.gz", (brain > 0).astype(np.uint8), GRID.matrix)
    [done] = results(tmp_path, [scan("T1", "head.nii.gz", mask="mask.nii.gz", space="mni")])
    assert done.about["strip"] == "as it came"
    assert dice(done.volume > 0, brain > 0) > 0.98


def head_of(brain: np.ndarray) -> np.ndarray:
    """The brain in a shell of scalp, with noise in the air, as a scanner gives it."""
    filled = ndimage.binary_fill_holes(brain > 0)
    scalp = ndimage.binary_dilation(filled, iterations=6) & ~ndimage.binary_dilation(filled, iterations=3)
    noise = np.random.default_rng(0).uniform(1, 20, brain.shape)
    return np.where(scalp, 1400.0, np.where(filled, brain, noise)).astype(np.float32)


def test_an_external_tool_strips_and_the_other_scans_follow(brain: np.ndarray, tmp_path: Path) -> None:
    head = head_of(brain)
    assert not looks_stripped(head, GRID.matrix)
    assert looks_stripped(brain, GRID.matrix)
    nudge = moved((5, 4, -6), 3)
    write_volume(tmp_path / "t1.nii.gz", head, GRID.matrix)
    write_volume(tmp_path / "t2.nii.gz", np.maximum(1500 - head, 1), nudge @ GRID.matrix)
    write_volume(tmp_path / "mask.nii.gz", (brain > 0).astype(np.uint8), GRID.matrix)
    copy = tmp_path / "tool.py"
    copy.write_text(f"import shutil, sys\nshutil.copy(r'{tmp_path}/mask.nii.gz', sys.argv[2])\n")
    recipe = replace(RECIPE, strip="command", strip_command=f"{sys.executable} {copy} {{input}} {{output}}")
    for done in results(tmp_path, [scan("T1", "t1.nii.gz"), scan("T2", "t2.nii.gz")], recipe):
        assert done.about["strip"] == "command"
        assert dice(done.volume > 0, brain > 0) > 0.93
    failing = replace(recipe, strip_command=f"{sys.executable} -c pass {{input}} {{output}}")
    [why] = process_session(tmp_path, [scan("T1", "t1.nii.gz")], failing)
    assert isinstance(why, str)
    assert "code 0 and no volume" in why


def test_missing_tools_are_named() -> None:
    with pytest.raises(G3nError, match="needs --strip-command with"):
        need_tools("command", "none", "header", "hd-bet")
    with pytest.raises(G3nError, match="is not installed"):
        brain_mask(np.ones((4, 4, 4), np.float32), np.eye(4), "command", "no-such-tool {input} {output}")


def test_bias_is_removed(brain: np.ndarray) -> None:
    x = np.linspace(-1, 1, brain.shape[1])[None, :, None]
    field = 1 + 0.35 * x
    inside = brain > 0
    fixed = remove_bias((brain * field).astype(np.float32), GRID.matrix, inside)
    same = remove_bias(brain, GRID.matrix, inside)  # the template's own shading is not ours to judge
    tissue = (fixed > 100) & (same > 100)
    truth = np.broadcast_to(field, brain.shape)[tissue]
    found = (brain * field)[tissue] / fixed[tissue] / (brain[tissue] / same[tissue])
    assert np.corrcoef(found, truth)[0, 1] > 0.95
    left = (fixed[tissue] / same[tissue]).std() / (fixed[tissue] / same[tissue]).mean()
    assert left < 0.4 * truth.std()
    assert (fixed[~inside] == 0).all()


def test_lost_spacing_is_flagged(brain: np.ndarray, tmp_path: Path) -> None:
    lost = GRID.matrix @ np.diag([1, 1, 1 / 3, 1.0])  # 60 voxels of 3 mm, said to be 1 mm apart
    write_volume(tmp_path / "lost.nii.gz", brain, lost)
    [done] = results(tmp_path, [scan("T1", "lost.nii.gz")], replace(RECIPE, align="center"))
    assert "spacing" in done.about["flags"]


def test_flags() -> None:
    good = {
        "extent_mm": [240, 240, 155],
        "stripped": True,
        "brain_ml": 1400,
        "dice_atlas": 0.95,
        "correlation_atlas": 0.5,
    }
    assert flags_of(good, True, True) == []
    for change, flag in (
        ({"extent_mm": [256, 256, 24]}, "spacing"),
        ({"stripped": False}, "skull"),
        ({"brain_ml": 300}, "volume"),
        ({"dice_atlas": 0.7}, "overlap"),
        ({"correlation_atlas": 0.05}, "contrast"),
    ):
        assert flags_of({**good, **change}, True, True) == [flag]
    assert flags_of({**good, "dice_atlas": 0.7, "correlation_atlas": 0}, False, True) == []


def test_sri24_comes_from_a_file_and_keeps_its_voxels(brain: np.ndarray, tmp_path: Path) -> None:
    """The file has a fourth axis, LAS order and its origin in a corner; its voxels are the output's."""
    corner = np.array([[-1.0, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]])
    inner = Grid((240, 240, 155), tuple(map(tuple, atlas_grid((240, 240, 155), 1.0).matrix.tolist())))
    t1 = resample(brain, GRID.matrix, inner)
    import nibabel as nib

    flipped = nib.Nifti1Image(t1[:, ::-1, :, None].astype(np.int16), corner @ np.array(
        [[1.0, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1, 0], [0, 0, 0, 1]]
    ))  # fmt: skip
    nib.save(flipped, tmp_path / "sri24.nii")
    atlas = load_atlas("sri24", str(tmp_path / "sri24.nii"))
    grid = atlas.grid((240, 240, 155), 1.0)
    np.testing.assert_array_equal(atlas.t1 > 0, np.maximum(t1, 0).astype(np.int16) > 0)
    np.testing.assert_allclose(grid.matrix, atlas.affine)
    center = atlas.affine[:3, :3] @ np.argwhere(atlas.t1 > 0).mean(0) + atlas.affine[:3, 3]
    np.testing.assert_allclose(center, (0, -22.1, 9.5), atol=0.1)
    write_volume(tmp_path / "full.nii.gz", np.ones((240, 240, 155), np.uint8), np.eye(4))
    with pytest.raises(G3nError, match="skull-stripped SRI24"):
        load_atlas("sri24", str(tmp_path / "full.nii.gz"))
