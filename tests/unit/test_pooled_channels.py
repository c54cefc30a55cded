"""Channels of P that hold what all places of a scan share: probes of mean tokens keep what few voxels show."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import eigh

from g3n.models.projection import regression

SCANS, PLACES, WIDTH, VOXELS = 60, 10, 12, 20


def made(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Features [B, N, D] in which one weak direction tells ``trait`` [B] at every place, and patches [B, N, P] that do not show it."""
    rng = np.random.default_rng(seed)
    trait = rng.standard_normal(SCANS)
    f_BND = rng.standard_normal((SCANS, PLACES, WIDTH)) * np.linspace(3, 0.5, WIDTH)
    f_BND[..., -1] += 0.5 * trait[:, None]
    x_BNP = f_BND[..., :-1] @ rng.standard_normal((WIDTH - 1, VOXELS)) + 0.1 * rng.standard_normal(
        (SCANS, PLACES, VOXELS)
    )
    turn = np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0]
    return torch.from_numpy(f_BND @ turn).float(), torch.from_numpy(x_BNP).float(), trait


def around(x: torch.Tensor) -> np.ndarray:
    return (x.double() - x.double().mean(0)).flatten(0, 1).numpy()


def left(z: np.ndarray, x: np.ndarray) -> float:
    """Power of x that no linear image of z draws."""
    return float(np.square(x - z @ np.linalg.lstsq(z, x, rcond=None)[0]).sum())


def test_the_first_channel_is_what_all_places_share() -> None:
    f, x, trait = made()
    gram = around(f).T @ around(f)
    mean = f.double().mean(1).numpy()
    mean -= mean.mean(0)
    _, vectors = eigh(mean.T @ mean, gram + 1e-3 * np.trace(gram) / WIDTH * np.eye(WIDTH))
    first = regression(f, x, 4, 1).projection_CD[0].double().numpy()
    assert abs(first @ vectors[:, -1]) / np.linalg.norm(first) / np.linalg.norm(vectors[:, -1]) == pytest.approx(
        1, abs=1e-6
    )
    pooled = [
        abs(
            np.corrcoef(mean @ regression(f, x, 4, k).projection_CD.double().numpy().T, trait, rowvar=False)[-1, :-1]
        ).max()
        for k in (0, 1)
    ]
    assert pooled[1] > 0.85 > 0.5 > pooled[0]


@pytest.mark.parametrize("pooled", [0, 1, 3])
def test_the_other_channels_are_the_best_beside_them(pooled: int) -> None:
    """Reduced-rank regression of what the first leave, by the singular values of its fit."""
    f, x, _ = made(1)
    features, voxels = around(f), around(x)
    z = features @ regression(f, x, 5, pooled).projection_CD.double().numpy().T
    first = z[:, :pooled]

    def without(a: np.ndarray) -> np.ndarray:
        return a - first @ np.linalg.lstsq(first, a, rcond=None)[0] if pooled else a

    rest = without(features)
    fit = rest @ np.linalg.lstsq(rest, without(voxels), rcond=1e-9)[0]
    best = np.square(without(voxels)).sum() - np.square(np.linalg.svd(fit, compute_uv=False)[: 5 - pooled]).sum()
    assert left(z, voxels) == pytest.approx(best, rel=1e-4)
    power = np.square(z).mean(0)
    if pooled:
        np.testing.assert_allclose(power[:pooled], power[pooled:].mean(), rtol=1e-4)


def test_more_than_there_are_is_refused() -> None:
    f, x, _ = made()
    with pytest.raises(ValueError, match="pooled 5 must lie in 0 to 4"):
        regression(f, x, 4, 5)
    assert regression(f, x, 4, 4).projection_CD.shape == (4, WIDTH)
