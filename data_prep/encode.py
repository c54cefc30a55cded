"""From volume shards to latent shards: frozen projected tokens of each subject and modality, visits in time order."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from data_prep.shards import (
    FORMAT,
    INDEX_VERSION,
    PackedSample,
    encode_sample,
    fingerprint_of,
    finished_shard,
    start,
    write_index,
    write_shard,
)
from g3n.config import G3nError
from g3n.latent import LatentSpace, pick_device
from g3n.meters import progress_bar
from g3n.stream.decode import Damage, Volume, read_latent_sample, read_volume_sample
from g3n.stream.index import Sample, Shard, ShardIndex, load_index, parse_index

_LARGEST_FLOAT16 = float(np.finfo(np.float16).max)
_SMALLEST_SCALE = 1e-6  # a channel that is constant over the train split
_READERS = 4
_SESSION = re.compile(r"_ses-(\d{2,})_")


def encode(tokenizer: str, shards: str, output: Path, device: str | None, batch: int) -> None:
    """Write latent shards, ``statistics.safetensors`` and at last ``index.json`` to ``output``.

    tokenizer: a decoder run; shards: the volume shards it was trained on; each of them gives one latent shard of the same
    name. ``device`` None is the GPU where there is one; ``batch`` volumes are encoded at once. A call that was stopped goes
    on after the last finished shard; a finished folder is left as it is. Raises G3nError for foreign shards, damaged
    samples, or an output folder that holds anything else.
    """
    if batch < 1:
        raise G3nError(f"batch is {batch}; give at least 1")
    where = pick_device(device)
    space = LatentSpace.open(tokenizer, device=where)
    index = load_index(shards)
    if index.kind != "volume" or index.fingerprint not in space.volumes:
        raise G3nError(
            f"shards '{shards}' are {index.kind}s with fingerprint {index.fingerprint}, but tokenizer '{tokenizer}' was "
            f"trained on volumes {space.volumes_fingerprint}; use the same shards"
        )
    volumes = sum(len(shard.samples) for shard in index.shards("train"))
    if volumes < 2:
        raise G3nError(f"shards '{shards}' hold {volumes} training volumes; latent statistics need at least 2")
    header = {
        "kind": "latent",
        "recipe": {"latents": "z P, float16", "statistics": "train", "device": where.type},
        "grid": index.raw["grid"],
        "variables": dict(index.variables),
        "tokenizer": {"fingerprint": space.tokenizer_fingerprint},
        "volumes": index.fingerprint,
    }
    plan = fingerprint_of([INDEX_VERSION, header])
    if start(output, plan):
        return
    splits = _write_shards(index, space, output, where, batch)
    _write_statistics(header, splits, output)
    write_index(output, header, splits, plan)


def _write_shards(
    index: ShardIndex, space: LatentSpace, output: Path, device: torch.device, batch: int
) -> dict[str, list[dict[str, Any]]]:
    """The index entries of all splits."""
    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in index.splits}
    with progress_bar() as bar, ThreadPoolExecutor(_READERS) as pool:
        total = sum(len(shard.samples) for members in index.splits.values() for shard in members)
        task = bar.add_task("encode", total=total)
        for split, members in index.splits.items():
            for shard in members:
                entry = finished_shard(output, shard.name)
                if entry is None:
                    samples = _latents(index, shard, space, device, batch, pool, lambda n: bar.advance(task, n))
                    entry = write_shard(output, shard.name, map(encode_sample, samples))
                else:
                    bar.advance(task, len(shard.samples))
                splits[split].append(entry)
    return splits


def _latents(
    index: ShardIndex,
    shard: Shard,
    space: LatentSpace,
    device: torch.device,
    batch: int,
    pool: ThreadPoolExecutor,
    advance: Callable[[int], None],
) -> list[PackedSample]:
    """A shard's samples, one a (subject, modality); of several runs of a visit the first."""
    shard = replace(shard, samples=tuple(s for s in shard.samples if "_run-" not in s.key))  # one image a visit
    tokens: list[np.ndarray] = []
    facts: list[Volume] = []
    for volumes in _read_ahead(index, shard, batch, pool):
        voxels = torch.from_numpy(np.stack([v.voxels for v in volumes])).to(device)
        mean = torch.tensor([v.brain_mean for v in volumes], device=device)
        rstd = torch.tensor([1 / v.brain_std for v in volumes], device=device)
        tokens += list(space.project(voxels, mean, rstd).cpu().numpy())
        facts += [replace(v, voxels=np.empty(0, np.int16)) for v in volumes]
        advance(len(volumes))
    groups: dict[tuple[str, str], list[int]] = {}
    for i in sorted(range(len(tokens)), key=lambda i: _session(shard.samples[i])):
        groups.setdefault((shard.samples[i].subject, shard.samples[i].modality), []).append(i)
    return [
        _packed(*group, np.stack([tokens[i] for i in members]), [facts[i] for i in members])
        for group, members in sorted(groups.items())
    ]


