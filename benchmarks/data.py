"""How fast data is prepared, CPU only: ``G3N_REAL_DATA=... python -m benchmarks.data`` (about 15 minutes on two cores).

scan: a BIDS tree of 35,000 (empty) files. preprocess: seconds and peak memory of a session by step, and sessions an hour by
workers; on real scans where G3N_REAL_DATA has them, else on phantoms (which come without a skull). pack: writing, reading
and size of shards beside a plain webdataset ShardWriter with .nii.gz members of the same int16 volumes, in the same run.
"""

from __future__ import annotations

import argparse
import gzip
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import webdataset

from benchmarks.measure import write_rows
from data_prep.bids import scan_bids
from data_prep.brain import brain_mask, remove_bias
from data_prep.formats import read_image
from data_prep.manifest import Scan, read_manifest, write_manifest
from data_prep.pack import Packing, pack_all
from data_prep.phantom import make_phantom
from data_prep.preprocess import preprocess_all
from data_prep.progress import default_workers
from data_prep.recipe import Recipe
from data_prep.register import register
from data_prep.scan import Shares
from data_prep.session import finish, load, strip
from data_prep.verify import verify_all
from g3n.nifti import write_volume
from g3n.stream.decode import read_volume_sample
from g3n.stream.index import load_index

FILES = 35_000
PUBLISHED = Recipe((240, 240, 155), 1.0, "affine", "deepbet", "n4")
REAL = ("head 0.98 mm", "sub-ASL01", "T1"), ("head 2 mm", "sub-IXI012", "T1"), ("stripped 0.87 mm", "sub-DEP01", "T1")
Row = dict[str, Any]


