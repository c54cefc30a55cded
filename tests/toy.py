"""A latent space whose decoder draws ventricles and lesions of exactly the size a latent says, and latents of made-up people.

Channel 0, mean over the 2 tokens, is the ventricles' number of voxels / 128; channel 1 above 0.5 is a lesion; channel 2 above
0.5 makes CSF bright, as on T2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_prep.shards import PackedSample, write_index, write_split
from g3n.config import to_plain
from g3n.generate import Generator
from g3n.models.conditioning import Variable, VariableSet
from g3n.nifti import atlas_grid
from g3n.templates import ventricle_distance_mm

GRID = atlas_grid((40, 48, 40), 4.0)
VOXEL_ML = 0.064
SHAPE = (2, 4)  # N, C
TABLE = {
    "modality": Variable(levels=("T1", "T2")),
    "age_years": Variable(low=0, high=110),
    "sex": Variable(levels=("F", "M")),
    "diagnosis": Variable(levels=("HC", "AD", "glioma")),
    "elapsed_years": Variable(low=0, high=20),
}


class Space:
    """Stands for LatentSpace; raw and standardized latents are the same."""

    tokenizer_fingerprint = "70"
    mean = torch.zeros(SHAPE)

    def standardize(self, raw_BNC: Tensor) -> Tensor:
        return raw_BNC

    def decode(self, latent_BNC: Tensor) -> Tensor:
        return torch.stack([torch.from_numpy(draw(*z.mean(0)[:3].tolist())) for z in latent_BNC])


def draw(ventricle: float, lesion: float, bright: float) -> np.ndarray:
    """float32 [40, 48, 40]."""
    distance_mm = ventricle_distance_mm(GRID)
    volume = np.where(distance_mm < 29, 1.0, 0.0).astype(np.float32)
    if lesion > 0.5:
        at = np.indices(GRID.shape)
        ball = sum((a - c) ** 2 for a, c in zip(at, (28, 24, 26), strict=True)) <= 16
        volume[ball] = 1.5 if bright > 0.5 else 0.5
    volume.flat[np.argsort(distance_mm, axis=None)[: round(ventricle * 128)]] = 1.8 if bright > 0.5 else 0.2
    return volume


def generator(model: Any, start_noise: float = 1.0, table: dict[str, Variable] | None = None) -> Generator:
    """``model`` is called as a DiT: (x, t, cond[, source]) -> velocity."""
    return Generator(
        model, Space(), VariableSet(table or TABLE), GRID, SimpleNamespace(path="toy"), torch.device("cpu"), start_noise
    )  # type: ignore[arg-type]


def latent(ventricle_voxels: float, lesion: bool = False, t2: bool = False) -> np.ndarray:
    """float16 [N, C]."""
    z = np.zeros(SHAPE, np.float16)
    z[:, 0], z[:, 1], z[:, 2] = ventricle_voxels / 128, lesion, t2
    return z


def law(variables: Mapping[str, Any], a_year: float = 2.0, sexes: bool = True) -> np.ndarray:
    """float32 [C], what variables mean; unknown ones mean nothing. Ventricles have 256 voxels, ``a_year`` more for each year
    above 50, 32 more in men and 64 in AD; channel 3 is the sex."""
    age, sex, diagnosis = (variables.get(name) for name in ("age_years", "sex", "diagnosis"))
    voxels = 256 + a_year * (float(age) - 50 if age is not None else 0) + 64 * (diagnosis == "AD")
    z = np.zeros(4, np.float32)
    z[0] = (voxels + (32 * (sex == "M") if sexes else 0)) / 128
    z[1] = {None: 0, "glioma": 10}.get(diagnosis, -10)
    z[2] = {None: 0, "T2": 10}.get(variables.get("modality"), -10)
    z[3] = {"F": -10, "M": 10}.get(sex, 0) if sexes else 0
    return z


def obedient(a_year: float = 2.0, sexes: bool = True) -> Generator:
    """A generator of noise + ``law``; without ``sexes`` it does not listen to the sex."""

    def model(x_BNC: Tensor, t_B: Tensor, cond_BV: Tensor) -> Tensor:
        means = [law(known(row), a_year, sexes) for row in cond_BV.tolist()]
        return torch.from_numpy(np.stack(means))[:, None, :].expand_as(x_BNC)

    return generator(model)


def known(row: Sequence[float]) -> dict[str, Any]:
    """The variables of one row of VariableSet.encode."""
    pairs = zip(TABLE.items(), row, strict=True)
    return {name: v.levels[int(x)] if v.levels else x for (name, v), x in pairs if x == x}


def write_latents(
    folder: Path, splits: dict[str, Sequence[tuple[dict[str, Any], Sequence[tuple[float, float, np.ndarray]]]]]
) -> str:
    """Latent shards; a person is (variables, visits), a visit (days, age, latent). Returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    written, number = {}, 0
    for split, people in splits.items():
        samples = []
        for variables, visits in people:
            number += 1
            meta = [{"days_from_baseline": d, "variables": {**variables, "age_years": age}} for d, age, _ in visits]
            name, modality = f"{number:016x}", variables["modality"]
            samples.append(
                PackedSample(
                    f"sub-{name}_{modality}",
                    name,
                    modality,
                    len(visits),
                    np.stack([z for *_, z in visits]),
                    {"visits": meta},
                )
            )
        written[split] = write_split(folder, split, [samples])
    header = {"kind": "latent", "recipe": {}, "grid": to_plain(GRID), "tokenizer": {"fingerprint": "70"}}
    write_index(folder, {**header, "volumes": "1", "variables": {"modality": ["T1", "T2"]}}, written)
    return str(folder)
