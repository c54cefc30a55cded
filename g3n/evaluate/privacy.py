"""Does a generator give its training scans away? Nearest neighbors, copies and membership, before weights are passed on.

Every distance is taken three times: between standardized latents, between decoded volumes at a lower resolution, and
between mean tokens of the frozen encoder. Real scans go through the tokenizer like generated ones, so that both are judged
alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy.stats import binomtest
from torch import Tensor
from torch.nn import functional as F

from g3n.config import G3nError, build
from g3n.evaluate.intervals import Interval, bootstrap
from g3n.evaluate.membership import attack_auc, flow_losses
from g3n.evaluate.montage import write_montage
from g3n.evaluate.neighbors import Matches, Neighbors, best_matches, nearest
from g3n.evaluate.report import claim, print_means, write_csv, write_json
from g3n.flow import Sampler, Velocity
from g3n.generate import Generator, sample_latents
from g3n.meters import progress_bar
from g3n.models.pretrained import fingerprint
from g3n.stream.index import ShardIndex
from g3n.stream.lanes import StreamConfig, eval_batches
from g3n.stream.samples import subject_of
from g3n.stream.sources import open_shards

FORMAT = "g3n-audit-1"
PERCENTILE = 5.0  # of the distances between real subjects; what lies under it counts as too close
COPY = 0.9  # correlation, of what differs from the mean volume, from which on a pair counts as a copy
LARGEST_AXIS = 48  # volumes are averaged down to at most this many voxels an axis
LOSSES = 1000  # volumes on each side of the attack by loss
BLOCK = 64  # generated volumes a file
SHOWN = 4  # closest pairs in the picture
SPACES = ("latent", "voxel", "feature")


@dataclass(frozen=True)
class Scans:
    """Real visits of a split, R rows: standardized latents float32 [R, N, C] on the CPU, and whose they are."""

    latents_RNC: Tensor
    subjects: list[str]  # hashed
    variables: list[dict[str, Any]]
    seeds: list[int]  # of (seed, key)
    member: list[bool]  # of the train split


@dataclass(frozen=True)
class Views:
    """What a set of latents looks like once decoded: volumes float16 [B, X, Y, Z] at low resolution, mean tokens float32 [B, D]."""

    voxel: Tensor
    feature: Tensor


def open_training_latents(generator: Generator, latents: Sequence[str]) -> ShardIndex:
    """The latents the generator was trained on: a folder, or the folders of its mix in the config's order.

    Raises G3nError for any others.
    """
    data = generator.run.config["data"]
    if isinstance(data["shards"], Mapping) and len(data["shards"]) == len(latents):
        shards: Any = dict(zip(latents, data["shards"].values(), strict=True))
    else:
        shards = latents[0] if len(latents) == 1 else dict.fromkeys(latents, 1.0)
    index = open_shards(build(StreamConfig, {**data, "shards": shards}, "data"))
    if index.kind != "latent" or index.fingerprint != generator.run.artifact["latents"]:
        raise G3nError(
            f"'{index.url}' are {index.kind}s {index.fingerprint}, but '{generator.run.path}' was trained on latents "
            f"{generator.run.artifact['latents']}; give those (each folder of a mix by its own --latents)"
        )
    return index


@torch.no_grad()
def read_scans(generator: Generator, index: ShardIndex, batch: int, progress: Progress) -> Scans:
    """Every visit of the train, val and test splits. Raises G3nError where fewer than two subjects were trained on."""
    splits = [split for split in ("train", "val", "test") if split in index.splits]
    bar = progress.add_task(
        "read scans", total=sum(s.visits for k in splits for f in index.shards(k) for s in f.samples)
    )
    latents, scans = [], Scans(torch.empty(0), [], [], [], [])
    for split in splits:
        for b in eval_batches(index, None, "latent", split, batch, rank=0, world=1, seed=0):
            kept = [i for i in range(len(b)) if b.weights[i] > 0]
            standardized = generator.space.standardize(b.tensors["latent"].to(generator.device)).cpu()
            latents.append(standardized[kept])
            for i in kept:
                scans.subjects.append(subject_of(b.keys[i]).removeprefix("sub-"))
                scans.variables.append({k: v for k, v in b.variables[i].items() if k in generator.variables.names})
                scans.seeds.append(int(b.seeds[i]))
                scans.member.append(split == "train")
            progress.advance(bar, len(kept))
    subjects = {s for s, member in zip(scans.subjects, scans.member, strict=True) if member}
    if len(subjects) < 2:
        raise G3nError(f"'{index.url}' have {len(subjects)} training subjects; distances between people need two")
    return Scans(torch.cat(latents), scans.subjects, scans.variables, scans.seeds, scans.member)


def draw_conditions(variables: Sequence[Mapping[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """The variables of ``count`` visits, drawn with replacement; entry i depends on (seed, i) alone."""
    return [dict(variables[int(np.random.default_rng([seed, i]).integers(len(variables)))]) for i in range(count)]


def generate(
    generator: Generator,
    conditions: Sequence[Mapping[str, Any]],
    folder: Path,
    seed: int,
    steps: int,
    guidance: float,
    sampler: Sampler,
    batch: int,
    progress: Progress,
) -> Tensor:
    """Standardized latents float32 [G, N, C]; volume i has seed + i. Files of ``BLOCK`` that lie in ``folder`` are taken from there."""
    folder.mkdir(parents=True, exist_ok=True)
    bar = progress.add_task("sample", total=len(conditions))
    blocks = []
    for first in range(0, len(conditions), BLOCK):
        file = folder / f"block-{first // BLOCK:05d}.safetensors"
        chosen = conditions[first : first + BLOCK]
        try:
            block = load_file(file)["latents"] if file.is_file() else None
        except (OSError, SafetensorError, KeyError):
            block = None
        if block is None:
            seeds = [seed + first + i for i in range(len(chosen))]
            parts = sample_latents(generator, chosen, seeds, steps, guidance, sampler, batch)
            made = []
            for part in parts:
                made.append(part.cpu())
                progress.advance(bar, len(part))
            block = torch.cat(made)
            part_file = file.with_name(f".{file.name}.part")
            save_file({"latents": block}, part_file)
            part_file.replace(file)
        else:
            progress.advance(bar, len(block))
        blocks.append(block)
    return torch.cat(blocks)


@torch.no_grad()
def look(generator: Generator, latents_BNC: Tensor, batch: int, progress: Progress, name: str) -> Views:
    """Decode latents [B, N, C] of the CPU; see ``Views``."""
    space, factor = generator.space, math.ceil(max(generator.grid.shape) / LARGEST_AXIS)
    bar = progress.add_task(name, total=len(latents_BNC))
    voxels, features = [], []
    for part in latents_BNC.split(batch):
        volume = space.decode(part.to(generator.device))
        brain = volume != 0
        n = brain.sum(dim=(1, 2, 3)).clamp(min=2)
        mean = volume.sum(dim=(1, 2, 3)) / n
        std = (((volume - mean.view(-1, 1, 1, 1)) * brain).square().sum(dim=(1, 2, 3)) / n).sqrt().clamp(min=1e-6)
        features.append(space.features(volume, mean, 1 / std).mean(1).cpu())
        voxels.append(F.avg_pool3d(volume[:, None], factor)[:, 0].half().cpu())
        progress.advance(bar, len(part))
    return Views(torch.cat(voxels), torch.cat(features))


def too_close(
    generated: Neighbors, real: Neighbors, subjects: Sequence[str], held_out: Neighbors | None = None
) -> dict[str, Any]:
    """How many generated volumes lie under the 5th percentile of the real-to-real distances (the rule of arXiv 2606.19651).

    ``real`` has for each scan the nearest scan of another subject. The percentile's interval is over subjects, the share's
    is Wilson's (1927). 5 % is what scans of new people should give; ``held_out``, of people nobody trained on, says what they do.
    """
    percentile = bootstrap(lambda d: float(np.percentile(d, PERCENTILE)), real.distance, subjects=subjects)
    found = {
        "percentile": PERCENTILE,
        "threshold": asdict(percentile),
        **_under(generated, percentile.value),
        "generated_to_real": _spread(generated.distance),
        "real_to_real": _spread(real.distance),
    }
    if held_out is not None:
        found["held_out"] = {**_under(held_out, percentile.value), "to_real": _spread(held_out.distance)}
    return found


def _under(near: Neighbors, threshold: float) -> dict[str, float]:
    count = int((near.distance < threshold).sum())
    return {"under": count, **_share(count, len(near.distance))}


def _share(count: int, of: int) -> dict[str, float]:
    interval = binomtest(count, of).proportion_ci(method="wilson")
    return {"of": of, "share": count / of, "share_low": float(interval.low), "share_high": float(interval.high)}


def _spread(distance: np.ndarray) -> dict[str, float]:
    return {"min": float(distance.min()), "median": float(np.median(distance)), "max": float(distance.max())}


def _codes(subjects: Sequence[str]) -> Tensor:
    return torch.from_numpy(np.unique(np.asarray(subjects), return_inverse=True)[1])


def _matched(matches: Matches) -> dict[str, Any]:
    count = int((matches.correlation >= COPY).sum())
    return {"count": count, **_share(count, len(matches.correlation)), "max": float(matches.correlation.max())}


def copies(
    generated: Tensor,
    real: Tensor,
    modalities: Sequence[str],
    subjects: Sequence[str],
    seed: int,
    device: torch.device,
    progress: Progress,
) -> tuple[Matches, dict[str, Any]]:
    """Generated volumes [G, X, Y, Z] that repeat a real one [R, X, Y, Z] under left-right flips and small shifts.

    As a measure of the measure, as many real volumes are held against those of other subjects.
    """
    codes = _codes(subjects)
    bar = progress.add_task("copies", total=len(generated) * len(real))
    found = best_matches(generated, real, modalities, device=device, advance=partial(progress.advance, bar))
    drawn = torch.from_numpy(np.random.default_rng(seed).permutation(len(real))[: len(generated)])
    bar2 = progress.add_task("copies among scans", total=len(drawn) * len(real))
    between = best_matches(
        real[drawn], real, modalities, (codes[drawn], codes), device=device, advance=partial(progress.advance, bar2)
    )
    about = {"correlation": COPY, "generated": _matched(found), "real_of_other_subjects": _matched(between)}
    return found, about


def membership(
    generator: Generator, scans: Scans, generated_GNC: Tensor, seed: int, batch: int, progress: Progress
) -> Any:
    """AUC of both attacks on train against val and test; None where nobody was held out."""
    if all(scans.member):
        return None
    bar = progress.add_task("membership by distance", total=len(scans.member) * len(generated_GNC))
    distance = nearest(
        scans.latents_RNC.flatten(1), generated_GNC.flatten(1), device=generator.device, advance=partial(progress.advance, bar)
    ).distance  # fmt: skip
    by_distance = attack_auc(-distance, scans.member, scans.subjects)
    rows = loss_rows(scans, seed)
    bar = progress.add_task("membership by loss", total=len(rows))

    def velocity(cond_BV: Tensor) -> Velocity:
        def call(x_BNC: Tensor, t_B: Tensor) -> Tensor:
            with torch.autocast(x_BNC.device.type, torch.bfloat16, enabled=x_BNC.is_cuda):
                return generator.model(x_BNC, t_B, cond_BV)

        return call

    losses = []
    for first in range(0, len(rows), batch):
        part = rows[first : first + batch]
        cond_BV = generator.variables.encode([scans.variables[i] for i in part]).to(generator.device)
        latents = scans.latents_RNC[part].to(generator.device)
        losses.append(flow_losses(velocity, latents, cond_BV, [scans.seeds[i] for i in part]))
        progress.advance(bar, len(part))
    member, subjects = [scans.member[i] for i in rows], [scans.subjects[i] for i in rows]
    by_loss = attack_auc(-np.concatenate(losses), member, subjects)
    return {"auc_by_distance": asdict(by_distance), "auc_by_loss": asdict(by_loss)}


def loss_rows(scans: Scans, seed: int) -> list[int]:
    """Up to ``LOSSES`` volumes of either side, drawn by ``seed``."""
    order = np.random.default_rng(seed).permutation(len(scans.member))
    sides = [[int(i) for i in order if scans.member[i] == side][:LOSSES] for side in (True, False)]
    return sorted(sides[0] + sides[1])


def verdict(result: Mapping[str, Any]) -> str:
    """One sentence for a model card."""
    close = result["nearest"]["latent"]
    spaces = {space: result["nearest"][space] for space in SPACES}
    nearer = [space for space in SPACES if spaces[space]["share_low"] > PERCENTILE / 100]
    said = (
        f"Of {close['of']} volumes generated under the training set's variables, {close['under']} "
        f"({close['share']:.1%}, 95 % interval {close['share_low']:.1%} to {close['share_high']:.1%}) lie nearer to a training "
        f"scan than the nearest {PERCENTILE:g} % of training scans lie to one of another person"
    )
    said += (
        f" (too many in {', '.join(nearer)} space)"
        if nearer
        else f" (not shown to be more than the {PERCENTILE:g} % expected of new people, in any space)"
    )
    found = result["copies"]["generated"]
    said += f"; {found['count']} repeat a training scan (correlation {COPY:g} or more under flips and small shifts)"
    attacks = result["membership"]
    if attacks is None:
        return f"{said}; membership could not be tested, because nobody was held out."
    told = [_told(name, Interval(**attacks[f"auc_by_{name}"])) for name in ("distance", "loss")]
    return f"{said}; who was trained on can be told with an AUC of {' and '.join(told)} (0.5 is chance)."


def _told(name: str, auc: Interval) -> str:
    return f"{auc.value:.2f} by {name} [{auc.low:.2f}, {auc.high:.2f}]"


def audit(
    generator: Generator,
    latents: Sequence[str],
    output: Path,
    count: int = 256,
    seed: int = 0,
    steps: int = 25,
    guidance: float = 2.0,
    sampler: Sampler = "heun",
    batch: int = 8,
) -> dict[str, Any]:
    """Write ``audit.json``, ``volumes.csv`` (one row a generated volume), ``closest.png`` and ``generated/`` to ``output``.

    Returns what audit.json says. Subjects appear by their hash alone. The picture shows training scans: it is not for
    publication. A call with the same arguments goes on after the last finished block of generated volumes. Raises G3nError
    for latents other than the generator's, or an output folder of another audit.
    """
    if count < 2:
        raise G3nError(f"--count {count} is too few to audit; give 2 or more, better hundreds")
    index = open_training_latents(generator, latents)
    recipe = {
        "format": FORMAT,
        "generator": fingerprint(generator.run.weights),
        "tokenizer": generator.space.tokenizer_fingerprint,
        "latents": index.fingerprint,
        "step": generator.run.step,
        "count": count,
        "seed": seed,
        "steps": steps,
        "guidance": guidance,
        "sampler": sampler,
    }
    claim(output, recipe)
    device = generator.device
    with progress_bar() as progress:
        scans = read_scans(generator, index, batch, progress)
        train = [i for i, member in enumerate(scans.member) if member]
        real_RNC = scans.latents_RNC[train]
        subjects, variables = [scans.subjects[i] for i in train], [scans.variables[i] for i in train]
        conditions = draw_conditions(variables, count, seed)
        made_GNC = generate(
            generator, conditions, output / "generated", seed, steps, guidance, sampler, batch, progress
        )
        new_HNC = scans.latents_RNC[[i for i, member in enumerate(scans.member) if not member]]
        made, real = (
            look(generator, z, batch, progress, f"decode {n}")
            for z, n in ((made_GNC, "generated"), (real_RNC, "scans"))
        )
        new = look(generator, new_HNC, batch, progress, "decode held-out scans") if len(new_HNC) else None
        views = {
            "latent": (made_GNC, real_RNC, new_HNC),
            "voxel": (made.voxel, real.voxel, new.voxel if new else None),
            "feature": (made.feature, real.feature, new.feature if new else None),
        }
        codes = _codes(subjects)
        near: dict[str, tuple[Neighbors, Neighbors, Neighbors | None]] = {}
        for space, (generated, scanned, unseen) in views.items():
            bar = progress.add_task(f"nearest in {space} space", total=(count + len(scans.member)) * len(train))
            advance = partial(progress.advance, bar)
            a, b = generated.flatten(1), scanned.flatten(1)
            near[space] = (
                nearest(a, b, device=device, advance=advance),
                nearest(b, b, (codes, codes), device=device, advance=advance),
                nearest(unseen.flatten(1), b, device=device, advance=advance) if new and unseen is not None else None,
            )
        modalities = [str(v.get("modality")) for v in variables]
        matches, copied = copies(made.voxel, real.voxel, modalities, subjects, seed, device, progress)
        attacks = membership(generator, scans, made_GNC, seed, batch, progress)
    result = {
        **recipe,
        "training": {"volumes": len(train), "subjects": len(set(subjects))},
        "held_out": {
            "volumes": len(scans.member) - len(train),
            "subjects": len({s for s, m in zip(scans.subjects, scans.member, strict=True) if not m}),
        },
        "voxel_shape": list(made.voxel.shape[1:]),
        "nearest": {space: too_close(*near[space][:2], subjects, near[space][2]) for space in SPACES},
        "copies": copied,
        "membership": attacks,
    }
    result["verdict"] = verdict(result)
    rows = [
        {
            "seed": seed + i,
            **{f"{space}_distance": float(near[space][0].distance[i]) for space in SPACES},
            "nearest_subject": subjects[int(near["latent"][0].index[i])],
            "correlation": float(matches.correlation[i]),
            "correlated_subject": subjects[int(matches.index[i])],
            "flipped": bool(matches.flipped[i]),
            "shift_voxels": " ".join(map(str, matches.shift[i])),
        }
        for i in range(count)
    ]
    write_csv(output / "volumes.csv", rows)
    _picture(generator, made_GNC, real_RNC, near["latent"][0], output / "closest.png")
    write_json(output / "audit.json", result)
    table = {
        space: {"n": count, **{k: result["nearest"][space][k] for k in ("share", "share_low", "share_high")}}
        for space in SPACES
    }
    print_means(f"generated volumes nearer than the {PERCENTILE:g}th percentile between subjects", table)
    return result


@torch.no_grad()
def _picture(generator: Generator, made_GNC: Tensor, real_RNC: Tensor, near: Neighbors, path: Path) -> None:
    """The closest pairs, generated beside real."""
    columns = []
    for i in np.argsort(near.distance, kind="stable")[:SHOWN]:
        pair = torch.stack([made_GNC[int(i)], real_RNC[int(near.index[i])]]).to(generator.device)
        generated, scan = generator.space.decode(pair).cpu().numpy()
        columns += [(f"generated {i}", generated), (f"nearest scan, {near.distance[i]:.3g}", scan)]
    write_montage(path, columns, "closest pairs, distance between standardized latents")
