"""The normal distribution a DiT begins with: its velocity in closed form, what is taken from latents, and what is drawn from it."""

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
from g3n.models.conditioning import Variable, VariableSet
from g3n.models.dit import DiT, DiTConfig
from g3n.models.gaussian import GaussianStart
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


def test_velocity_is_that_of_mean_and_covariance() -> None:
    """E[x1 - x0 | x_t] = m + (t S - (1 - t)) (t^2 S + (1 - t)^2)^-1 (x_t - t m) for x1 ~ N(m, S), x0 ~ N(0, 1)."""
    data, covariance = gaussian()
    x, t = torch.randn(5, N, C, generator=torch.Generator().manual_seed(1)), torch.linspace(0.02, 0.98, 5)
    mean = torch.randn(5, N, C, generator=torch.Generator().manual_seed(2))
    made = gaussian_velocity(x, t, data, mean).flatten(1)
    one = torch.eye(N * C).double()
    for b, u in enumerate(t.double()):
        cross, total = u * covariance - (1 - u) * one, u**2 * covariance + (1 - u) ** 2 * one
        off = (x[b] - t[b] * mean[b]).flatten().double()
        expected = mean[b].flatten().double() + cross @ torch.linalg.solve(total, off)
        assert torch.allclose(made[b].double(), expected, atol=1e-5)
    assert torch.equal(gaussian_velocity(x, t, data), gaussian_velocity(x, t, data, torch.zeros_like(x)))


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


TABLE = {
    "modality": Variable(levels=("T1", "T2")),
    "age_years": Variable(low=0, high=100),
    "sex": Variable(levels=("F", "M")),
}
BIG = (30, 20)


def start(rank: int) -> GaussianStart:
    return GaussianStart(VariableSet(TABLE), *BIG, rank)


def cohort(people: int, scans: int, seed: int = 3) -> tuple[Tensor, Tensor, list[str], np.ndarray]:
    """(latents, encoded variables, subjects, true means): each T1's mean falls with age as each T2's rises; two strong directions and
    noise of variance 0.3 in 600 dimensions around it. The sex of every fourth scan is unknown."""
    rng = np.random.default_rng(seed)
    directions = np.linalg.qr(np.random.default_rng(1).standard_normal((600, 2)))[0]
    contrast, ageing = np.random.default_rng(2).standard_normal((2, 600))
    found, means, variables, names = [], [], [], []
    for i in range(people * scans):
        age, kind = rng.uniform(20, 80), ("T1", "T2")[i % 2]
        sign = 1 if kind == "T1" else -1
        mean = sign * (contrast - (age - 50) / 50 * ageing)
        x = mean + directions @ (np.array([9.0, 5.0]) * rng.standard_normal(2)) + 0.3**0.5 * rng.standard_normal(600)
        found.append(x)
        means.append(mean)
        variables.append({"modality": kind, "age_years": age, "sex": None if i % 4 == 0 else "FM"[i % 3 % 2]})
        names.append(f"sub-{i // scans:03d}")
    z = torch.tensor(np.array(found), dtype=torch.float32).view(-1, *BIG)
    return z, VariableSet(TABLE).encode(variables), names, np.array(means)


def test_means_follow_the_variables_and_each_others_modality() -> None:
    model = start(4)
    z, cond, names, _ = cohort(people=150, scans=2)
    model.fit(z, cond, names)
    _, new, _, truth = cohort(people=40, scans=2, seed=4)
    made = model.mean(new).flatten(1).double().numpy()
    assert ((made - truth) ** 2).mean() < 0.12 * (truth**2).mean()
    null = model.mean(torch.full((1, 3), float("nan")))
    assert (
        float(null.abs().max()) == 0
    )  # of nobody in particular: the mean of all, which standardized latents have at 0
    older = VariableSet(TABLE).encode([{"modality": m, "age_years": a} for m in ("T1", "T2") for a in (30, 70)])
    t1, t2 = (m[1] - m[0] for m in model.mean(older).flatten(1).double().numpy().reshape(2, 2, 600))
    assert np.corrcoef(t1, t2)[0, 1] < -0.8


