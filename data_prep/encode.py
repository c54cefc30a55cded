"""From volume shards to latent shards: frozen projected tokens of each subject and modality, visits in time order."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from safetensors.torch import save

from data_prep.shards import PackedSample, write_index, write_split
from g3n.config import G3nError
from g3n.latent import LatentSpace
from g3n.stream.decode import Damage, Volume, read_volume_sample
from g3n.stream.index import Sample, Shard, ShardIndex, load_index


def encode(tokenizer: str, shards: str, output: Path, device: str | None, batch: int) -> None:
    """Write latent shards and ``statistics.safetensors`` to ``output``.

    tokenizer: a decoder run; shards: the volume shards it was trained on. Statistics (mean [N, C], scale [C]) are of the train
    split. Raises G3nError for foreign shards, damaged samples, or an output folder that already holds shards.
    """
    if (output / "index.json").exists():
        raise G3nError(f"'{output}' already holds shards; remove it or choose another --output")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    space = LatentSpace.open(tokenizer, device=where)
    index = load_index(shards)
    if index.kind != "volume" or index.fingerprint != space.volumes_fingerprint:
        raise G3nError(
            f"shards '{shards}' are {index.kind}s with fingerprint {index.fingerprint}, but tokenizer '{tokenizer}' was "
            f"trained on volumes {space.volumes_fingerprint}; use the same shards"
        )
    output.mkdir(parents=True, exist_ok=True)
    total = sum(len(shard.samples) for split in index.splits.values() for shard in split)
    statistics = _Statistics(*space.mean.shape)
    splits = {}
    with Progress() as progress:
        task = progress.add_task("encode", total=total)
        for split, members in index.splits.items():
            groups = _groups(index, members, space, where, batch, lambda n: progress.advance(task, n))
            splits[split] = write_split(output, split, _counted(groups, statistics if split == "train" else None))
    _write(output / "statistics.safetensors", save(statistics.result()))
    header = {
        "kind": "latent",
        "recipe": {"statistics": "train"},
        "grid": index.raw["grid"],
        "variables": dict(index.variables),
        "tokenizer": {"fingerprint": space.tokenizer_fingerprint},
        "volumes": index.fingerprint,
    }
    write_index(output, header, splits)


class _Statistics:
    """Running sums in float64."""

    def __init__(self, n_tokens: int, channels: int) -> None:
        self.n = 0
        self.total = np.zeros((n_tokens, channels))
        self.square = np.zeros((n_tokens, channels))

    def add(self, tokens_VNC: np.ndarray) -> None:
        x = tokens_VNC.astype(np.float64)
        self.n += len(x)
        self.total += x.sum(axis=0)
        self.square += (x**2).sum(axis=0)

    def result(self) -> dict[str, torch.Tensor]:
        if self.n < 2:
            raise G3nError(f"the train split holds {self.n} volumes; at least 2 are needed for latent statistics")
        mean = self.total / self.n
        variance_C = (self.square / self.n - mean**2).mean(axis=0)
        scale_C = np.sqrt(np.maximum(variance_C, 1e-12))
        return {"mean": torch.from_numpy(mean).float(), "scale": torch.from_numpy(scale_C).float()}


def _groups(
    index: ShardIndex, shards: tuple[Shard, ...], space: LatentSpace, device: torch.device, batch: int, advance: Any
) -> Iterator[list[PackedSample]]:
    for shard in shards:
        tokens: list[np.ndarray] = []
        volumes: list[Volume] = []
        for start in range(0, len(shard.samples), batch):
            read = [_read(index, shard, sample) for sample in shard.samples[start : start + batch]]
            x = torch.from_numpy(np.stack([v.voxels for v in read])).to(device)
            mean = torch.tensor([v.brain_mean for v in read], device=device)
            rstd = torch.tensor([1 / v.brain_std for v in read], device=device)
            tokens += list(space.project(x, mean, rstd).cpu().numpy())
            volumes += [Volume(np.empty(0, np.int16), *_facts(v)) for v in read]
            advance(len(read))
        yield _by_subject(shard.samples, tokens, volumes)


def _facts(v: Volume) -> tuple[Any, ...]:
    return v.brain_mean, v.brain_std, v.scale, v.days_from_baseline, v.variables


def _read(index: ShardIndex, shard: Shard, sample: Sample) -> Volume:
    try:
        return read_volume_sample(index, shard, sample)
    except Damage as error:
        raise G3nError(f"cannot encode: {error}; pack again") from error


def _by_subject(samples: tuple[Sample, ...], tokens: list[np.ndarray], volumes: list[Volume]) -> list[PackedSample]:
    """One sample a (subject, modality); keys sort by visit."""
    groups: dict[tuple[str, str], list[int]] = {}
    for i in sorted(range(len(samples)), key=lambda i: samples[i].key):
        groups.setdefault((samples[i].subject, samples[i].modality), []).append(i)
    packed = []
    for (subject, modality), members in groups.items():
        array = np.stack([tokens[i] for i in members])
        if not np.isfinite(array).all() or np.abs(array).max() > 60_000:
            raise G3nError(f"latents of subject {subject} {modality} do not fit float16; train the tokenizer again")
        array = array.astype(np.float16)
        visits = [
            {"days_from_baseline": volumes[i].days_from_baseline, "variables": volumes[i].variables} for i in members
        ]
        packed.append(
            PackedSample(f"sub-{subject}_{modality}", subject, modality, len(members), array, {"visits": visits})
        )
    return packed


def _counted(groups: Iterator[list[PackedSample]], statistics: _Statistics | None) -> Iterator[list[PackedSample]]:
    for group in groups:
        if statistics is not None:
            for sample in group:
                statistics.add(sample.array)
        yield group


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    os.replace(part, path)
