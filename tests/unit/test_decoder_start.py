"""Before its first step a decoder with the linear path already draws the best linear picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from g3n import ops
from g3n.config import build
from g3n.models.decoder import TokenizerConfig, with_neighbors
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


def with_places(task: DecoderTask, rank: int, flip: float = 0.0, neighbors: bool = False) -> DecoderTask:
    config = replace(task.config, net=replace(task.config.net, place_rank=rank, place_neighbors=neighbors), flip=flip)
    return DecoderTask(config, task.index)


def batch_of(task: DecoderTask, split: str) -> Batch:
    count = sum(len(shard.samples) for shard in task.index.shards(split))
    return next(iter(eval_batches(task.index, None, "volume", split, count, 0, 1, 0)))


@torch.no_grad()
def features_and_patches(task: DecoderTask, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    scan = tuple(batch_of(task, split).tensors[k] for k in ("volume", "mean", "rstd"))
    return task.encoder(*scan), ops.patchify3d(scan[0], 8, None, scan[1], scan[2])


@torch.no_grad()
def test_it_starts_as_ridge_regression(task: DecoderTask) -> None:
    """All 48 channels kept: scikit-learn's ridge of patches on latents around each place's mean, with the same penalty."""
    features, patches = features_and_patches(task, "train")
    torch.manual_seed(0)
    net = task.build().eval()
    z = (net.projection(features) / net.input_scale).double()
    z_mean, x_mean = z.mean(0), patches.double().mean(0)
    flat, x = (z - z_mean).flatten(0, 1), (patches - x_mean).flatten(0, 1)
    ridge = Ridge(alpha=float(1e-3 * (flat.T @ flat).diagonal().mean()), fit_intercept=False).fit(
        flat.numpy(), x.numpy()
    )
    new, _ = features_and_patches(task, "val")
    new_z = (net.projection(new) / net.input_scale).double()
    fitted = torch.from_numpy(ridge.predict((new_z - z_mean).flatten(0, 1).numpy())).view(len(new), 8, 512)
    expected = ops.unpatchify3d((fitted + x_mean).float(), 8, (2, 2, 2))
    made = net(new)[:, 0]
    assert float((made - expected).abs().max()) < 1e-3 * float(expected.abs().max())


@torch.no_grad()
def test_the_mask_starts_as_ridge_regression_too(task: DecoderTask) -> None:
    """With a mask head: scikit-learn's ridge of -3 and 3 instead of patches."""
    config = replace(task.config, net=replace(task.config.net, mask_head=True))
    torch.manual_seed(0)
    net = DecoderTask(config, task.index).build().eval()
    features, patches = features_and_patches(task, "train")
    z, logits = net.projection(features).flatten(0, 1) / net.input_scale, 6 * ((patches != 0).float() - 0.5)
    flat = (z - z.view(-1, 8, 48).mean(0).repeat(len(features), 1)).double().numpy()
    ridge = Ridge(alpha=1e-3 * float((flat**2).sum(0).mean()), fit_intercept=False)
    ridge.fit(flat, (logits - logits.mean(0)).flatten(0, 1).double().numpy())
    expected = torch.from_numpy(ridge.predict(flat)).view_as(logits) + logits.mean(0)
    made = ops.patchify3d(net(features)[:, 1].contiguous(), 8)
    assert float((made - expected).abs().max()) < 1e-3 * 3


@torch.no_grad()
def test_it_starts_better_than_the_mean_volume(task: DecoderTask) -> None:
    features, patches = features_and_patches(task, "train")
    torch.manual_seed(0)
    made = ops.patchify3d(task.build().eval()(features)[:, 0], 8)
    assert float((made - patches).square().mean()) < 0.9 * float((patches - patches.mean(0)).square().mean())


def test_neighbors_are_the_tokens_on_six_sides() -> None:
    """Against a loop over the grid."""
    shape = (2, 3, 4)
    z = torch.randn(2, 24, 5, generator=torch.Generator().manual_seed(0))
    found = with_neighbors(z, shape).view(2, *shape, 7, 5)
    grid = z.view(2, *shape, 5)
    for place in np.ndindex(*shape):
        assert torch.equal(found[:, *place, 0], grid[:, *place])
        for axis in range(3):
            for side, step in enumerate((-1, 1)):
                other = list(place)
                other[axis] += step
                inside = 0 <= other[axis] < shape[axis]
                expected = grid[:, *other] if inside else torch.zeros(2, 5)
                assert torch.equal(found[:, *place, 1 + 2 * axis + side], expected)


@pytest.mark.parametrize("neighbors", [False, True])
@torch.no_grad()
def test_each_place_starts_as_its_own_ridge_regression(task: DecoderTask, neighbors: bool) -> None:
    """All directions of a patch kept: scikit-learn's ridge of what the shared image leaves, at each place alone."""
    features, patches = features_and_patches(task, "train")
    torch.manual_seed(0)
    shared, net = task.build().eval(), with_places(task, 512, neighbors=neighbors).build().eval()
    z, new_z = (net.projection(f) / net.input_scale for f in (features, features_and_patches(task, "val")[0]))
    left = patches - (shared.linear.to_patch(z) + shared.linear.mean)
    expected = shared.linear.to_patch(new_z) + shared.linear.mean
    made = ops.patchify3d(net.linear(new_z)[:, 0], 8)
    if neighbors:
        z, new_z = (with_neighbors(a, net.tokens) for a in (z, new_z))
    for n in range(8):
        z_n = (z[:, n] - z[:, n].mean(0)).double().numpy()
        ridge = Ridge(alpha=1e-2 * float((z_n**2).sum(0).mean()), fit_intercept=False)
        ridge.fit(z_n, (left[:, n] - left[:, n].mean(0)).double().numpy())
        added = ridge.predict((new_z[:, n] - z[:, n].mean(0)).double().numpy())
        expected[:, n] += torch.from_numpy(added).float() + left[:, n].mean(0)
    assert float((made - expected).abs().max()) < 1e-3 * float(expected.abs().max())


@torch.no_grad()
def test_fewer_directions_hold_what_matters_most(task: DecoderTask) -> None:
    """The image of rank R is the whole one put on R directions, and no other R would leave less of it."""
    features, _ = features_and_patches(task, "train")
    torch.manual_seed(0)
    net = with_places(task, 512).build().eval()
    z = net.projection(features) / net.input_scale
    whole = torch.einsum("bnc,ncr->bnr", z - z.mean(0), net.linear.place_NCR) @ net.linear.basis_RP
    few = with_places(task, 4).build().eval().linear
    found = torch.einsum("bnc,ncr->bnr", z - z.mean(0), few.place_NCR) @ few.basis_RP
    left = float((whole - found).square().sum())
    values = np.linalg.svd(whole.flatten(0, 1).double().numpy(), compute_uv=False)
    assert left == pytest.approx(float((values[4:] ** 2).sum()), rel=1e-3)


def test_neighbors_need_places() -> None:
    with pytest.raises(ValueError, match="place_neighbors needs place_rank"):
        TokenizerConfig(linear_path=True, place_neighbors=True)


def test_mirrored_scans_are_seen_at_the_start_too(task: DecoderTask) -> None:
    plain, both = with_places(task, 4)._seen(), with_places(task, 4, flip=0.5)._seen()
    assert len(both[0]) == 2 * len(plain[0])
    pairs = ops.unpatchify3d(both[1].float(), 8, (2, 2, 2))
    first = ops.unpatchify3d(plain[1].float(), 8, (2, 2, 2))
    turned = [x for x in pairs if any(torch.equal(x, y.flip(0)) for y in first)]
    assert len(turned) == len(first)