def test_directions_are_scikit_learns_and_the_rest_is_that_of_people_it_has_not_seen() -> None:
    z, cond, names, _ = cohort(people=60, scans=2)
    model = start(40)
    model.fit(z, cond, names)
    around = (z - model.mean(cond)).flatten(1)
    svd = TruncatedSVD(40, algorithm="arpack").fit(around.double().numpy())
    same = np.abs((model.directions_RNC.flatten(1).double().numpy() * svd.components_).sum(1))
    assert same[:2] == pytest.approx([1, 1], abs=1e-5)
    assert model.variances_R.double().numpy() == pytest.approx(svd.singular_values_**2 / 120, rel=1e-4)
    flat = model.directions_RNC.flatten(1)
    inside = around - (around @ flat.T) @ flat
    assert float(inside.square().sum() / (120 * 560)) < 0.2  # what the same scans would have told
    assert float(model.rest) == pytest.approx(0.3, rel=0.1)


def test_few_scans_give_as_many_directions_as_they_have() -> None:
    z, cond, names, _ = cohort(people=6, scans=2)
    model = start(100)
    model.fit(z, cond, names)
    flat = model.directions_RNC.flatten(1)
    there = int((flat.square().sum(1) > 0.5).sum())
    assert there <= 12
    assert torch.allclose(flat[:there] @ flat[:there].T, torch.eye(there), atol=1e-4)
    assert not flat[there:].any()
    alone = start(100)
    alone.fit(z[:8], cond[:8], names[:8])
    x, t = torch.randn(3, *BIG), torch.tensor([0.1, 0.5, 0.9])
    assert torch.allclose(alone(x, t, cond[:3]), gaussian_velocity(x, t))


def net(**changes: Any) -> DiT:
    table = {"age_years": {"low": 0, "high": 110}}
    size = {"tokens": [1, 1, N], "channels": C, "width": 12, "depth": 1, "heads": 2, "mlp": 24, "variables": table}
    return DiT(build(DiTConfig, {**size, **changes}))


@torch.no_grad()
def test_an_untrained_network_draws_from_it() -> None:
    data, _ = gaussian()
    model: Any = net(gaussian_skip=True, gaussian_rank=R)
    model.start.directions_RNC.copy_(data.directions_RNC)
    model.start.variances_R.copy_(data.variances_R)
    model.start.rest.copy_(data.rest)
    model.start.means_LNC.normal_()
    x, t, age = torch.randn(3, N, C), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([[20.0], [50.0], [float("nan")]])
    mean = model.start.mean(age)
    assert mean[0].any()
    assert not mean[2].any()
    assert torch.allclose(model(x, t, age), gaussian_velocity(x, t, data, mean), atol=1e-6)
    assert sum(name.startswith("start.") for name in model.state_dict()) == 7  # they travel with the weights
    assert not any(name.startswith("start.") for name, _ in model.named_parameters())  # and are not trained


def test_a_rank_without_the_skip_is_refused() -> None:
    with pytest.raises(G3nError, match="0 without gaussian_skip"):
        net(gaussian_rank=2)


def test_the_task_takes_it_from_the_train_latents(tmp_path: Path) -> None:
    root = chain(tmp_path, train=8, val=4)
    tree = read_yaml(nano.configs(root)["dit"])["model"]
    tree["net"] |= {"gaussian_skip": True, "gaussian_rank": 100}  # more than there are
    task = DiTTask(build(DiTTaskConfig, tree), load_index(str(root / "latents")))
    model: Any = task.build()
    batches = list(eval_batches(task.index, None, "latent", "train", 64, 0, 1, 0))
    z = task.space.standardize(torch.cat([b.tensors["latent"][b.weights > 0] for b in batches]))
    cond = torch.cat([task.variables.encode(b.variables)[b.weights > 0] for b in batches])
    around = (z - model.start.mean(cond)).double()
    told = model.start.directions_RNC.flatten(1).square().sum(1) > 0.5
    total = float((model.start.variances_R * told).sum())
    assert total == pytest.approx(float(around.square().sum() / len(z)), rel=1e-3)
    assert float(around.square().mean()) < float(z.double().square().mean())
