"""Features a second: ``g3n embed`` from shards against the same encoder fed by MONAI's DataLoader from .nii.gz, in the same run.

``python -m benchmarks.embedding [--volumes 32] [--encoders none tiny published]``. The volumes are those of benchmarks.stream: made,
160x192x160 int16. MONAI reads them by ``LoadImaged`` (nibabel), ``Orientationd`` and ``NormalizeIntensityd``, in as many worker processes
as do best of those tried. Both write what they found as Parquet; opening the encoder and starting workers is not timed. ``none`` takes a few voxels, so it is
reading alone; with an encoder that takes longer than reading the ratio goes to 1, whoever reads.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from monai.data import DataLoader, Dataset
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, NormalizeIntensityd, Orientationd

from benchmarks.measure import device, write_rows
from benchmarks.stream import SHAPE, made_shards, remember, volumes
from g3n.embed import READERS, write_parts
from g3n.encoders.contract import Encoder, Scans
from g3n.encoders.ours import from_vit
from g3n.features import Features, join_features, write_features
from g3n.latent import freeze
from g3n.models.mae import Encoder as MAEEncoder
from g3n.models.mae import MAEConfig
from g3n.nifti import atlas_grid
from g3n.scans import shard_scans
from g3n.stream.index import load_index

GRID = atlas_grid(SHAPE, 1.0)
SIZES = {"tiny": {"width": 192, "depth": 4, "heads": 4, "mlp": 768}, "published": {}}
Row = dict[str, Any]


def encoder_of(name: str, shape: tuple[int, int, int] = SHAPE) -> Encoder:
    """``none``, or a MAE's encoder with random weights."""
    if name == "none":
        return Encoder(name, "", None, {}, lambda scans: {"mean": scans.volume_BXYZ[:, 80, 90:98, 80].float()})
    torch.manual_seed(0)
    net = freeze(MAEEncoder(MAEConfig(volume_shape=shape, **SIZES[name]))).to(device())  # type: ignore[arg-type]
    return from_vit(name, net, "", GRID, {})


def write_files(shards: Path, folder: Path) -> list[str]:
    """The volumes of shards as .nii.gz, int16, as nibabel compresses them."""
    folder.mkdir()
    paths = []
    for i, voxels in enumerate(volumes(load_index(str(shards)))):
        paths.append(str(folder / f"{i:05d}.nii.gz"))
        nib.save(nib.Nifti1Image(voxels, GRID.matrix), paths[-1])
    return paths


def from_shards(shards: Path, encoder: Encoder, batch: int, output: Path) -> float:
    """Seconds of the whole: read, check, encode, write."""
    source = shard_scans(str(shards), None)
    parts = output.with_suffix(".parts")
    parts.mkdir()
    begin = time.perf_counter()
    write_parts(source, encoder, parts, torch.device(device()), batch, READERS)
    join_features([parts / f"{part.name}.parquet" for part in source.parts], output, {})
    return time.perf_counter() - begin


def monai_batches(paths: list[str], batch: int, workers: int) -> Iterator[torch.Tensor]:
    steps = Compose(
        [
            LoadImaged(keys="image", reader="NibabelReader"),
            EnsureChannelFirstd(keys="image"),
            Orientationd(keys="image", axcodes="LPS", labels=None),
            NormalizeIntensityd(keys="image", nonzero=True),
        ]
    )
    data = Dataset([{"image": path} for path in paths], steps)
    return (found["image"][:, 0].as_tensor() for found in DataLoader(data, batch_size=batch, num_workers=workers))


def from_files(paths: list[str], encoder: Encoder, batch: int, workers: int, output: Path) -> float:
    """Seconds of the same by MONAI, from the first batch on (starting workers is not reading), scaled to all volumes."""
    batches = monai_batches(paths, batch, workers)
    next(batches)
    begin = time.perf_counter()
    found: list[np.ndarray] = []
    for volume_BXYZ in batches:
        x = volume_BXYZ.to(device())
        ones = torch.ones(len(x), device=device())
        values = encoder.features(Scans(x, 0 * ones, ones, GRID, ("T1",) * len(x)))
        found += list(values["mean"].float().cpu().numpy())
    table = pd.DataFrame({"key": [str(i) for i in range(len(found))]})
    write_features(output, Features(table, {"mean": np.stack(found)}, {}))
    return (time.perf_counter() - begin) * len(paths) / len(found)


def encoder_seconds(encoder: Encoder, batch: int) -> float:
    """Of one batch that is there already."""
    x = torch.rand(batch, *SHAPE, device=device())
    ones = torch.ones(batch, device=device())
    scans = Scans(x, 0 * ones, ones, GRID, ("T1",) * batch)
    encoder.features(scans)["mean"].cpu()
    begin = time.perf_counter()
    encoder.features(scans)["mean"].cpu()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volumes", type=int, default=32)
    parser.add_argument("--encoders", nargs="*", default=["none", "tiny", "published"], choices=["none", *SIZES])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--workers", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--output", type=Path, help="folder of embedding.csv; default benchmarks/results/<device>")
    args = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=args.output) as temporary:
        folder = Path(temporary)
        made_shards(folder / "shards", args.volumes)
        paths = write_files(folder / "shards", folder / "files")
        for part in ("shards", "files"):
            remember(folder / part)
        for name in args.encoders:
            encoder = encoder_of(name)
            alone = encoder_seconds(encoder, args.batch) / args.batch
            ours = args.volumes / from_shards(folder / "shards", encoder, args.batch, folder / f"{name}.parquet")
            theirs = {
                n: args.volumes / from_files(paths, encoder, args.batch, n, folder / f"{name}-{n}.parquet")
                for n in args.workers
            }
            best = max(theirs, key=lambda n: theirs[n])
            row = {
                "encoder": name, "volumes": args.volumes, "batch": args.batch, "g3n_per_second": round(ours, 2),
                "monai_per_second": round(theirs[best], 2), "monai_workers": best, "ratio": round(ours / theirs[best], 2),
                "encoder_alone_per_second": round(1 / alone, 2),
            }  # fmt: skip
            print(row, flush=True)
            rows.append(row)
    print(write_rows("embedding", rows, args.output))


if __name__ == "__main__":
    main()
