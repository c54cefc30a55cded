"""What the generator's training draws and minimizes: the law of t, weights of channels, and the wide head."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from g3n import flops
from g3n.config import G3nError, build
from g3n.engine.compiled import compile_blocks
from g3n.models.conditioning import Variable, VariableSet
from g3n.models.dit import DiT, DiTConfig
from g3n.stream.samples import Batch
from g3n.tasks.dit import DiTTask, DiTTaskConfig, draw, training_times, velocity_errors
from g3n.tasks.forecast import ForecastTask, ForecastTaskConfig
from g3n.train import load_config

ROOT = Path(__file__).resolve().parents[2]
TABLE = {"age_years": Variable(low=0, high=110), "elapsed_years": Variable(low=0, high=10)}
NET = DiTConfig(tokens=(1, 1, 2), channels=3, width=12, depth=1, heads=2, mlp=24, variables=TABLE)


def config(**changes: Any) -> DiTTaskConfig:
    return DiTTaskConfig("", NET, **changes)


def quantiles(t: Tensor) -> list[float]:
    return np.quantile(t.double().numpy(), [0.05, 0.25, 0.5, 0.75, 0.95]).tolist()


U = torch.from_numpy((np.arange(100_000) + 0.5) / 100_000).float()  # a uniform sample without luck


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.8, 0.6)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_logit_normal_times(mean: float, std: float, shift: float) -> None:
    """The shift divides the odds of t, so it moves the mean of logit(t) by -log(shift)."""
    t = training_times(config(time_law="logit_normal", time_mean=mean, time_std=std, time_shift=shift), U)
    expected = stats.norm(mean - np.log(shift), std).ppf([0.05, 0.25, 0.5, 0.75, 0.95])
    assert quantiles(t) == pytest.approx((1 / (1 + np.exp(-expected))).tolist(), abs=1e-4)
    assert 0 <= float(t.min()) < float(t.max()) <= 1


@pytest.mark.parametrize("power", [1.0, 1.5])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_uniform_times(power: float, shift: float) -> None:
    """u^p is Beta(1 / p, 1); the shift turns its quantiles as Esser's formula, in s = 1 - t, says."""
    t = training_times(config(time_power=power, time_shift=shift), U)
    noise = 1 - stats.beta(1 / power, 1).ppf([0.05, 0.25, 0.5, 0.75, 0.95])
    assert quantiles(t) == pytest.approx((1 - shift * noise / (1 + (shift - 1) * noise)).tolist(), abs=1e-4)


def test_times_are_those_of_before_where_nothing_is_asked_for() -> None:
    assert torch.equal(training_times(config(), U), U)
    assert torch.equal(training_times(config(time_power=1.5), U), U**1.5)


def test_ends_of_the_uniform_numbers_give_finite_times() -> None:
    ends = torch.tensor([0.0, 2**-24, 1 - 2**-24])
    t = training_times(config(time_law="logit_normal", time_mean=-1.0, time_std=2.0, time_shift=3.0), ends)
    assert t.isfinite().all()
    assert ((t >= 0) & (t <= 1)).all()


@pytest.mark.parametrize(("name", "shift"), [("dit", 3.0619), ("tiny/dit", 1.0825)])
def test_automatic_shift_goes_with_the_root_of_the_latents_numbers(name: str, shift: float) -> None:
    model = load_config(ROOT / f"configs/{name}.yaml").model
    assert model.shift == 1.0
    assert dataclasses.replace(model, time_shift="auto").shift == pytest.approx(shift, abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time_law": "logit_normal", "time_power": 1.5}, "belongs to time_law uniform"),
        ({"time_law": "normal"}, "allowed: uniform, logit_normal"),
        ({"time_std": 0}, "time_std 0.0 must be > 0"),
        ({"time_shift": -1}, "time_shift -1.0 must be > 0, or auto"),
        ({"time_shift": "Auto"}, "model.time_shift' is 'Auto'"),
        ({"channel_weights": "scale"}, "allowed: none, variance"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, Any], message: str) -> None:
    net = {"variables": {"age_years": {"low": 0, "high": 110}}}
    with pytest.raises(G3nError, match=message):
        build(DiTTaskConfig, {"tokenizer": "", "net": net, **changes}, "model")


def test_a_forecaster_has_no_automatic_shift() -> None:
    with pytest.raises(ValueError, match="not at a baseline; give a number"):
        ForecastTaskConfig("", NET, time_shift="auto")


SCALE = torch.tensor([1.0, 2.0, 4.0])
MEAN = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])


def test_variance_weights_by_hand() -> None:
    """Scales 1, 2, 4: weights 1/7, 4/7, 16/7. Errors of 1 in the first channel and of 2 in the last, one token of two."""
    predicted, velocity = torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)
    predicted[0, 0] = torch.tensor([1.0, 0.0, -2.0])
    assert float(velocity_errors(predicted, velocity)) == pytest.approx(5 / 6)
    assert float(velocity_errors(predicted, velocity, SCALE)) == pytest.approx((1 / 7 + 4 * 16 / 7) / 6)


