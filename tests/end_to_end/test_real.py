"""Real scans through the chain: what comes out lies where the source lies, the right way round."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from g3n.latent import LatentSpace, normalize
from g3n.nifti import atlas_grid, place_on_atlas, read_volume, resample, to_grid, write_volume
from g3n.stream.index import load_index
from g3n.stream.lanes import eval_batches
from tests.chain import prepare, run, train

REAL = os.environ.get("G3N_REAL_DATA", "")
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not Path(REAL or "/nowhere").is_dir(), reason="G3N_REAL_DATA names no folder of real scans"),
]
GRID = atlas_grid((40, 48, 40), 4.0)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("real")
    prepare(
        Path(REAL), root, "--val", "0.2", "--test", "0", pack=("--allow-faces", "--allow-flagged", "spacing,volume")
    )
    train("mae", root, 10, "tracking.mlflow=false")
    train("decoder", root, 60, "tracking.mlflow=false")
    run(
        "python", "-m", "data_prep", "encode", "--tokenizer", f"{root}/decoder", "--shards", f"{root}/shards",
        "--output", f"{root}/latents",
    )  # fmt: skip
    return root


def test_hardly_a_scan_is_lost(work: Path) -> None:
    with open(work / "manifest.tsv") as file:
        found = len(file.readlines()) - 1
    index = load_index(f"{work}/shards")
    packed = sum(len(shard.samples) for shards in index.splits.values() for shard in shards)
    assert found >= 60
    assert packed >= 0.9 * found


def test_nothing_names_a_subject(work: Path) -> None:
    labels = {path.name[4:] for path in Path(REAL).glob("sub-*")}
    for folder in ("shards", "latents"):
        for file in (work / folder).iterdir():
            text = file.read_bytes()
            assert not [label for label in labels if label.encode() in text], file.name


@torch.no_grad()
def test_decoded_volumes_lie_where_their_source_lies(work: Path) -> None:
    """Through int16 shards, encoder, latents and decoder to NIfTI, then back onto the grid of the raw file."""
    with open(work / "manifest.tsv") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    space = LatentSpace.open(f"{work}/decoder")
    decoded = {}
    for batch in eval_batches(load_index(f"{work}/shards"), None, "volume", "train", 4, 0, 1, 0):
        scan = tuple(batch.tensors[k] for k in ("volume", "mean", "rstd"))
        for i, z in enumerate(space.decode(space.encode(*scan))):
            decoded[batch.keys[i]] = (normalize(*scan)[i].numpy(), z.numpy())
    checked = 0
    for row in [r for r in rows if r["modality"] == "T1" and r["split"] == "train"][:12]:
        raw, affine = read_volume(Path(REAL) / row["path"])
        on_grid = to_grid(raw, place_on_atlas(raw, affine), GRID)
        if not (on_grid > 0).any():
            continue
        brain = on_grid[on_grid > 0]
        source = np.where(on_grid > 0, (on_grid - brain.mean()) / brain.std(), 0)
        packed, made = min(decoded.values(), key=lambda pair: float(np.abs(pair[0] - source).mean()))
        if np.abs(packed - source).mean() > 1e-2:
            continue  # this scan was not packed
        write_volume(work / "made.nii.gz", made, GRID.matrix)
        image = nib.load(work / "made.nii.gz")
        assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
        back, back_affine = read_volume(work / "made.nii.gz")
        placed = place_on_atlas(raw, affine)
        target = type(GRID)(tuple(raw.shape), tuple(map(tuple, placed.tolist())))
        native = resample(back, back_affine, target)
        inside = resample((back != 0).astype(np.float32), back_affine, target) > 0.9
        upright = np.corrcoef(native[inside], raw[inside])[0, 1]
        turned = [np.corrcoef(np.flip(native, axis)[inside], raw[inside])[0, 1] for axis in range(3)]
        assert upright > 0.5
        assert upright > max(turned) + 0.02
        checked += 1
    assert checked >= 8
