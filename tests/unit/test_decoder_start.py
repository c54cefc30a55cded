"""Before its first step a decoder with the linear path already draws the best linear picture."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from sklearn.linear_model import Ridge

from g3n import ops
from g3n.config import build
from g3n.models.mae import MAE, MAEConfig
from g3n.stream.index import load_index
from g3n.stream.lanes import eval_batches
from g3n.stream.samples import Batch
from g3n.tasks.decoder import DecoderTask, DecoderTaskConfig
from tests import nano
from tests.unit.test_encode import save_run

NET = {"volume_shape": list(nano.SHAPE), "patch": 8, "width": 48, "depth": 1, "heads": 2, "mlp": 48}
NET |= {"decoder_width": 24, "decoder_depth": 1, "decoder_heads": 2, "decoder_mlp": 24}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> DecoderTask:
    root: Path = tmp_path_factory.mktemp("start")
    nano.shards(root / "shards")
    index = load_index(str(root / "shards"))
    torch.manual_seed(0)
    save_run(root / "mae", "mae", {"net": NET}, MAE(build(MAEConfig, NET)), {"shards": index.fingerprint})
    tokenizer = {"latent_channels": 48, "decoder_channels": [8, 8, 8], "linear_path": True}
    tree = {"encoder": str(root / "mae"), "net": tokenizer, "init_volumes": 100}
    return DecoderTask(build(DecoderTaskConfig, tree), index)


def batch_of(task: DecoderTask, split: str) -> Batch:
    count = sum(len(shard.samples) for shard in task.index.shards(split))
    return next(iter(eval_batches(task.index, None, "volume", split, count, 0, 1, 0)))


@torch.no_grad()
def features_and_patches(task: DecoderTask, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    scan = tuple(batch_of(task, split).tensors[k] for k in ("volume", "mean", "rstd"))
    return task.encoder(*scan), ops.patchify3d(scan[0], 8, None, scan[1], scan[2])


@torch.no_grad()
def test_it_starts_as_ridge_regression(task: DecoderTask) -> None:
    """All 48 channels kept: scikit-learn's ridge around each place's mean, with the same penalty."""
    features, patches = (x.double() for x in features_and_patches(task, "train"))
    f_mean, x_mean = features.mean(0), patches.mean(0)
    f, x = (features - f_mean).flatten(0, 1), (patches - x_mean).flatten(0, 1)
    ridge = Ridge(alpha=float(1e-3 * (f.T @ f).diagonal().mean()), fit_intercept=False).fit(f.numpy(), x.numpy())
    new, _ = features_and_patches(task, "val")
    fitted = torch.from_numpy(ridge.predict((new.double() - f_mean).flatten(0, 1).numpy())).view(len(new), 8, 512)
    expected = ops.unpatchify3d((fitted + x_mean).float(), 8, (2, 2, 2))
    torch.manual_seed(0)
    made = task.build().eval()(new)[:, 0]
    assert float((made - expected).abs().max()) < 1e-2 * float(expected.abs().max())


@torch.no_grad()
def test_it_starts_better_than_the_mean_volume(task: DecoderTask) -> None:
    features, patches = features_and_patches(task, "train")
    torch.manual_seed(0)
    made = ops.patchify3d(task.build().eval()(features)[:, 0], 8)
    assert float((made - patches).square().mean()) < 0.9 * float((patches - patches.mean(0)).square().mean())