def _read_ahead(index: ShardIndex, shard: Shard, batch: int, pool: ThreadPoolExecutor) -> Iterator[list[Volume]]:
    """Batches of a shard's volumes; the next one is read while the caller works on this one."""

    def read(sample: Sample) -> Volume:
        try:
            return read_volume_sample(index, shard, sample)
        except Damage as error:
            raise G3nError(f"cannot encode: {error}; pack again") from error

    coming: list[Future[Volume]] = []
    for first in range(0, len(shard.samples), batch):
        current, coming = coming, [pool.submit(read, sample) for sample in shard.samples[first : first + batch]]
        if current:
            yield [future.result() for future in current]
    if coming:
        yield [future.result() for future in coming]


def _session(sample: Sample) -> int:
    match = _SESSION.search(sample.key)
    if match is None:
        raise G3nError(
            f"sample '{sample.key}' has no visit number; expected sub-<hash>_ses-<nn>_<modality>, pack again"
        )
    return int(match[1])


def _packed(subject: str, modality: str, tokens_VNC: np.ndarray, visits: list[Volume]) -> PackedSample:
    largest = np.abs(tokens_VNC).max()
    if not largest < _LARGEST_FLOAT16:  # NaN included
        raise G3nError(
            f"latents of subject {subject} {modality} reach {largest:g}, too large for float16; train the tokenizer again"
        )
    meta = {"visits": [{"days_from_baseline": v.days_from_baseline, "variables": v.variables} for v in visits]}
    return PackedSample(
        f"sub-{subject}_{modality}", subject, modality, len(visits), tokens_VNC.astype(np.float16), meta
    )


def _write_statistics(header: Mapping[str, Any], splits: Mapping[str, list[dict[str, Any]]], output: Path) -> None:
    """Mean [N, C] of each token position and scale [C] of each channel around it, over every visit of the train split.

    They are of the latents as written, read back as the stream will: an index that could not be read is not published.
    """
    index = parse_index(str(output), {"format": FORMAT, **header, "fingerprint": "0", "splits": splits})
    n, total, squares = 0, np.zeros(()), np.zeros(())
    for shard in index.shards("train"):
        for sample in shard.samples:
            try:
                tokens_VNC = read_latent_sample(index, shard, sample).tokens.astype(np.float64)
            except Damage as error:
                raise G3nError(f"cannot read back {error}; remove '{output}' and encode again") from error
            n += len(tokens_VNC)
            total = total + tokens_VNC.sum(axis=0)
            squares = squares + (tokens_VNC**2).sum(axis=0)
    mean_NC = total / n
    variance_C = (squares / n - mean_NC**2).mean(axis=0)
    scale_C = np.maximum(np.sqrt(np.maximum(variance_C, 0)), _SMALLEST_SCALE)
    content = save({"mean": torch.from_numpy(mean_NC).float(), "scale": torch.from_numpy(scale_C).float()})
    part = output / ".statistics.safetensors.part"
    part.write_bytes(content)
    os.replace(part, output / "statistics.safetensors")
