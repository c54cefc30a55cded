"""Do generated volumes come from the distribution of real ones? Distances in the frozen encoder's features."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from g3n.config import G3nError
from g3n.evaluate.distributions import (
    DRAWS,
    NEIGHBORS,
    all_distances,
    largest_half,
    made_to_real,
    pair_similarity,
    pairs_of_strangers,
    real_to_real,
    size_bias,
)
from g3n.evaluate.intervals import mean
from g3n.evaluate.report import print_intervals, write_json
from g3n.flow import Sampler
from g3n.generate import Generator, open_latents, sample
from g3n.latent import LatentSpace
from g3n.meters import progress_bar
from g3n.stream.index import ShardIndex
from g3n.stream.lanes import eval_batches
from g3n.stream.samples import subject_of

SPACES = ("mean_token", "latent")
COMPONENTS = 64  # at most, of the PCA of latents
TRAIN = 1000  # training latents it is fitted on, at most
PAIRS = 32  # of volumes, at most, for the diversity


@dataclass(frozen=True)
class _Real:
    """Latents of a split, float32 [n, N, C] standardized, with the variables and the subject of each."""

    latents: Tensor
    variables: list[dict[str, Any]]
    subjects: list[str]


def _read(index: ShardIndex, split: str, most: int, batch: int, space: LatentSpace) -> _Real:
    """The first ``most`` visits of a split in its fixed shuffled order."""
    latents, variables, subjects = [], [], []
    for b in eval_batches(index, None, "latent", split, batch, rank=0, world=1, seed=0):
        real = [i for i in range(len(b)) if b.weights[i] > 0]
        latents.append(space.standardize(b.tensors["latent"][real].to(space.mean.device)).cpu())
        variables += [b.variables[i] for i in real]
        subjects += [subject_of(b.keys[i]) for i in real]
        if len(subjects) >= most:
            break
    if not subjects:
        raise G3nError(f"latents '{index.url}' have no samples in split '{split}'; give another --split")
    return _Real(torch.cat(latents)[:most], variables[:most], subjects[:most])


def _decoded(latents_MNC: Tensor, space: LatentSpace, batch: int) -> Iterator[Tensor]:
    for chunk in latents_MNC.split(batch):
        yield from space.decode(chunk.to(space.mean.device))


def _seen(
    space: LatentSpace,
    volumes: Iterable[Tensor | np.ndarray],
    pairs: Sequence[tuple[int, int]],
    batch: int,
    advance: Callable[[int], None],
) -> tuple[dict[str, np.ndarray], list[float]]:
    """Features [n, ...] of z-scored volumes [X, Y, Z] in each of ``SPACES``, and the MS-SSIM of the pairs."""
    features: dict[str, list[Tensor]] = {name: [] for name in SPACES}
    wanted = {i for pair in pairs for i in pair}
    kept: dict[int, Tensor] = {}
    device, done, coming = space.mean.device, 0, iter(volumes)
    while chunk := [torch.as_tensor(v) for v in islice(coming, batch)]:
        kept |= {done + i: volume.cpu() for i, volume in enumerate(chunk) if done + i in wanted}
        volume = torch.stack(chunk).to(device)
        as_it_is = torch.zeros(len(chunk), device=device), torch.ones(len(chunk), device=device)
        tokens_BND = space.features(volume, *as_it_is)
        latent_BNC = space.standardize(space.tokenizer.projection(tokens_BND))
        features["mean_token"].append(tokens_BND.mean(1).cpu())
        features["latent"].append(latent_BNC.flatten(1).cpu())
        done += len(chunk)
        advance(len(chunk))
    stacked = {name: torch.cat(parts).numpy() for name, parts in features.items()}
    return stacked, pair_similarity([(kept[i].to(device), kept[j].to(device)) for i, j in pairs])


def _centered(real_ND: np.ndarray, made_MD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both minus the real mean, over one number that makes the real variance 1 on average: the kernel is not free of units."""
    center = real_ND.mean(0, dtype=np.float64)
    scale = float(np.sqrt(real_ND.var(0, dtype=np.float64).mean())) or 1.0
    return (real_ND - center) / scale, (made_MD - center) / scale


