"""The forecaster over elapsed time: what the gate promises, and what training without it leaves to chance."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from g3n.config import build
from g3n.flow import elapsed_gate, guided, integrate, path
from g3n.models.conditioning import VariableSet
from g3n.models.dit import DiT
from g3n.stream.samples import Batch
from g3n.tasks.dit import draw
from g3n.tasks.forecast import (
    ForecastTask,
    ForecastTaskConfig,
    forecast_net,
    gated,
    keep_elapsed,
    source_channels,
    start_from,
    with_history,
)

N, C = 8, 4
PATTERN = torch.randn(N, C, generator=torch.Generator().manual_seed(7))  # what a year changes


def task(**more: Any) -> ForecastTask:
    """The task on made latents, which are standardized as they are."""
    tree = {"tokens": [2, 2, 2], "channels": C, "width": 24, "depth": 2, "heads": 2, "mlp": 48}
    tree["variables"] = {"age_years": {"low": 0, "high": 110}, "elapsed_years": {"low": 0, "high": 10}}
    made = object.__new__(ForecastTask)
    made.config = build(ForecastTaskConfig, {"tokenizer": "none", "net": tree, **more}, "model")
    made.space = SimpleNamespace(standardize=lambda raw: raw, mean=torch.zeros(N, C), scale=torch.ones(C))  # type: ignore[assignment]
    made.variables = VariableSet(made.config.net.variables)
    return made


def pairs(seed: int, size: int = 16, years: float | None = None) -> Batch:
    """Subjects that change by 0.2 PATTERN a year, 0.5 to 8 years apart."""
    generator = torch.Generator().manual_seed(seed)
    elapsed = 0.5 + 7.5 * torch.rand(size, generator=generator) if years is None else torch.full((size,), years)
    baseline = torch.randn(size, N, C, generator=generator)
    target = baseline + 0.2 * elapsed[:, None, None] * PATTERN
    tensors = {"baseline": baseline, "target": target, "elapsed_years": elapsed}
    zeros = torch.zeros(size, dtype=torch.int64)
    seeds = 1000 * seed + torch.arange(size)
    return Batch(tensors, [{"age_years": 50.0}] * size, ["x"] * size, seeds, zeros, zeros, torch.ones(size))


def trained(task: ForecastTask, steps: int = 120) -> DiT:
    torch.manual_seed(0)
    model = DiT(task.config.net, source_channels=C)
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for step in range(steps):
        optimizer.zero_grad()
        task.loss(model, pairs(step))[0].backward()
        optimizer.step()
    return model.eval()


def forecasts(
    task: ForecastTask, model: DiT, years: float, noise: float, guidance: float = 1.0
) -> tuple[Tensor, Batch]:
    """Of 16 new subjects, [16, N, C]."""
    batch = pairs(10_000, years=years)
    baseline = batch.tensors["baseline"]
    gate = task._gate(batch)
    start = start_from(baseline, draw(batch.seeds, 0, (N, C), 0, 0).noise, noise, gate)
    cond = task.variables.encode([{"age_years": 50.0, "elapsed_years": years}] * 16)
    velocity, null = gated(model, gate), torch.full_like(cond, torch.nan)
    v = guided(lambda x, t: velocity(x, t, cond, baseline), lambda x, t: velocity(x, t, null, baseline), guidance)
    return integrate(v, start, 10), batch


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


@pytest.fixture(scope="module")
def both() -> dict[bool, tuple[ForecastTask, DiT]]:
    tasks = {on: task(elapsed_gate=on, drop_each=0.0) for on in (False, True)}
    return {on: (t, trained(t)) for on, t in tasks.items()}


def test_gate_in_closed_form() -> None:
    years = torch.tensor([0.0, 2.0, 4.0, math.nan])
    assert elapsed_gate(years, 2.0).tolist() == pytest.approx([0.0, 1 - math.exp(-1), 1 - math.exp(-2), 1.0])
    assert elapsed_gate(years, 2.0)[0] == 0.0
    assert elapsed_gate(years, None).tolist() == [1.0] * 4


def test_with_the_gate_0_years_are_the_baseline_bit_for_bit(both: dict[bool, tuple[ForecastTask, DiT]]) -> None:
    for guidance in (1.0, 3.0):
        made, batch = forecasts(*both[True], years=0.0, noise=0.1, guidance=guidance)
        assert torch.equal(made, batch.tensors["baseline"])
    made, batch = forecasts(*both[False], years=0.0, noise=0.1)
    assert rms(made - batch.tensors["baseline"]) > 0.02  # without it, as much as training has left


def test_change_grows_smoothly_and_follows_the_truth(both: dict[bool, tuple[ForecastTask, DiT]]) -> None:
    errors, change = {}, {}
    for on in (False, True):
        found = [forecasts(*both[on], years=y, noise=0.0) for y in (0.0, 0.01, 0.1, 0.5, 1.0, 2.0, 4.0, 8.0)]
        change[on] = [rms(made - batch.tensors["baseline"]) for made, batch in found]
        errors[on] = [rms(made - batch.tensors["target"]) for made, batch in found]
    assert change[True] == sorted(change[True])
    assert change[True][1] / change[True][2] == pytest.approx(0.1, rel=0.1)  # in proportion to time near 0
    assert errors[True][-1] < 0.5 * 0.2 * 8 * rms(PATTERN)  # learned
    assert errors[True][1] < 0.2 * errors[False][1]  # four days apart


def test_losses_without_the_gate_are_those_of_the_formula() -> None:
    plain, batch = task(), pairs(3)
    model = DiT(plain.config.net, source_channels=C)
    torch.nn.init.normal_(model.predict.weight)
    baseline, target = batch.tensors["baseline"], batch.tensors["target"]
    draws = draw(batch.seeds, 2, (N, C), plain.config.drop_each, plain.config.drop_all)
    xt, velocity = path(baseline + 0.1 * draws.noise, target, draws.t)
    rows = [{"age_years": 50.0, "elapsed_years": float(e)} for e in batch.tensors["elapsed_years"]]
    cond = plain.variables.encode(rows).masked_fill(draws.drop, math.nan)
    expected = (model(xt, draws.t, cond, baseline) - velocity).square().mean()
    assert torch.equal(plain.loss(model, batch)[0], expected)
    assert set(DiT(task(elapsed_gate=True).config.net, C).state_dict()) == set(model.state_dict())


def test_the_gate_keeps_the_spread_of_normal_changes() -> None:
    """Change normal with deviation s, as wide as the noise, and the exact velocity in closed form: x1 has deviation s.
    Subtracting the noise one started with instead gives half of it, as g3n/tasks/forecast.py says."""
    s = noise_std = 0.3
    noise = torch.randn(1, 100_000, 1, generator=torch.Generator().manual_seed(0))
    gate = elapsed_gate(torch.tensor([1.5]), 2.0)

    def flow(x: Tensor, t: Tensor) -> Tensor:  # E[target / g - noise | x], of r = x / g
        t = t[:, None, None]
        g = float(gate)
        width = s / g
        return (t * width**2 - (1 - t) * noise_std**2) / ((1 - t) ** 2 * noise_std**2 + t**2 * width**2) * (x / g)

    ours = integrate(gated(flow, gate), start_from(torch.zeros_like(noise), noise, noise_std, gate), 100)
    assert float(ours.std()) == pytest.approx(s, rel=0.02)

    def kept(x: Tensor, t: Tensor) -> Tensor:  # E[target | x] - noise
        t = t[:, None, None]
        return t * s**2 / ((1 - t) ** 2 * s**2 + t**2 * s**2) * x - noise_std * noise

    assert float(integrate(kept, noise_std * noise, 100).std()) == pytest.approx(0.49 * s, rel=0.02)


def test_gate_years_must_be_positive() -> None:
    config = copy.deepcopy(task().config)
    with pytest.raises(ValueError, match="gate_years 0 must be > 0"):
        ForecastTaskConfig("none", config.net, gate_years=0)


def test_history_channels() -> None:
    """Latent, decades and mask of each earlier visit, all 0 where it is missing, whatever stands there."""
    baseline, earlier = torch.randn(2, N, C), torch.randn(2, 2, N, C)
    years = torch.tensor([[1.5, 4.0], [2.0, math.nan]])
    source = with_history(baseline, earlier, years)
    assert source.shape == (2, N, source_channels(C, 3)) == (2, N, C + 2 * (C + 2))
    assert torch.equal(source[..., :C], baseline)
    assert torch.equal(source[0, :, C : 2 * C], earlier[0, 0])
    assert source[0, :, [2 * C, 2 * C + 1, -2, -1]].unique(dim=0).tolist() == [pytest.approx([0.15, 1.0, 0.4, 1.0])]
    assert torch.equal(source[1, :, C : 2 * C], earlier[1, 0])
    assert not source[1, :, 2 * C + 2 :].any()
    assert source_channels(C, 1) == C


def test_a_second_scan_tells_how_fast_a_subject_changes() -> None:
    """Each subject has a rate of its own, which two scans show and one does not."""

    def drawn(seed: int) -> Batch:
        batch = pairs(seed)
        rate = torch.rand(16, 1, 1, generator=torch.Generator().manual_seed(seed + 1_000_000)) * 2 - 0.5
        elapsed, baseline = batch.tensors["elapsed_years"][:, None, None], batch.tensors["baseline"]
        batch.tensors["target"] = baseline + 0.2 * rate * elapsed * PATTERN
        batch.tensors["earlier"] = (baseline - 0.6 * rate * PATTERN)[:, None]  # three years before
        batch.tensors["earlier_years"] = torch.full((16, 1), 3.0)
        return batch

    errors = {}
    for history in (1, 2):
        made = task(history=history, drop_each=0.0, drop_all=0.0)
        torch.manual_seed(0)
        model = DiT(made.config.net, source_channels(C, made.config.history))
        optimizer = torch.optim.Adam(model.parameters(), lr=6e-3)
        for step in range(200):
            optimizer.zero_grad()
            made.loss(model, drawn(step))[0].backward()
            optimizer.step()
        with torch.no_grad():
            errors[history] = (
                sum(float(made.eval_step(model, drawn(5000 + i))["velocity"].mean()) for i in range(4)) / 4
            )
    assert errors[2] < 0.7 * errors[1]


def test_an_untrained_forecaster_that_begins_with_the_mean_change_forecasts_it() -> None:
    """Subjects that change by 0.2 PATTERN a year; those with a large first number in their baseline by as much again."""

    def made(seed: int, size: int, years: float | None = None) -> Batch:
        batch = pairs(seed, size, years)
        baseline, elapsed = batch.tensors["baseline"], batch.tensors["elapsed_years"]
        baseline[:, 0, 0] *= 4  # the widest direction
        pace = 0.2 + 0.05 * baseline[:, 0, 0]
        return replace(batch, tensors={**batch.tensors, "target": baseline + (pace * elapsed)[:, None, None] * PATTERN})

    plan = task(elapsed_gate=True, gate_years=20.0, noise=0.01)
    net = replace(plan.config.net, gaussian_skip=True)
    model: Any = forecast_net(net, 0.01, 1, 20.0).eval()
    train = made(1, 400)
    people = [f"sub-{i:03d}" for i in range(400)]
    model.start.fit(train.tensors["target"], plan._conditions(train), people, train.tensors["baseline"])
    for years in (1.0, 6.0):
        new = made(2, 16, years)
        gate = elapsed_gate(new.tensors["elapsed_years"], 20.0)
        start = start_from(new.tensors["baseline"], draw(new.seeds, 0, (N, C), 0, 0).noise, 0.01, gate)
        cond, baseline = plan._conditions(new), new.tensors["baseline"]
        velocity = gated(model, gate)
        found = integrate(
            lambda x, t, v=velocity, c=cond, b=baseline: v(x, t, c, b), start, 20
        )  # the network itself says 0
        truth = new.tensors["target"] - baseline
        assert rms(found - new.tensors["target"]) < 0.2 * rms(truth)
    still = made(2, 16, 0.0)
    gate = elapsed_gate(still.tensors["elapsed_years"], 20.0)
    cond, baseline = plan._conditions(still), still.tensors["baseline"]
    assert torch.equal(integrate(lambda x, t: gated(model, gate)(x, t, cond, baseline), baseline, 5), baseline)


def test_the_time_of_a_gate_is_never_dropped() -> None:
    names = VariableSet(task().config.net.variables)
    everything = torch.ones(2, len(names.names), dtype=torch.bool)
    assert keep_elapsed(names, everything, None).all()
    kept = keep_elapsed(names, everything, 5.0)
    assert kept.sum(dim=0).tolist() == [0 if name == "elapsed_years" else 2 for name in names.names]
