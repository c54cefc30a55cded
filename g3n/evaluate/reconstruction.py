"""What the tokenizer keeps: volumes through encoder, 32 channels a token, and decoder, against themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from g3n.config import G3nError
from g3n.evaluate import metrics
from g3n.evaluate.montage import write_montage
from g3n.evaluate.report import intervals, intervals_by, means, means_by, print_intervals, write_csv, write_json
from g3n.latent import normalize, open_reconstruction, pick_device
from g3n.meters import progress_bar
from g3n.stream.index import ShardIndex, load_index
from g3n.stream.lanes import eval_batches

COLUMNS = ("psnr_db", "psnr_gain_db", "ssim", "ms_ssim", "mae", "high_frequency_error", "dice")
SHOWN = 4


def mean_volume(index: ShardIndex, batch: int, progress: Progress, device: torch.device) -> Tensor:
    """The mean z-scored volume of the train split, float32 [X, Y, Z]: what a decoder that knows nothing should draw."""
    total, count = torch.zeros(index.grid.shape, dtype=torch.float64, device=device), 0
    n = sum(len(shard.samples) for shard in index.shards("train"))
    bar = progress.add_task("mean of the train split", total=n)
    for b in eval_batches(index, None, "volume", "train", batch, rank=0, world=1, seed=0):
        b = b.to(device)
        volume = normalize(*(b.tensors[k] for k in ("volume", "mean", "rstd")))
        total += (volume * b.weights[:, None, None, None]).sum(0, dtype=torch.float64)
        count += int(b.weights.sum())
        progress.advance(bar, len(b))
    return (total / max(1, count)).float()


@torch.no_grad()
def evaluate_reconstruction(
    run: str, shards: str, output: Path, split: str = "val", batch: int = 8, device: str | None = None
) -> dict[str, Any]:
    """Write ``metrics.json``, ``volumes.csv`` and ``reconstruction.png`` to ``output`` and return the metrics.

    PSNR and MAE count each target's brain voxels (z-scores), SSIM the whole volume; ``psnr_gain_db`` is PSNR above that of
    the train split's mean volume, averaged over volumes. ``intervals`` beside the means are of a bootstrap over subjects.
    Raises G3nError for shards other than the run's.
    """
    where = pick_device(device)
    space = open_reconstruction(run, where)
    index = load_index(shards)
    if index.kind != "volume" or index.fingerprint not in space.volumes:
        raise G3nError(
            f"shards '{shards}' are {index.kind}s {index.fingerprint}, but '{run}' was trained on volumes "
            f"{space.volumes_fingerprint}; give the shards it was trained on"
        )
    rows: list[dict[str, Any]] = []
    pictures: dict[str, tuple[Tensor, Tensor]] = {}
    with progress_bar() as progress:
        mean = mean_volume(index, batch, progress, where)
        bar = progress.add_task(f"reconstruct {split}", total=sum(len(s.samples) for s in index.shards(split)))
        for b in eval_batches(index, None, "volume", split, batch, rank=0, world=1, seed=0):
            b = b.to(where)
            volume = tuple(b.tensors[k] for k in ("volume", "mean", "rstd"))
            target, made = normalize(*volume), space.decode(space.encode(*volume))
            psnr = metrics.psnr_db(made, target)
            figures = {
                "psnr_db": psnr,
                "psnr_gain_db": psnr - metrics.psnr_db(mean.expand_as(target), target),
                "ssim": metrics.ssim(made, target),
                "ms_ssim": metrics.ms_ssim(made, target),
                "mae": metrics.brain_mae(made, target),
                "high_frequency_error": metrics.high_frequency_error(made, target),
                "dice": metrics.brain_dice(made, target),
            }
            for i in range(len(b)):
                if b.weights[i] == 0:
                    continue
                about = {k: b.variables[i].get(k) for k in ("modality", "cohort", "diagnosis")}
                rows.append({"key": b.keys[i], **about, **{k: float(v[i]) for k, v in figures.items()}})
                pictures.setdefault(str(about["modality"]), (target[i].cpu(), made[i].cpu()))
            progress.advance(bar, int((b.weights > 0).sum()))
    if not rows:
        raise G3nError(f"shards '{shards}' have no volumes in split '{split}'")
    overall = intervals(rows, COLUMNS)
    groups = {name: intervals_by(rows, name, COLUMNS) for name in ("modality", "cohort")}
    result = {
        "run": str(run),
        "split": split,
        "volumes": len(rows),
        "subjects": overall["psnr_db"].subjects,
        **means(rows, COLUMNS),
        "by_modality": means_by(rows, "modality", COLUMNS),
        "by_cohort": means_by(rows, "cohort", COLUMNS),
        "intervals": {"all": overall, "by_modality": groups["modality"], "by_cohort": groups["cohort"]},
        "ms_ssim_scales": metrics.ms_ssim_scales(index.grid.shape),
        "high_frequency_above_per_mm": metrics.HIGH_FREQUENCY / (2 * max(index.grid.spacing_mm)),
    }
    write_csv(output / "volumes.csv", rows)
    columns = []
    for modality, (target_XYZ, made_XYZ) in sorted(pictures.items())[:SHOWN]:
        columns += [(f"{modality}", target_XYZ.numpy()), ("reconstructed", made_XYZ.numpy())]
    write_montage(output / "reconstruction.png", columns)
    write_json(output / "metrics.json", result)
    lines = {f"{name} {value}": row for name, group in groups.items() for value, row in group.items()}
    print_intervals(f"reconstruction of {len(rows)} {split} volumes", {**lines, "all": overall})
    return result
