"""What a forecaster must beat: simple predictors of a follow-up's latent, learned from pairs of the train split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.progress import Progress

from g3n.latent import LatentSpace
from g3n.stream.index import ShardIndex
from g3n.stream.lanes import eval_batches

LEAST_PAIRS = 3
MOST_PAIRS = 4096  # held in memory at once
COMPONENTS = 16
ALPHAS = (0.1, 1.0, 10.0, 100.0, 1e3, 1e4)


@dataclass(frozen=True)
class Pairs:
    """First and last visits: standardized latents float32 [P, N, C], years between, age at the baseline (NaN unknown)."""

    baseline_PNC: np.ndarray
    target_PNC: np.ndarray
    elapsed_years_P: np.ndarray
    age_years_P: np.ndarray
    modality: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.modality)


Predictor = Callable[[Pairs], np.ndarray]  # -> predicted targets float32 [P, N, C]; does not look at target_PNC


def baseline_age_years(variables: dict[str, Any], elapsed_years: float) -> float:
    """From the variables of the target; NaN where the age is unknown."""
    age = variables.get("age_years")
    return float("nan") if age is None else float(age) - elapsed_years


def train_pairs(index: ShardIndex, space: LatentSpace, batch: int, progress: Progress) -> Pairs:
    """The pairs of the train split whose dates are known, at most ``MOST_PAIRS``."""
    parts: list[tuple[np.ndarray, np.ndarray, float, float, str]] = []
    bar = progress.add_task("read train pairs", total=None)
    for b in eval_batches(index, None, "pair", "train", batch, rank=0, world=1, seed=0):
        latents = [space.standardize(b.tensors[k].to(space.mean.device)).cpu().numpy() for k in ("baseline", "target")]
        for i, variables in enumerate(b.variables):
            years = float(b.tensors["elapsed_years"][i])
            if b.weights[i] > 0 and np.isfinite(years) and years > 0:
                age = baseline_age_years(variables, years)
                parts.append((latents[0][i], latents[1][i], years, age, str(variables.get("modality"))))
        progress.advance(bar, len(b))
        if len(parts) >= MOST_PAIRS:
            break
    shape = tuple(space.mean.shape)
    return Pairs(
        np.array([p[0] for p in parts], np.float32).reshape(-1, *shape),
        np.array([p[1] for p in parts], np.float32).reshape(-1, *shape),
        np.array([p[2] for p in parts], np.float64),
        np.array([p[3] for p in parts], np.float64),
        tuple(p[4] for p in parts),
    )


def mean_change(train: Pairs) -> Predictor:
    """The baseline plus the population's change a year of its modality (all changes over all years) times the years.

    A modality that no train pair has gets the change of all.
    """

    def a_year(rows: Sequence[int]) -> np.ndarray:
        change = (train.target_PNC[rows] - train.baseline_PNC[rows]).sum(axis=0, dtype=np.float64)
        return np.asarray(change / train.elapsed_years_P[rows].sum())

    everyone = a_year(range(len(train)))
    of = {m: a_year([i for i, other in enumerate(train.modality) if other == m]) for m in set(train.modality)}

    def predict(pairs: Pairs) -> np.ndarray:
        change = np.stack([of.get(m, everyone) for m in pairs.modality]) * pairs.elapsed_years_P[:, None, None]
        return (pairs.baseline_PNC + change).astype(np.float32)

    return predict


def regression(train: Pairs) -> Predictor:
    """Ridge regression of each latent number's change on the baseline's principal components, the years and the age.

    The penalty is chosen by leave-one-out within the train pairs. An unknown age is taken as the train mean.
    """
    from sklearn.decomposition import PCA
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    flat = train.baseline_PNC.reshape(len(train), -1)
    pca = PCA(min(COMPONENTS, len(train) - 1, flat.shape[1]), svd_solver="randomized", random_state=0).fit(flat)
    told = pca.explained_variance_ > 1e-9 * pca.explained_variance_[0]  # the rest is rounding
    known = np.isfinite(train.age_years_P)
    mean_age = float(train.age_years_P[known].mean()) if known.any() else 0.0

    def features(pairs: Pairs) -> np.ndarray:
        scores = pca.transform(pairs.baseline_PNC.reshape(len(pairs), -1))[:, told]
        age = np.where(np.isfinite(pairs.age_years_P), pairs.age_years_P, mean_age)
        return np.column_stack([scores, pairs.elapsed_years_P, age]).astype(np.float64)

    model = make_pipeline(StandardScaler(), RidgeCV(ALPHAS))
    model.fit(features(train), (train.target_PNC - train.baseline_PNC).reshape(len(train), -1))

    def predict(pairs: Pairs) -> np.ndarray:
        change = model.predict(features(pairs)).reshape(pairs.baseline_PNC.shape)
        return (pairs.baseline_PNC + change).astype(np.float32)

    return predict
