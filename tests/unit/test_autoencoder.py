"""The baseline: KL by torch's own, the posterior's noise from each sample's seed, and the same evaluation as the tokenizer."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from g3n.config import G3nError, build
from g3n.evaluate.reconstruction import evaluate_reconstruction
from g3n.latent import normalize
from g3n.models.autoencoder import AutoencoderConfig, kl_to_standard_normal
from g3n.stream.index import load_index
from g3n.stream.lanes import eval_batches
from g3n.stream.samples import Batch
from g3n.tasks.autoencoder import AutoencoderTask, AutoencoderTaskConfig
from tests import nano
from tests.unit.test_encode import save_run

NET = {"latent_channels": 2, "channels": [8, 8, 16], "norm_groups": 8}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("autoencoder")
    nano.shards(root / "shards", train=8, val=2)
    return root


@pytest.fixture(scope="module")
def task(root: Path) -> AutoencoderTask:
    return AutoencoderTask(build(AutoencoderTaskConfig, {"net": NET}), load_index(str(root / "shards")))


def module_of(task: AutoencoderTask) -> Any:
    torch.manual_seed(0)
    return task.build()


def batch_of(task: AutoencoderTask, split: str = "train", size: int = 4) -> Batch:
    batch = next(iter(eval_batches(task.index, None, "volume", split, size, 0, 1, 0)))
    return dataclasses.replace(batch, seeds=torch.arange(100, 100 + size))


def test_kl_is_torchs_summed_over_the_latent() -> None:
    mean, std = torch.randn(3, 2, 4, 4, 4), torch.rand(3, 2, 4, 4, 4) + 0.1
    expected = kl_divergence(Normal(mean, std), Normal(0, 1)).flatten(1).sum(1)
    assert torch.allclose(kl_to_standard_normal(mean, std), expected, rtol=1e-5)
    assert float(kl_to_standard_normal(torch.zeros(1, 8), torch.ones(1, 8))) == 0


def test_the_loss_is_l1_of_a_drawn_latent_and_its_weighted_kl(task: AutoencoderTask) -> None:
    module, batch = module_of(task), batch_of(task)
    loss, logs = task.loss(module, batch)
    target = normalize(*(batch.tensors[k] for k in ("volume", "mean", "rstd")))
    mean, std = module.net.encode(target[:, None])
    assert mean.shape[1:] == (2, 4, 4, 4)
    noise = torch.stack(
        [torch.randn((2, 4, 4, 4), generator=torch.Generator().manual_seed(s)) for s in range(100, 104)]
    )
    made = module.net.decode(mean + std * noise)[:, 0]
    voxel = (made - target).abs().flatten(1).mean(1)
    kl = kl_divergence(Normal(mean, std), Normal(0, 1)).flatten(1).sum(1)
    assert torch.allclose(logs["voxel"], voxel, rtol=1e-5)
    assert torch.allclose(logs["kl"], kl, rtol=1e-4)
    assert float(loss.detach()) == pytest.approx(float((voxel + 1e-6 * kl).mean().detach()), rel=1e-5)


@torch.no_grad()
def test_weights_in_bf16_give_nearly_the_same(task: AutoencoderTask) -> None:
    module, batch = module_of(task), batch_of(task)
    exact = task.loss(module, batch)[1]
    found = task.loss(module.bfloat16(), batch)[1]
    assert all(torch.allclose(found[k], exact[k], rtol=0.05) for k in exact)
    assert all(v.dtype == torch.float32 for v in found.values())


def test_evaluation_draws_nothing(task: AutoencoderTask) -> None:
    module, batch = module_of(task).eval(), batch_of(task)
    with torch.no_grad():
        one = task.eval_step(module, batch)
        two = task.eval_step(module, dataclasses.replace(batch, seeds=batch.seeds + 1))
    assert set(one) == {"voxel", "brain_mse"}
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_what_cannot_be_is_said(root: Path) -> None:
    index = load_index(str(root / "shards"))
    with pytest.raises(G3nError, match=r"channels \(8, 12\) must be divisible by norm_groups 8"):
        build(AutoencoderConfig, {"channels": [8, 12], "norm_groups": 8})
    with pytest.raises(G3nError, match="need axes divisible by 32"):
        AutoencoderTask(build(AutoencoderTaskConfig, {"net": {**NET, "channels": [8] * 6}}), index)


def test_it_is_evaluated_as_the_tokenizer_is(task: AutoencoderTask, tmp_path: Path) -> None:
    """MAE of the written volumes equals that of the plain module; a checkpoint of another task is refused."""
    module = module_of(task).eval()
    save_run(tmp_path / "run", "autoencoder", {"net": NET}, module, dict(task.artifact()))
    evaluate_reconstruction(str(tmp_path / "run"), task.index.url, tmp_path / "out", device="cpu")
    with open(tmp_path / "out/volumes.csv") as file:
        rows = {row["key"]: float(row["mae"]) for row in csv.DictReader(file)}
    batch = batch_of(task, "val")
    with torch.no_grad():
        made, target = task._outputs(module, batch)
    for i, key in enumerate(batch.keys):
        brain = target[i] != 0
        assert rows[key] == pytest.approx(float((made[i] - target[i])[brain].abs().mean()), rel=1e-4)
    state = tmp_path / "run/ckpt/step_00000001/state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "task": "mae"}))
    with pytest.raises(G3nError, match="task 'mae', expected task 'decoder' or 'autoencoder'"):
        evaluate_reconstruction(str(tmp_path / "run"), task.index.url, tmp_path / "out")
