"""Volumes a second from shards, against plain webdataset, MosaicML Streaming and LitData on the same volumes in the same run.

``python -m benchmarks.stream [--shards runs/demo/shards]``. Without ``--shards`` the volumes are made: 160x192x160 int16 that
compress like scans. Everybody hands over shuffled batches of int16 tensors; g3n alone checks each sample's checksums.
Formats: raw is the reader's default without compression, zstd has level 1. A cold run reads files that the page cache was told
to forget, each once; a warm one files that were read just before. Workers are threads of g3n, processes of the others; "1 core"
pins a process without workers to one core.

The others are optional. They ask for more than they use, and for another torch, so install them over an environment of g3n by
  pip install --no-deps mosaicml-streaming==0.13.0 litdata==0.2.76 'transformers<5' 'huggingface_hub<1' 'tokenizers<0.23' \\
    lightning-utilities Brotli catalogue cramjam python-snappy regex zstd
MosaicML Streaming wants the torchvision of your torch too, for image datasets alone. What is missing is reported as missing.
"""

from __future__ import annotations

import argparse
import importlib
import io
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
import zstandard
from torch.utils.data import DataLoader

from benchmarks.measure import version, write_rows
from data_prep.shards import PackedSample, write_index, write_split
from g3n.stream.decode import read_volume_sample
from g3n.stream.index import ShardIndex, load_index
from g3n.stream.lanes import StreamConfig, TrainStream

SHAPE = (160, 192, 160)
SHARDS = 8
SHARD_BYTES = 1 << 26  # of the others
Row = dict[str, Any]
Batches = Iterable[Any]


@dataclass(frozen=True)
class Reader:
    """``write(volumes, folder)`` once, then ``read(folder, workers, batch)`` gives batches of one epoch or more."""

    name: str
    format: str
    package: str
    write: Callable[[ShardIndex, Path], None]
    read: Callable[[Path, int, int], Batches]


def made_volume(number: int, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """int16 [X, Y, Z]: an ellipsoid of 28 % of the box with smooth contrast and noise; zstd-1 leaves about a quarter."""
    rng = np.random.default_rng(number)
    x, y, z = np.ogrid[-1 : 1 : shape[0] * 1j, -1 : 1 : shape[1] * 1j, -1 : 1 : shape[2] * 1j]
    inside = x**2 + y**2 + z**2 < 0.655
    smooth = 600 + 150 * np.sin(9 * x + number) * np.cos(7 * y) * np.cos(8 * z)
    noise = rng.normal(0, 150, shape).astype(np.float32)
    return np.where(inside, np.clip(smooth + noise, 1, 4095), 0).astype(np.int16)


def made_shards(folder: Path, count: int, shape: tuple[int, int, int] = SHAPE) -> None:
    """``SHARDS`` shards of ``count`` made volumes in all."""

    def sample(number: int) -> PackedSample:
        voxels = made_volume(number, shape)
        brain = voxels[voxels != 0]
        meta = {
            "shape": list(shape), "scale": 1.0, "brain_mean": float(brain.mean()), "brain_std": float(brain.std()),
            "affine": np.eye(4).tolist(), "days_from_baseline": 0, "variables": {"modality": "T1"},
        }  # fmt: skip
        return PackedSample(f"sub-{number:016x}_ses-01_T1", f"{number:016x}", "T1", 1, voxels, meta)

    folder.mkdir()
    lists = ([sample(n) for n in range(first, count, SHARDS)] for first in range(SHARDS))
    header = {
        "kind": "volume",
        "recipe": {},
        "grid": {"shape": list(shape), "affine": np.eye(4).tolist()},
        "variables": {"modality": ["T1"]},
    }
    write_index(folder, header, {"train": write_split(folder, "train", lists)})


def volumes(index: ShardIndex) -> Iterator[np.ndarray]:
    for shard in index.shards("train"):
        for sample in shard.samples:
            yield read_volume_sample(index, shard, sample).voxels


# --- the readers


def g3n_read(folder: Path, workers: int, batch: int) -> Batches:
    index = load_index(str(folder))
    lanes = min(8, len(index.shards("train")))
    return TrainStream(index, StreamConfig(index.url, lanes, max(workers, 1)), "volume", batch, 0, 1, 0)


def webdataset_write(index: ShardIndex, folder: Path, compressed: bool) -> None:
    compress = zstandard.ZstdCompressor(level=1).compress if compressed else bytes
    with webdataset.ShardWriter(f"{folder}/%05d.tar", maxsize=SHARD_BYTES, encoder=False, verbose=0) as sink:
        for i, voxels in enumerate(volumes(index)):
            buffer = io.BytesIO()
            np.save(buffer, voxels, allow_pickle=False)
            sink.write({"__key__": f"{i:06d}", "volume": compress(buffer.getvalue())})


def webdataset_read(folder: Path, workers: int, batch: int, compressed: bool) -> Batches:
    urls = sorted(str(path) for path in folder.iterdir())
    data = (
        webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False).shuffle(8).map(partial(_npy, compressed))
    )
    return DataLoader(data, batch, num_workers=workers)


def _npy(compressed: bool, sample: dict[str, Any]) -> torch.Tensor:
    content = zstandard.ZstdDecompressor().decompress(sample["volume"]) if compressed else sample["volume"]
    return torch.from_numpy(np.load(io.BytesIO(content), allow_pickle=False))


def mosaic_write(index: ShardIndex, folder: Path, compressed: bool) -> None:
    streaming = importlib.import_module("streaming")
    column = "ndarray:int16:" + ",".join(map(str, index.grid.shape))
    options = {"compression": "zstd:1"} if compressed else {}
    with streaming.MDSWriter(out=str(folder), columns={"volume": column}, size_limit=SHARD_BYTES, **options) as sink:
        for voxels in volumes(index):
            sink.write({"volume": voxels})