class Space(nn.Module):
    """LatentSpace as far as a loss needs it."""

    scale = SCALE

    def standardize(self, raw_BNC: Tensor) -> Tensor:
        return (raw_BNC - MEAN) / SCALE


class Guess(nn.Module):
    """A model that is always wrong, differently in each place; remembers the times it saw."""

    def forward(self, x_BNC: Tensor, t_B: Tensor, cond_BV: Tensor, source_BNC: Tensor | None = None) -> Tensor:
        self.x_BNC, self.t_B, self.cond_BV = x_BNC, t_B, cond_BV
        return 0.3 * x_BNC + t_B[:, None, None]


def task_of(model: DiTTaskConfig) -> Any:
    task: Any = SimpleNamespace(config=model, space=Space(), variables=VariableSet(TABLE))
    return task


def batch(seeds: list[int]) -> Batch:
    rows = [torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    baseline, target, latent = (torch.stack(t) for t in zip(*rows, strict=True))
    numbers = torch.tensor(seeds)
    tensors = {"baseline": baseline, "target": target, "latent": latent, "elapsed_years": torch.ones(len(seeds))}
    variables = [{"age_years": 50.0}] * len(seeds)
    return Batch(tensors, variables, [str(s) for s in seeds], numbers, numbers, numbers, torch.ones(len(seeds)))


def errors(model: DiTTaskConfig, seeds: list[int], training: bool = True) -> tuple[Tensor, Guess]:
    guess, task = Guess(), task_of(model)
    if isinstance(model, ForecastTaskConfig):
        task._start = lambda b: ForecastTask._start(task, b)
        task._gate = lambda b: ForecastTask._gate(task, b)
        task._source = lambda b, baseline: ForecastTask._source(task, b, baseline)
        task._conditions = lambda b: ForecastTask._conditions(task, b)
        return ForecastTask._errors(task, guess, batch(seeds), training), guess
    return DiTTask._errors(task, guess, batch(seeds), training), guess


KINDS = pytest.mark.parametrize("kind", [DiTTaskConfig, ForecastTaskConfig])


@KINDS
def test_weighted_loss_is_that_of_raw_latents(kind: type[DiTTaskConfig]) -> None:
    """The error of the velocity in raw units, with the noise scaled as the latents are, over the mean variance."""
    found, guess = errors(kind("", NET, channel_weights="variance"), [3, 4])
    b = batch([3, 4])
    noise = torch.stack([draw(torch.tensor([seed]), 2, (2, 3), 0.1, 0.1).noise[0] for seed in (3, 4)])
    if kind is DiTTaskConfig:
        raw_velocity = b.tensors["latent"] - (noise * SCALE + MEAN)
    else:
        raw_velocity = b.tensors["target"] - (b.tensors["baseline"] + 0.1 * noise * SCALE)
    raw_guess = guess(guess.x_BNC, guess.t_B, guess.cond_BV) * SCALE
    raw = (raw_guess - raw_velocity).square().mean(dim=(1, 2)) / SCALE.square().mean()
    assert torch.allclose(found, raw, rtol=1e-5)
    assert not torch.allclose(found, errors(kind("", NET), [3, 4])[0], rtol=1e-2)


@KINDS
def test_evaluation_is_the_same_whatever_training_does(kind: type[DiTTaskConfig]) -> None:
    plain, guess = errors(kind("", NET), [3, 4], training=False)
    other, _ = errors(
        kind("", NET, channel_weights="variance", time_law="logit_normal", time_shift=3.0), [3, 4], training=False
    )
    assert torch.equal(plain, other)
    assert torch.equal(guess.t_B, draw(torch.tensor([3, 4]), 2, (2, 3), 0.1, 0.1).t)


@KINDS
def test_times_and_errors_of_a_sample_depend_on_its_seed_and_not_on_its_batch(kind: type[DiTTaskConfig]) -> None:
    model = kind("", NET, channel_weights="variance", time_law="logit_normal", time_mean=-0.5, time_shift=2.0)
    together, guess = errors(model, [11, 12, 13])
    for i, seed in enumerate((11, 12, 13)):
        alone, one = errors(model, [seed])
        assert torch.allclose(one.t_B[0], guess.t_B[i], rtol=1e-6)
        assert torch.allclose(alone[0], together[i], rtol=1e-6)
    assert len(set(guess.t_B.tolist())) == 3


WIDE = dataclasses.replace(NET, tokens=(2, 2, 2), depth=2, head_depth=2, head_width=24)


def lively(net: DiT) -> DiT:
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Two samples of 8 tokens; the second knows its age, the first nothing."""
    generator = torch.Generator().manual_seed(seed)
    variables = torch.tensor([[torch.nan, torch.nan], [40.0, torch.nan]])
    return torch.randn(2, 8, 3, generator=generator), torch.tensor([0.2, 0.7]), variables


def test_without_a_head_names_and_first_weights_are_those_of_before() -> None:
    """Two numbers of the same net at the commit before the head came."""
    torch.manual_seed(0)
    net = DiT(dataclasses.replace(NET, variables={"age_years": Variable(low=0, high=110)}))
    assert not any("head" in name for name in net.state_dict())
    assert [name for name in net.state_dict() if "predict" in name] == ["predict.weight", "predict.bias"]
    assert float(net.place.weight.detach()[0, 0]) == pytest.approx(-0.3854124546, abs=1e-6)
    assert float(net.state_dict()["blocks.0.attention.qkv.weight"][0, 0]) == pytest.approx(0.2211695910, abs=1e-6)


def test_parameters_of_a_wide_head_by_hand() -> None:
    """Head of 24: heads of 6 as in the trunk, so 4; MLP of 48; the trunk's own prediction is gone."""
    with torch.device("meta"):
        wide, plain = DiT(WIDE, source_channels=3), DiT(dataclasses.replace(WIDE, head_depth=0, head_width=0), 3)
    assert wide.head is not None
    first: Any = wide.head.blocks[0]
    assert (first.attention.heads, first.mlp.up.out_features) == (4, 48)
    block = (24 + 1) * 72 + (24 + 1) * 24 + (24 + 1) * 48 + (48 + 1) * 24 + (24 + 1) * 144 + 2 * 6
    head = (6 + 1) * 24 + (12 + 1) * 24 + 2 * block + (24 + 1) * 48 + (24 + 1) * 3
    count = [sum(p.numel() for p in net.parameters()) for net in (wide, plain)]
    assert count[0] - count[1] == head - (12 + 1) * 3


def test_a_fresh_wide_head_predicts_nothing_and_learns() -> None:
    """adaLN-Zero: the first velocity is 0, and a step of the loss moves the last layer."""
    torch.manual_seed(0)
    net = DiT(WIDE)
    out = net(*inputs())
    assert out.shape == (2, 8, 3)
    assert bool((out == 0).all())
    (out - 1).square().mean().backward()
    assert net.head is not None
    assert float(net.head.predict.bias.grad.abs().min()) > 0  # type: ignore[union-attr]


def test_every_weight_of_trunk_and_head_acts() -> None:
    torch.manual_seed(0)
    net = lively(DiT(WIDE))
    net(*inputs()).square().sum().backward()
    idle = [name for name, p in net.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
    assert all("elapsed_years.project" in name or "elapsed_years.norm" in name for name in idle)  # null in both samples
    assert len(idle) == 6


def test_the_head_is_conditioned_token_by_token() -> None:
    """With the head's attention and its own reading of the latents cut, only what the trunk says of a token moves the token."""
    torch.manual_seed(0)
    net = lively(DiT(WIDE))
    head: Any = net.head
    for block in head.blocks:
        nn.init.zeros_(block.attention.out.weight)
    trunk = torch.randn(1, 8, 12)
    other = trunk.clone()
    other[0, 3] += 1.0
    x = torch.randn(1, 8, 3)
    moved = (head(x, other) - head(x, trunk)).abs().sum(dim=-1)[0] > 1e-4
    assert moved.tolist() == [i == 3 for i in range(8)]


def test_recomputation_and_flops_and_compilation_know_the_head() -> None:
    torch.manual_seed(0)
    net = lively(DiT(WIDE))
    plain = torch.autograd.grad(net(*inputs()).square().sum(), list(net.parameters()), allow_unused=True)
    for module in net.modules():
        if hasattr(module, "recompute"):
            setattr(module, "recompute", True)  # noqa: B010
    again = torch.autograd.grad(net(*inputs()).square().sum(), list(net.parameters()), allow_unused=True)
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(plain, again, strict=True) if a is not None)
    assert compile_blocks(net) == 4

    class Velocity:
        def loss(self, model: nn.Module, b: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            x = b.tensors["latent"]
            return model(x, x.new_zeros(len(x)), x.new_zeros(len(x), 2)).square().mean(), {}

    def work(config: DiTConfig) -> int:
        with torch.device("meta"):
            module = DiT(config)
        latents = dataclasses.replace(batch([1, 2]), tensors={"latent": torch.empty(2, 8, 3)})
        task: Any = Velocity()
        return flops.flops_a_sample(flops.twin(task, module), latents)

    n, w = 8, 24
    blocks = 2 * (2 * n * (4 * w * w + 2 * w * 48) + 4 * n * n * w + 2 * n * w * 6 * w)
    rest = blocks + 2 * n * (12 * w + 2 * w * w + w * 3) - 2 * n * 12 * 3
    assert work(WIDE) - work(dataclasses.replace(WIDE, head_depth=0, head_width=0)) == 3 * rest + 2 * (2 * n * 3 * w)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_depth": 2}, "give both, or 0 for both"),
        ({"head_width": 24}, "give both, or 0 for both"),
        ({"head_depth": 1, "head_width": 20}, "divisible by width / heads = 6 and by 6"),
    ],
)
def test_impossible_heads_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(NET, **changes)
