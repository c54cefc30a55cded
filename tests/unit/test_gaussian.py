"""The normal distribution a DiT begins with: its velocity in closed form, what is taken from latents, and that it is what is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import TruncatedSVD
from torch import Tensor

from g3n.config import G3nError, build, read_yaml
from g3n.flow import Gaussian, gaussian_velocity, integrate
from g3n.models.dit import DiT, DiTConfig
from g3n.models.gaussian import fit_gaussian
from g3n.stream.index import load_index
from g3n.stream.lanes import eval_batches
from g3n.tasks.dit import DiTTask, DiTTaskConfig
from tests import nano
from tests.untrained import chain

N, C, R = 3, 4, 2


def gaussian(seed: int = 0) -> tuple[Gaussian, Tensor]:
    """One of two directions in 12 dimensions, and its covariance [12, 12] float64."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((N * C, R)))
    directions, variances, rest = torch.from_numpy(q.T.copy()), torch.tensor([5.0, 2.0]), torch.tensor(0.3)
    covariance = 0.3 * torch.eye(N * C).double() + (directions.T * (variances - 0.3)) @ directions
    return Gaussian(directions.float().view(R, N, C), variances, rest), covariance


def test_velocity_is_that_of_the_covariance() -> None:
    """E[x1 - x0 | x_t] = (t S - (1 - t)) (t^2 S + (1 - t)^2)^-1 x_t for x1 ~ N(0, S), x0 ~ N(0, 1)."""
    data, covariance = gaussian()
    x, t = torch.randn(5, N, C, generator=torch.Generator().manual_seed(1)), torch.linspace(0.02, 0.98, 5)
    made = gaussian_velocity(x, t, data).flatten(1)
    one = torch.eye(N * C).double()
    for b, u in enumerate(t.double()):
        cross, total = u * covariance - (1 - u) * one, u**2 * covariance + (1 - u) ** 2 * one
        expected = cross @ torch.linalg.solve(total, x[b].flatten().double())
        assert torch.allclose(made[b].double(), expected, atol=1e-5)


def test_without_directions_it_is_the_standard_one() -> None:
    x, t = torch.randn(4, N, C), torch.rand(4)
    data = Gaussian(gaussian()[0].directions_RNC, torch.ones(R), torch.ones(()))
    assert torch.allclose(gaussian_velocity(x, t, data), gaussian_velocity(x, t), atol=1e-5)


def test_what_is_drawn_has_the_covariance() -> None:
    """The flow of a normal distribution is linear: noise is stretched by the root of the variance along each direction."""
    data, covariance = gaussian()
    noise = torch.eye(N * C).view(N * C, N, C)
    drawn = integrate(lambda x, t: gaussian_velocity(x, t, data), noise, 200).flatten(1).double()
    assert torch.allclose(drawn.T @ drawn, covariance, atol=2e-3)


def latents(people: int, scans: int) -> tuple[Tensor, list[str]]:
    """Two strong directions and noise of variance 0.3 in 600 dimensions; scans of a person share both parts half."""
    rng = np.random.default_rng(3)
    directions = np.linalg.qr(rng.standard_normal((600, 2)))[0]
    found, names = [], []
    for person in range(people):
        for _ in range(scans):
            x = directions @ (np.array([9.0, 5.0]) * rng.standard_normal(2)) + 0.3**0.5 * rng.standard_normal(600)
            found.append(x)
            names.append(f"sub-{person:02d}")
    return torch.tensor(np.array(found), dtype=torch.float32).view(-1, 30, 20), names


def test_directions_are_scikit_learns_and_the_rest_is_that_of_people_it_has_not_seen() -> None:
    z, names = latents(people=30, scans=2)
    found = fit_gaussian(z, names, rank=40)
    svd = TruncatedSVD(40, algorithm="arpack").fit(z.flatten(1).double().numpy())
    same = np.abs((found.directions_RNC.flatten(1).double().numpy() * svd.components_).sum(1))
    assert same[:2] == pytest.approx([1, 1], abs=1e-5)
    assert found.variances_R.double().numpy() == pytest.approx(svd.singular_values_**2 / 60, rel=1e-4)
    inside = z.flatten(1) - (z.flatten(1) @ found.directions_RNC.flatten(1).T) @ found.directions_RNC.flatten(1)
    assert float(inside.square().sum() / (60 * 560)) < 0.15  # what the same scans would have told
    assert float(found.rest) == pytest.approx(0.3, rel=0.08)


def test_few_scans_give_as_many_directions_as_they_have() -> None:
    found = fit_gaussian(*latents(people=6, scans=2), rank=100)
    assert len(found.variances_R) == 12
    assert torch.allclose(found.directions_RNC.flatten(1) @ found.directions_RNC.flatten(1).T, torch.eye(12), atol=1e-4)
    alone = fit_gaussian(*latents(people=4, scans=2), rank=100)
    x, t = torch.randn(3, 30, 20), torch.tensor([0.1, 0.5, 0.9])
    assert torch.allclose(gaussian_velocity(x, t, alone), gaussian_velocity(x, t))


def net(**changes: Any) -> DiT:
    table = {"age_years": {"low": 0, "high": 110}}
    size = {"tokens": [1, 1, N], "channels": C, "width": 12, "depth": 1, "heads": 2, "mlp": 24, "variables": table}
    return DiT(build(DiTConfig, {**size, **changes}))


@torch.no_grad()
def test_an_untrained_network_draws_from_it() -> None:
    data, _ = gaussian()
    model = net(gaussian_skip=True, gaussian_rank=R)
    model.gaussian_directions.copy_(data.directions_RNC)
    model.gaussian_variances.copy_(data.variances_R)
    model.gaussian_rest.copy_(data.rest)
    x, t = torch.randn(3, N, C), torch.tensor([0.1, 0.5, 0.9])
    made = model(x, t, torch.zeros(3, 1))
    assert torch.allclose(made, gaussian_velocity(x, t, data), atol=1e-6)
    assert sum("gaussian" in name for name in model.state_dict()) == 3  # they travel with the weights


def test_a_rank_without_the_skip_is_refused() -> None:
    with pytest.raises(G3nError, match="0 without gaussian_skip"):
        net(gaussian_rank=2)


def test_the_task_takes_it_from_the_train_latents(tmp_path: Path) -> None:
    root = chain(tmp_path, train=8, val=4)
    tree = read_yaml(nano.configs(root)["dit"])["model"]
    tree["net"] |= {"gaussian_skip": True, "gaussian_rank": 100}  # more than there are
    task = DiTTask(build(DiTTaskConfig, tree), load_index(str(root / "latents")))
    model: Any = task.build()
    batches = eval_batches(task.index, None, "latent", "train", 64, 0, 1, 0)
    z = task.space.standardize(torch.cat([b.tensors["latent"][b.weights > 0] for b in batches]))
    told = model.gaussian_directions.flatten(1).square().sum(1) > 0.5
    assert int(told.sum()) == len(z) - 1 or int(told.sum()) == len(z)
    total = float((model.gaussian_variances * told).sum())
    assert total == pytest.approx(float(z.double().square().sum() / len(z)), rel=1e-4)