def mosaic_read(folder: Path, workers: int, batch: int) -> Batches:
    """A compressed shard is written out next to itself when it is first read, and read from there."""
    streaming = importlib.import_module("streaming")
    for copy in folder.glob("shard.*.mds"):
        if copy.with_suffix(".mds.zstd").exists():
            copy.unlink()
    streaming.base.util.clean_stale_shared_memory()
    data = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=batch, keep_zip=True)
    return DataLoader(data, batch, num_workers=workers, collate_fn=_stacked)


def litdata_write(index: ShardIndex, folder: Path, compressed: bool) -> None:
    writer = importlib.import_module("litdata.streaming.writer")
    sink = writer.BinaryWriter(str(folder), chunk_bytes=SHARD_BYTES, compression="zstd" if compressed else None)
    for i, voxels in enumerate(volumes(index)):
        sink[i] = {"volume": voxels}
    sink.done()
    sink.merge()


def litdata_read(folder: Path, workers: int, batch: int) -> Batches:
    litdata = importlib.import_module("litdata")
    data = litdata.StreamingDataset(str(folder), shuffle=True)
    return litdata.StreamingDataLoader(data, batch_size=batch, num_workers=workers, collate_fn=_stacked)


def _stacked(samples: list[dict[str, Any]]) -> torch.Tensor:
    return torch.stack([torch.as_tensor(np.asarray(sample["volume"])) for sample in samples])


def readers() -> list[Reader]:
    found = [Reader("g3n", "zstd", "g3n", lambda index, folder: None, g3n_read)]
    for compressed, name in ((True, "zstd"), (False, "raw")):
        found += [
            Reader("webdataset", name, "webdataset", partial(webdataset_write, compressed=compressed),
                   partial(webdataset_read, compressed=compressed)),
            Reader("mosaicml-streaming", name, "mosaicml-streaming", partial(mosaic_write, compressed=compressed), mosaic_read),
            Reader("litdata", name, "litdata", partial(litdata_write, compressed=compressed), litdata_read),
        ]  # fmt: skip
    return found


# --- measuring


def forget(folder: Path) -> None:
    """Drop the files of a folder from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def remember(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                while file.read(1 << 24):
                    pass


def rate(reader: Reader, folder: Path, workers: int, batch: int, count: int, cold: bool) -> float:
    """Volumes a second over one epoch, after the first batch: starting processes is not reading."""
    (forget if cold else remember)(folder)
    batches = reader.read(folder, workers, batch)
    stream = iter(batches)
    next(stream)
    begin, found = time.perf_counter(), 0
    for one in itertools.islice(stream, count // batch - 1):
        found += len(one)
    seconds = time.perf_counter() - begin
    if isinstance(batches, TrainStream):
        batches.close()
    return found / seconds


def measure(reader: Reader, folder: Path, workers: list[int], batch: int, count: int, repeats: int) -> list[Row]:
    """The best of ``repeats`` for each case: what disturbs a run only makes it slower."""
    rows = []
    everywhere = os.sched_getaffinity(0)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.suffix != ".json") / count
    for case in ("1 core", *workers):
        for cold in (True, False):
            os.sched_setaffinity(0, {min(everywhere)} if case == "1 core" else everywhere)
            try:
                n = 0 if case == "1 core" else int(case)
                best = max(rate(reader, folder, n, batch, count, cold) for _ in range(repeats))
            finally:
                os.sched_setaffinity(0, everywhere)
            rows.append(
                {
                    "kind": "volume", "reader": reader.name, "format": reader.format, "workers": case,
                    "cache": "cold" if cold else "warm", "batch": batch, "samples_per_second": round(best, 1),
                    "mb_a_volume": round(size / 1e6, 2), "cores": len(everywhere), "volumes": count,
                    "reader_version": version(reader.package),
                }
            )  # fmt: skip
            print(
                f"{reader.name} {reader.format}, {case} workers, {rows[-1]['cache']}: {best:.1f} volumes/s", flush=True
            )
    return rows


def with_ratios(rows: list[Row]) -> list[Row]:
    """``g3n_ratio``: how many times as fast g3n is in the same case of the same run."""
    ours = {(row["workers"], row["cache"]): row["samples_per_second"] for row in rows if row["reader"] == "g3n"}
    return [
        {**row, "g3n_ratio": round(ours[row["workers"], row["cache"]] / row["samples_per_second"], 2)} for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, help="local folder of volume shards, instead of making some")
    parser.add_argument("--volumes", type=int, default=256, help="how many to make")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="folder of stream.csv; default benchmarks/results/<device>")
    args = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=args.output) as temporary:
        shards = args.shards or Path(temporary) / "shards"
        if not args.shards:
            made_shards(shards, args.volumes)
        index = load_index(str(shards))
        count = sum(len(shard.samples) for shard in index.shards("train"))
        for reader in readers():
            folder = shards if reader.name == "g3n" else Path(temporary) / f"{reader.name}-{reader.format}"
            folder.mkdir(exist_ok=True)
            try:
                reader.write(index, folder)
                rows += measure(reader, folder, args.workers, args.batch, count, args.repeats)
            except ImportError as error:
                print(f"{reader.name} {reader.format}: missing ({error})")
            if folder != shards:
                shutil.rmtree(folder)
    rows = with_ratios(rows)
    for row in rows:
        print(
            f"{row['reader']} {row['format']}, {row['workers']}, {row['cache']}: g3n is {row['g3n_ratio']} times as fast"
        )
    print(write_rows("stream", rows, args.output))


if __name__ == "__main__":
    main()
