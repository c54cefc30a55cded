"""How P begins and whether it moves; noise on its latents; further losses of the decoder task, on a tiny chain."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge

from g3n import flops
from g3n.config import G3nError, build
from g3n.latent import LatentSpace
from g3n.models.mae import MAE, MAEConfig
from g3n.stream.index import ShardIndex, load_index
from g3n.stream.lanes import eval_batches
from g3n.stream.samples import Batch
from g3n.tasks.decoder import DecoderTask, DecoderTaskConfig
from tests import nano
from tests.unit.test_decoder_start import NET
from tests.unit.test_encode import save_run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("projection")
    nano.shards(root / "shards", train=6, val=1)
    torch.manual_seed(0)
    about = {"shards": load_index(str(root / "shards")).fingerprint}
    save_run(root / "mae", "mae", {"net": NET}, MAE(build(MAEConfig, NET)), about)
    return root


@pytest.fixture(scope="module")
def index(root: Path) -> ShardIndex:
    return load_index(str(root / "shards"))


def tree(root: Path, channels: int = 8, linear_path: bool = False, **options: Any) -> dict[str, Any]:
    net = {"latent_channels": channels, "decoder_channels": [8, 8, 8], "linear_path": linear_path}
    return {"encoder": str(root / "mae"), "net": net, "init_volumes": 100, **options}


def task_of(root: Path, index: ShardIndex, **options: Any) -> DecoderTask:
    return DecoderTask(build(DecoderTaskConfig, tree(root, **options)), index)


def module_of(task: DecoderTask) -> Any:
    torch.manual_seed(0)
    return task.build()


def batch_of(task: DecoderTask, split: str = "train", size: int = 4) -> Batch:
    batch = next(iter(eval_batches(task.index, None, "volume", split, size, 0, 1, 0)))
    return dataclasses.replace(batch, seeds=torch.arange(100, 100 + size))


def around_places(task: DecoderTask) -> np.ndarray:
    """Features of the train split around the mean of each place, [M, D]."""
    f_BND, _ = task._seen()
    return (f_BND - f_BND.mean(0)).flatten(0, 1).numpy()


# --- how P begins


def test_pca_is_scikit_learns(root: Path, index: ShardIndex) -> None:
    task = task_of(root, index, projection="pca")
    module = module_of(task)
    features = around_places(task)
    expected = PCA(8, svd_solver="full").fit(features).components_
    found = module.projection.weight.detach().double().numpy()
    signs = np.sign((found * expected).sum(1, keepdims=True))
    assert np.abs(found - signs * expected).max() < 1e-3
    z = features @ found.T
    assert float(module.input_scale) == pytest.approx(z.std(), rel=1e-3)
    assert float((z / float(module.input_scale)).std()) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(("kind", "channels"), [("pca", 8), ("identity", 48)])
def test_the_linear_path_begins_as_ridge_regression_on_the_latents(
    root: Path, index: ShardIndex, kind: str, channels: int
) -> None:
    task = task_of(root, index, channels=channels, linear_path=True, projection=kind, projection_trained=False)
    module = module_of(task)
    f_BND, x_BNP = (v.double() for v in task._seen())
    z_BNC = f_BND @ module.projection.weight.double().T
    z, x = ((v - v.mean(0)).flatten(0, 1).numpy() for v in (z_BNC, x_BNP))
    ridge = Ridge(alpha=1e-3 * (z**2).sum(0).mean(), fit_intercept=False).fit(z, x)
    expected = torch.from_numpy(ridge.predict(z)).view_as(x_BNP) + x_BNP.mean(0)
    with torch.no_grad():
        made = module.linear.to_patch(z_BNC.float() / module.input_scale) + module.linear.mean
    assert float((made - expected).abs().max()) < 1e-2 * float(expected.abs().max())


def test_identity_keeps_the_features(root: Path, index: ShardIndex) -> None:
    module = module_of(task_of(root, index, channels=48, projection="identity", projection_trained=False))
    features = torch.randn(2, 8, 48)
    assert torch.equal(module.projection(features), features)


@pytest.mark.parametrize("kind", ["regression", "random", "pca"])
def test_a_fixed_projection_is_saved_and_not_trained(root: Path, index: ShardIndex, kind: str) -> None:
    moving, still = (module_of(task_of(root, index, projection=kind, projection_trained=t)) for t in (True, False))
    assert list(dict(moving.named_parameters())) == ["projection.weight", *dict(still.named_parameters())]
    assert torch.equal(moving.projection.weight, still.projection.weight)
    assert sorted(moving.state_dict()) == sorted(still.state_dict())
    assert "projection.weight" in dict(still.named_buffers())
    task = task_of(root, index, projection=kind, projection_trained=False)
    before = still.projection.weight.clone()
    optimizer = torch.optim.AdamW(still.parameters(), 1e-2)
    task.loss(still, batch_of(task))[0].backward()
    optimizer.step()
    assert torch.equal(still.projection.weight, before)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"projection": "identity"}, "set projection_trained false"),
        ({"projection": "identity", "projection_trained": False}, "keeps all 48 features"),
        ({"projection": "pca", "channels": 49}, "latent_channels 49 is more than the 48"),
        ({"channels": 513}, "latent_channels 513 is more than the 512"),
        ({"latent_noise": -1.0}, "latent_noise -1.0 must be >= 0"),
        (
            {"projection": "pca", "pooled_channels": 2},
            "pooled_channels 2 are channels of projection regression, not pca",
        ),
        ({"pooled_channels": 9}, "pooled_channels 9 must lie in 0 to net.latent_channels, 8"),
    ],
)
def test_what_cannot_be_is_said(root: Path, index: ShardIndex, options: dict[str, Any], words: str) -> None:
    with pytest.raises(G3nError, match=words):
        task_of(root, index, **options)


@torch.no_grad()
def test_a_fixed_projection_keeps_its_digits_beside_weights_in_bf16(root: Path, index: ShardIndex) -> None:
    """The engine casts parameters and leaves buffers in float32."""
    options = {"projection": "pca", "projection_trained": False, "latent_noise": 0.3, "adversarial_weight": 0.1}
    task = task_of(root, index, **options, ssim_weight=0.1, gradient_weight=0.1, frequency_weight=0.1)
    module, batch = module_of(task), batch_of(task)
    exact, logs = task.loss(module, batch)
    for parameter in module.parameters():
        parameter.data = parameter.data.bfloat16()
    loss, rounded = task.loss(module, batch)
    assert module.projection.weight.dtype == loss.dtype == torch.float32
    assert float(loss) == pytest.approx(float(exact), rel=0.02)
    assert list(rounded) == ["voxel", "mask", "ssim", "gradient", "frequency", "adversarial", "discriminator"]
    assert all(torch.allclose(rounded[k], logs[k], rtol=0.05, atol=0.01) for k in logs)


# --- noise on latents


@torch.no_grad()
def test_noise_has_the_spread_of_each_channel(root: Path, index: ShardIndex) -> None:
    """Its unit is the standard deviation of z' around its place's mean, of P as it is now."""
    task = task_of(root, index, latent_noise=0.5)
    module = module_of(task)
    module.projection.weight.mul_(torch.tensor([3.0, 0.1, 1, 1, 1, 1, 1, 1])[:, None])  # as training may
    z = around_places(task) @ module.projection.weight.double().numpy().T
    assert np.allclose(module.channel_scale().numpy(), z.std(0), rtol=1e-3)
    seen: list[torch.Tensor] = []
    module.decode = lambda z_BNC: seen.append(z_BNC)
    batch = batch_of(task)
    features, _ = task._inputs(batch)
    module(features)
    noise = task._noise(batch, features)
    assert noise is not None
    module(features, noise)
    added = (seen[1] - seen[0]) / torch.from_numpy(z.std(0)).float()
    assert torch.allclose(added, noise, atol=1e-2)
    many = torch.arange(2000)
    drawn = task._noise(dataclasses.replace(batch, seeds=many), features)
    assert drawn is not None
    assert float(drawn.std()) == pytest.approx(0.5, rel=0.02)


def test_noise_is_of_the_samples_own_seed_and_training_alone(root: Path, index: ShardIndex) -> None:
    task = task_of(root, index, latent_noise=0.5)
    module, batch = module_of(task), batch_of(task)
    whole = task.loss(module, batch)[1]["voxel"]
    one = {name: t[2:3] for name, t in batch.tensors.items()}
    alone = dataclasses.replace(batch, tensors=one, seeds=batch.seeds[2:3], keys=batch.keys[2:3])
    assert torch.allclose(task.loss(module, alone)[1]["voxel"], whole[2:3], atol=1e-6)
    other = task.loss(module, dataclasses.replace(batch, seeds=batch.seeds + 1))[1]["voxel"]
    assert not torch.allclose(other, whole, atol=1e-4)
    plain = task_of(root, index)
    assert torch.equal(task.eval_step(module, batch)["voxel"], plain.eval_step(module_of(plain), batch)["voxel"])


def test_a_tokenizer_trained_with_noise_opens_as_any_other(root: Path, index: ShardIndex, tmp_path: Path) -> None:
    task = task_of(root, index, latent_noise=0.5)
    module = module_of(task)
    model = {k: v for k, v in tree(root).items() if k in ("encoder", "net")}
    save_run(tmp_path / "run", "decoder", model, module, dict(task.artifact()))
    space = LatentSpace.open(tmp_path / "run")
    assert torch.equal(space.tokenizer.projection.weight, module.projection.weight)
    assert "feature_spread" not in space.state_dict()


# --- losses


def test_nothing_new_is_on_and_each_loss_adds_its_weight(root: Path, index: ShardIndex) -> None:
    task = task_of(root, index)
    module, batch = module_of(task), batch_of(task)
    loss, logs = task.loss(module, batch)
    assert set(logs) == {"voxel", "mask"}
    assert torch.equal(loss, logs["voxel"].mean())
    names = ("ssim", "gradient", "frequency")
    weights = {f"{name}_weight": w for name, w in zip(names, (0.5, 2.0, 0.25), strict=True)}
    more = task_of(root, index, **weights)
    loss, logs = more.loss(module, batch)
    assert all(logs[name].shape == (4,) and not logs[name].requires_grad for name in names)
    expected = logs["voxel"] + 0.5 * logs["ssim"] + 2 * logs["gradient"] + 0.25 * logs["frequency"]
    assert float(loss.detach()) == pytest.approx(float(expected.mean()), rel=1e-6)
    loss.backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in module.parameters())


def test_flops_of_all_options_are_counted(root: Path, index: ShardIndex) -> None:
    """A run counts them on the meta device before its first step."""
    task = task_of(root, index, ssim_weight=1.0, gradient_weight=1.0, frequency_weight=1.0, latent_noise=0.1)
    plain = task_of(root, index)
    module = module_of(task)
    more, less = (flops.flops_a_sample(flops.twin(t, copy.deepcopy(module)), batch_of(t)) for t in (task, plain))
    assert more > less > 0