def row(part: str, case: str, what: str, value: float, unit: str) -> Row:
    print(f"{part:10} {case:28} {what:24} {value:10.3f} {unit}", flush=True)
    return {"part": part, "case": case, "what": what, "value": round(value, 4), "unit": unit}


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def scan(folder: Path) -> list[Row]:
    """35,000 images of 8,750 subjects with a table."""
    lines = ["participant_id\tage\tsex\tdiagnosis\tcohort"]
    for i in range(FILES // 4):
        anat = folder / f"bids/sub-{i:05d}/ses-1/anat"
        anat.mkdir(parents=True)
        for suffix in ("T1w", "ce-gd_T1w", "T2w", "FLAIR"):
            (anat / f"sub-{i:05d}_ses-1_{suffix}.nii.gz").touch()
        lines.append(f"sub-{i:05d}\t{20 + i % 60}\t{'FM'[i % 2]}\tHC\tX")
    (folder / "bids/participants.tsv").write_text("\n".join(lines) + "\n")
    seconds, _ = timed(lambda: scan_bids(folder / "bids", folder / "m.tsv", Shares(0.1, 0.1, 0)))
    assert len(read_manifest(folder / "m.tsv").scans) == FILES
    return [row("scan", f"{FILES} files", "whole", seconds, "s")]


def steps(root: str, item: Scan, recipe: Recipe, folder: str) -> dict[str, float]:
    """Seconds of each step of one scan and the process's peak memory; in a process of its own."""
    times: dict[str, float] = {}
    times["read"], image = timed(lambda: load(Path(root), item, read_image))
    if not image.stripped:
        times["strip"], mask = timed(lambda: brain_mask(image.volume, image.affine, recipe.strip))
    else:
        mask = image.brain
    times["n4"], _ = timed(lambda: remove_bias(image.volume, image.affine, mask))
    ready = strip(image, Recipe(recipe.shape, recipe.spacing_mm, recipe.align, recipe.strip, "none"))
    atlas = recipe.atlas
    times["register"], matrix = timed(lambda: register(ready.volume, ready.affine, atlas.t1, atlas.affine, "Affine"))
    times["resample, measure"], done = timed(lambda: finish(ready, np.linalg.inv(matrix), "affine", recipe, True))
    times["write"], _ = timed(lambda: write_volume(Path(folder) / "x.nii.gz", done.volume, recipe.grid.matrix))
    times["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return times


def inputs(folder: Path) -> tuple[Path, list[tuple[str, Scan]], Path]:
    """Root, named cases, and a manifest of sessions for scaling."""
    real = Path(os.environ.get("G3N_REAL_DATA", "/nowhere"))
    if real.is_dir():
        scan_bids(real, folder / "real.tsv", Shares(0.1, 0.1, 0))
        scans = read_manifest(folder / "real.tsv").scans
        cases = [
            (name, next(s for s in scans if f"sub-{s.subject}" == sub and s.modality == m)) for name, sub, m in REAL
        ]
        chosen = [s for s in scans if s.subject.startswith("IXI")][:4] + [
            s for s in scans if s.subject.startswith("DEP")
        ][:4]
        root = real
    else:
        make_phantom(folder / "phantom", 8, 1.0, 0, None)
        scan_bids(folder / "phantom", folder / "real.tsv", Shares(0.1, 0.1, 0))
        first = {s.subject: s for s in reversed(read_manifest(folder / "real.tsv").scans)}
        chosen, root = list(first.values()), folder / "phantom"
        cases = [("phantom 1 mm", chosen[0])]
    write_manifest(folder / "sessions.tsv", root, chosen, {})
    return root, cases, folder / "sessions.tsv"


def preprocess(folder: Path) -> list[Row]:
    root, cases, sessions = inputs(folder)
    rows = []
    context = multiprocessing.get_context("spawn")
    for name, item in cases:
        with context.Pool(1, initializer=_one_thread) as pool:
            times = pool.apply(steps, (str(root), item, PUBLISHED, str(folder)))
        peak = times.pop("peak")
        total = sum(times.values())
        rows += [row("preprocess", name, step, seconds, "s") for step, seconds in times.items()]
        rows += [row("preprocess", name, "whole", total, "s"), row("preprocess", name, "peak memory", peak, "MiB")]
    for workers in sorted({1, default_workers()}):
        output = folder / f"derivatives-{workers}"
        seconds, outcomes = timed(lambda out=output, n=workers: preprocess_all(sessions, out, PUBLISHED, n))
        rows.append(row("preprocess", f"{workers} workers", "sessions an hour", 3600 * len(outcomes) / seconds, "1/h"))
    return rows


def _one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"


def pack(folder: Path, derivatives: Path | None) -> list[Row]:
    """The volumes of ``derivatives``, or (packed again four times under other names) those that preprocess left here."""
    manifest = (derivatives or folder / f"derivatives-{default_workers()}") / "manifest.tsv"
    rows = []
    seconds = {}
    packing = Packing(allow_faces=True, allowed_flags=("overlap", "contrast", "volume", "spacing"))
    for workers in sorted({1, default_workers()}):
        output = folder / f"shards-{workers}"
        seconds[workers], _ = timed(lambda out=output, n=workers: pack_all(manifest, out, packing, n))
    index = load_index(str(folder / "shards-1"))
    entries = [(shard, s) for shards in index.splits.values() for shard in shards for s in shard.samples]
    count, size = len(entries), sum(shard.bytes for shards in index.splits.values() for shard in shards)
    for workers, took in seconds.items():
        rows.append(row("pack", f"{workers} workers", "volumes a second", count / took, "1/s"))
    took, found = timed(lambda: verify_all(str(folder / "shards-1"), 1))
    assert not found.problems
    rows += [
        row("verify", "1 worker", "volumes a second", count / took, "1/s"),
        row("verify", "1 worker", "MB a second", size / 1e6 / took, "MB/s"),
    ]
    volumes = [read_volume_sample(index, shard, s).voxels for shard, s in entries]
    # one at a time, as the other reader below: keeping all would time the allocation of memory
    read, _ = timed(lambda: sum(read_volume_sample(index, shard, s).voxels.size > 0 for shard, s in entries))
    for level in (1, 6):
        rows += _against(folder, index.grid.matrix, volumes, level, read, size)
    rows.append(row("read", "g3n shards, 1 process", "volumes a second", count / read, "1/s"))
    rows.append(row("read", "g3n shards", "MB a volume", size / 1e6 / count, "MB"))
    return rows


def _against(
    folder: Path, affine: np.ndarray, volumes: Sequence[np.ndarray], level: int, read: float, size: int
) -> list[Row]:
    """webdataset.ShardWriter of .nii.gz at a gzip level, and reading it back to int16 arrays with nibabel."""
    target = folder / f"wds-{level}"
    target.mkdir()

    def write() -> None:
        with webdataset.ShardWriter(f"{target}/%05d.tar", maxcount=64, encoder=False, verbose=0) as sink:
            for i, voxels in enumerate(volumes):
                content = gzip.compress(nib.Nifti1Image(voxels, affine).to_bytes(), level)
                sink.write({"__key__": f"{i:06d}", "nii.gz": content})

    def read_back() -> int:
        urls = sorted(str(p) for p in target.iterdir())
        found = 0
        for sample in webdataset.WebDataset(urls, shardshuffle=False):
            image = nib.Nifti1Image.from_bytes(gzip.decompress(sample["nii.gz"]))
            found += np.asarray(image.dataobj).size > 0
        return found

    wrote, _ = timed(write)
    took, found = timed(read_back)
    assert found == len(volumes)
    case = f"webdataset .nii.gz level {level}"
    bytes_ = sum(p.stat().st_size for p in target.iterdir())
    return [
        row("pack", case, "volumes a second", len(volumes) / wrote, "1/s"),
        row("read", case, "volumes a second", len(volumes) / took, "1/s"),
        row("read", case, "MB a volume", bytes_ / 1e6 / len(volumes), "MB"),
        row("read", f"g3n over {case}", "speed", took / read, "ratio"),
        row("read", f"g3n over {case}", "size", size / bytes_, "ratio"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--derivatives", type=Path, help="folder of preprocess to pack, instead of making one")
    parser.add_argument("--output", type=Path, help="folder of data.csv; default benchmarks/results/<device>")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = scan(folder) + preprocess(folder) + pack(folder, args.derivatives)
    print(write_rows("data", rows, args.output))


if __name__ == "__main__":
    main()
