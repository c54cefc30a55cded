"""Probes: small predictors of clinical variables from mean-pooled latents, trained on people who exist.

Linear, on the mean over tokens of standardized latents, by scikit-learn (Alain 2016, arXiv 1610.01644, has the idea).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.progress import Progress
from torch import Tensor

from g3n.config import G3nError
from g3n.evaluate import intervals
from g3n.evaluate.effects import correlation
from g3n.generate import Generator
from g3n.stream.index import ShardIndex
from g3n.stream.lanes import eval_batches
from g3n.stream.samples import subject_of

CLASSES = ("modality", "sex", "diagnosis")
NUMBERS = ("age_years",)
ALPHAS = (0.1, 1.0, 10.0, 100.0, 1e3)
_T1_ALIKE = {"T1c": "T1"}
Probe = Callable[[np.ndarray], np.ndarray]  # pooled latents [P, C] -> a level or number each


@dataclass(frozen=True)
class Pooled:
    """Latents of scans, mean over tokens float32 [P, C], with their variables and whose they are."""

    latent_PC: np.ndarray
    variables: tuple[Mapping[str, Any], ...]
    subjects: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.subjects)

    def pick(self, rows: Sequence[int]) -> Pooled:
        return Pooled(
            self.latent_PC[list(rows)], tuple(self.variables[i] for i in rows), tuple(self.subjects[i] for i in rows)
        )


def read_pooled(index: ShardIndex, generator: Generator, split: str, batch: int, progress: Progress) -> Pooled:
    """Every visit of a split. Raises G3nError where there is none."""
    rows: list[tuple[np.ndarray, Mapping[str, Any], str]] = []
    bar = progress.add_task(f"read {split} latents", total=None)
    for b in eval_batches(index, None, "latent", split, batch, rank=0, world=1, seed=0):
        pooled = pool(generator.space.standardize(b.tensors["latent"].to(generator.device)))
        used = [i for i in range(len(b)) if b.weights[i] > 0]
        rows += [(pooled[i], b.variables[i], subject_of(b.keys[i])) for i in used]
        progress.advance(bar, len(used))
    if not rows:
        raise G3nError(f"latents '{index.url}' have no scans in split '{split}'")
    return Pooled(np.stack([r[0] for r in rows]), tuple(r[1] for r in rows), tuple(r[2] for r in rows))


def pool(latent_BNC: Tensor) -> np.ndarray:
    """float32 [B, C]."""
    return latent_BNC.mean(dim=1).cpu().numpy()


def conditions_of(generator: Generator, variables: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The known variables that the run's table has."""
    table = generator.variables.table
    return [{k: v for k, v in row.items() if k in table and v is not None} for row in variables]


def known(data: Pooled, name: str) -> list[int]:
    """Rows whose variable is known."""
    return [i for i, v in enumerate(data.variables) if v.get(name) is not None]


def truth(data: Pooled, name: str) -> np.ndarray:
    """A variable's levels [P] (text) or values [P] (float64) of rows where it is known."""
    values = [data.variables[i][name] for i in known(data, name)]
    return np.array(values, np.float64) if name in NUMBERS else np.array([str(v) for v in values])


def fit_probe(data: Pooled, name: str) -> Probe | None:
    """Logistic or ridge regression of a variable; None where the data have fewer than two values of it."""
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    y = truth(data, name)
    if len(set(y.tolist())) < 2:
        return None
    model = RidgeCV(ALPHAS) if name in NUMBERS else LogisticRegression(max_iter=2000)
    fitted = make_pipeline(StandardScaler(), model).fit(data.latent_PC[known(data, name)], y)

    def predict(latent_PC: np.ndarray) -> np.ndarray:
        return np.asarray(fitted.predict(latent_PC))

    return predict


def agreement(probe: Probe, data: Pooled, name: str) -> dict[str, Any]:
    """Share right of a class, r and mean absolute error of a number, intervals over subjects; {} where none is known.

    Of modalities also the share right where T1 and T1c count as one.
    """
    rows = known(data, name)
    if not rows:
        return {}
    y, found, subjects = truth(data, name), probe(data.latent_PC[rows]), [data.subjects[i] for i in rows]
    if name in NUMBERS:
        return {
            "r": asdict(intervals.bootstrap(correlation, y, found, subjects=subjects)),
            "mae": asdict(intervals.mean(np.abs(y - found), subjects)),
        }
    right = {"share_right": asdict(intervals.mean((y == found).astype(float), subjects))}
    if name == "modality":  # without an enhancing lesion a T1c looks like a T1
        alike = [_T1_ALIKE.get(a, a) == _T1_ALIKE.get(b, b) for a, b in zip(y.tolist(), found.tolist(), strict=True)]
        right["share_right_t1_alike"] = asdict(intervals.mean(np.array(alike, float), subjects))
    return right


def probe_figures(train: Pooled, held_out: Pooled, generated: Pooled) -> tuple[dict[str, Any], dict[str, str]]:
    """Agreement of each variable asked for with what a probe of real latents sees in the ``generated`` ones, beside the
    same probe's on ``held_out`` people; and why variables are left out."""
    found: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for name in (*CLASSES, *NUMBERS):
        probe = fit_probe(train, name)
        if probe is None or not known(held_out, name) or not known(generated, name):
            left_out[name] = "the latents or the run's table have fewer than two values of it"
        else:
            found[name] = {"generated": agreement(probe, generated, name), "real": agreement(probe, held_out, name)}
    return found, left_out