@torch.no_grad()
def evaluate_distances(
    generator: Generator,
    latents: str,
    output: Path,
    count: int = 256,
    split: str = "val",
    seed: int = 0,
    steps: int = 25,
    guidance: float = 1.0,
    sampler: Sampler = "heun",
    batch: int = 8,
) -> dict[str, Any]:
    """Write ``metrics.json`` to ``output`` and return it: generated to real, and beside it real to real at the same n.

    The real ones are up to ``count`` visits of ``split``, decoded from their latents: both went through the same decoder, so what
    is judged is the generator, not the tokenizer. Generated volume i has the variables of real volume i, in turn again
    where ``count`` is more than the split has. All are encoded again by the frozen encoder, as they are, without a new
    z-score. Spaces: ``mean_token``, the mean of the encoder's tokens; ``latent``, the flattened projected tokens on the first
    principal components of the train split's. Each space is shifted and scaled as one, by the real volumes.

    n is about half of the real ones: the floor needs two real halves of different people. Intervals are the middle 95 % of
    draws of halves, that of ``diversity`` (MS-SSIM of pairs of strangers in one modality) a bootstrap over pairs. Raises
    G3nError for latents of another tokenizer and for sets too small, before anything is generated.
    """
    index, space = open_latents(generator, latents), generator.space
    real = _read(index, split, count, batch, space)
    n = largest_half(real.subjects)
    if n <= NEIGHBORS:
        raise G3nError(
            f"{len(real.subjects)} volumes of {len(set(real.subjects))} subjects in split '{split}' give halves of {n}, "
            f"expected at least {NEIGHBORS + 1}; raise --count or give a --split with more subjects"
        )
    train = _read(index, "train", TRAIN, batch, space).latents.flatten(1).numpy()
    pca = PCA(min(COMPONENTS, len(train) - 1, train.shape[1]), random_state=0).fit(train)
    pairs = pairs_of_strangers(real.subjects, [str(v.get("modality")) for v in real.variables], PAIRS, seed)
    known = [{k: v[k] for k in generator.variables.names if k in v} for v in real.variables]
    conditions = [known[i % len(known)] for i in range(count)]
    made = sample(generator, conditions, range(seed, seed + count), steps, guidance, sampler, batch)
    with progress_bar() as progress:
        bar = progress.add_task("generate", total=count)
        made_seen, made_alike = _seen(space, made, pairs, batch, lambda k: progress.advance(bar, k))
        bar = progress.add_task(f"decode {split}", total=len(real.subjects))
        volumes = _decoded(real.latents, space, batch)
        real_seen, real_alike = _seen(space, volumes, pairs, batch, lambda k: progress.advance(bar, k))
        broken = [i for i in range(count) if not np.isfinite(made_seen["latent"][i]).all()]
        if broken:
            raise G3nError(
                f"{len(broken)} of {count} generated volumes are not finite, the first has seed {seed + broken[0]}; "
                f"the run '{generator.run.path}' has diverged, or lower --guidance"
            )
        made_seen["latent"], real_seen["latent"] = (pca.transform(s["latent"]) for s in (made_seen, real_seen))
        bar = progress.add_task("distances", total=3 * len(SPACES))
        spaces: dict[str, Any] = {}
        for name in SPACES:
            x, y = _centered(real_seen[name], made_seen[name])
            generated = made_to_real(x, real.subjects, y, n, all_distances, DRAWS, seed)
            progress.advance(bar)
            floor = real_to_real(x, real.subjects, n, all_distances, DRAWS, seed)
            progress.advance(bar)
            sizes = sorted({size for size in (n // 8, n // 4, n // 2, n) if size > 1})
            bias = size_bias(x, real.subjects, sizes, DRAWS, seed)
            progress.advance(bar)
            figures = {k: {"generated": generated[k], "real": floor[k]} for k in floor}
            spaces[name] = {"dimensions": x.shape[1], **figures, "size_bias": bias}
    spaces["latent"]["pca"] = {"train_latents": len(train), "variance_kept": float(pca.explained_variance_ratio_.sum())}
    alike = {"generated": made_alike, "real": real_alike}
    result = {
        "run": str(generator.run.path),
        "split": split,
        "generated": count,
        "real": len(real.subjects),
        "subjects": len(set(real.subjects)),
        "n": n,
        "draws": DRAWS,
        "neighbors": NEIGHBORS,
        "seed": seed,
        "steps": steps,
        "guidance": guidance,
        "sampler": sampler,
        **spaces,
        "diversity": {"pairs": len(pairs), **{k: mean(v) if v else None for k, v in alike.items()}},
    }
    write_json(output / "metrics.json", result)
    _print(result)
    return result


def _print(result: dict[str, Any]) -> None:
    columns = ("frechet", "kernel", "precision", "recall", "density", "coverage")
    lines = {f"{space.replace('_', ' ')}, {c}": result[space][c] for space in SPACES for c in columns}
    if result["diversity"]["pairs"]:
        lines["MS-SSIM of pairs"] = {key: result["diversity"][key] for key in ("generated", "real")}
    print_intervals(f"generated to real, and real to real, {result['split']} split", lines)
