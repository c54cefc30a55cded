"""Encoders of others give what their own code gives, ours what training saw, and wrong files are named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.networks.nets import SwinUNETR, ViT, resnet10, resnet50
from monai.networks.nets.masked_autoencoder_vit import MaskedAutoEncoderViT
from monai.transforms import Compose, NormalizeIntensity, Resize, ScaleIntensity
from safetensors.torch import save_file
from sklearn.decomposition import PCA
from torch import nn

from g3n.config import G3nError, write_yaml
from g3n.encoders.brainiac import open_brainiac
from g3n.encoders.brainsegfounder import open_brainsegfounder
from g3n.encoders.choose import open_encoder_of
from g3n.encoders.contract import Encoder, Scans
from g3n.encoders.medicalnet import open_medicalnet
from g3n.encoders.monai_mae import open_monai_mae
from g3n.encoders.tissue_volumes import open_tissue_volumes
from g3n.encoders.voxel_pca import fit_voxel_pca, open_voxel_pca, pooled
from g3n.latent import LatentSpace, normalize, open_encoder
from g3n.nifti import Grid, atlas_grid
from g3n.templates import ventricle_distance_mm
from tests import untrained

CPU = torch.device("cpu")


def scans(shape: tuple[int, int, int], count: int = 3, grid: Grid | None = None) -> Scans:
    """Brains with the background at their borders and no symmetry."""
    rng = np.random.default_rng(0)
    volume = rng.integers(200, 900, (count, *shape)).astype(np.int16)
    volume[:, :2], volume[:, :, :3], volume[:, :, :, -2:] = 0, 0, 0
    inside = [v[v != 0].astype(np.float64) for v in volume]
    mean, rstd = (
        torch.tensor(values, dtype=torch.float32)
        for values in ([v.mean() for v in inside], [1 / v.std() for v in inside])
    )
    return Scans(torch.from_numpy(volume), mean, rstd, grid or atlas_grid(shape, 4), ("T1",) * count)


def shaken(net: nn.Module) -> nn.Module:
    """Away from initial zeros and ones, so that nothing agrees by chance."""
    torch.manual_seed(1)
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    return net.eval()


def close(found: torch.Tensor, expected: torch.Tensor, most: float = 1e-4) -> None:
    assert found.shape == expected.shape
    assert float(expected.std()) > 1e-3
    assert float((found - expected).abs().max()) <= most * max(1.0, float(expected.abs().max()))


def alone(encoder: Encoder, batch: Scans) -> None:
    """A scan's features do not depend on the others of its batch."""
    whole = encoder.features(batch)
    one = Scans(batch.volume_BXYZ[1:2], batch.mean_B[1:2], batch.rstd_B[1:2], batch.grid, batch.modalities[1:2])
    for kind, values in encoder.features(one).items():
        assert values.dtype == torch.float32
        close(values, whole[kind][1:2], 1e-5)


MAE_SHAPE = (16, 24, 16)


@pytest.fixture(scope="module")
def monai_mae() -> MaskedAutoEncoderViT:
    net = MaskedAutoEncoderViT(
        in_channels=1, img_size=MAE_SHAPE, patch_size=8, hidden_size=48, mlp_dim=96, num_layers=3, num_heads=4,
        decoder_hidden_size=24, decoder_mlp_dim=48, decoder_num_layers=2, decoder_num_heads=2,
    )  # fmt: skip
    return shaken(net)


@pytest.mark.parametrize("layout", ["safetensors", "state_dict", "module"])
@torch.no_grad()
def test_a_monai_mae_gives_monais_own_features(monai_mae: MaskedAutoEncoderViT, layout: str, tmp_path: Path) -> None:
    state = {k: v.contiguous() for k, v in monai_mae.state_dict().items()}
    if layout == "safetensors":
        save_file(state, path := tmp_path / "w.safetensors")
    elif layout == "state_dict":
        torch.save({"epoch": 3, "state_dict": state}, path := tmp_path / "w.ckpt")
    else:
        torch.save({f"module.{k}": v for k, v in state.items()}, path := tmp_path / "w.pt")
    (tmp_path / "c.yaml").write_text(write_yaml({"volume_shape": MAE_SHAPE, "heads": 4, "spacing_mm": 4}))
    encoder = open_encoder_of(f"monai-mae:{path}", CPU, tmp_path / "c.yaml")
    batch = scans(MAE_SHAPE)
    z = normalize(batch.volume_BXYZ, batch.mean_B, batch.rstd_B)
    tokens = monai_mae.patch_embedding(z[:, None])
    expected = monai_mae.blocks(torch.cat([monai_mae.cls_token.expand(3, -1, -1), tokens], dim=1))
    found = encoder.features(batch)
    close(found["cls"], expected[:, 0])
    close(found["mean"], expected[:, 1:].mean(1))
    assert encoder.tokens is not None
    close(encoder.tokens(batch), expected[:, 1:])
    assert encoder.grid == atlas_grid(MAE_SHAPE, 4)
    assert encoder.about["keys"]["unused"] == sum(k.startswith(("decoder", "mask_token")) for k in state)
    alone(encoder, batch)


def test_a_mae_of_another_size_is_refused(monai_mae: MaskedAutoEncoderViT, tmp_path: Path) -> None:
    state = monai_mae.state_dict()
    cases = [
        ("volume_shape: [80, 80, 80]\nheads: 4\n", state, r"'positions' .* is \(1, 12, 48\), expected \(1, 1000, 48\)"),
        ("head: 4\n", state, r"unknown config key 'encoder.head'; did you mean 'heads'"),
        (
            f"volume_shape: {list(MAE_SHAPE)}\nheads: 4\n",
            {k: v for k, v in state.items() if k != "blocks.1.attn.qkv.weight"},
            r"of the 39 weights of Masked.* the file has 38; missing: 'blocks.1.attention.qkv.weight'",
        ),
    ]
    for text, weights, message in cases:
        torch.save(weights, tmp_path / "w.pt")
        (tmp_path / "c.yaml").write_text(text)
        with pytest.raises(G3nError, match=message):
            open_monai_mae(tmp_path / "w.pt", tmp_path / "c.yaml", CPU)


@torch.no_grad()
def test_medicalnet_gives_what_monai_gives(tmp_path: Path) -> None:
    """The file as published: ``state_dict`` with ``module.`` and the segmentation head."""
    net = resnet10(
        spatial_dims=3, n_input_channels=1, feed_forward=False, conv1_t_stride=2, shortcut_type="B", bias_downsample=False
    )  # fmt: skip
    shaken(net)
    head = {"module.conv_seg.0.weight": torch.zeros(3)}
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()} | head}, tmp_path / "r.pth")
    encoder = open_medicalnet(10, tmp_path / "r.pth", CPU, (14, 32, 28))
    assert encoder.about["keys"]["unused_first"] == ("conv_seg.0.weight",)
    batch = scans((28, 32, 28))
    z = normalize(batch.volume_BXYZ, batch.mean_B, batch.rstd_B)
    slices = z.permute(0, 3, 2, 1)[:, None, 1::2]  # every second axial slice, as nearest neighbors of half the size do
    close(encoder.features(batch)["mean"], net(slices))
    assert encoder.features(batch)["mean"].shape == (3, 512)
    alone(encoder, batch)
    with pytest.raises(G3nError, match=r"of the \d+ weights of MedicalNet's ResNet-18 the file has \d+; missing"):
        open_encoder_of(f"medicalnet18:{tmp_path / 'r.pth'}", CPU)


@torch.no_grad()
def test_brainiacs_vit_gives_its_own_feature(tmp_path: Path) -> None:
    """Transforms and network as in the repository (src/dataset.py, src/model.py), at a smaller size."""
    net = shaken(ViT(1, (32,) * 3, (16,) * 3, hidden_size=128, mlp_dim=256, num_layers=2, num_heads=2, save_attn=True))
    state = {f"backbone.{k}": v for k, v in net.state_dict().items()} | {"projector.weight": torch.zeros(2)}
    torch.save({"state_dict": state, "epoch": 1}, tmp_path / "BrainIAC.ckpt")
    encoder = open_brainiac(tmp_path / "BrainIAC.ckpt", CPU)
    batch = scans((40, 48, 40))
    steps = Compose([Resize((32,) * 3, mode="trilinear"), NormalizeIntensity(nonzero=True, channel_wise=True)])
    files = [v[None].flip(1, 2).float() for v in batch.volume_BXYZ]  # as a file in RAS has them
    expected = net(torch.stack([torch.as_tensor(steps(v)) for v in files]))[0]
    found = encoder.features(batch)
    close(found["first_token"], expected[:, 0])
    close(found["mean"], expected.mean(1))
    assert encoder.about["keys"]["unused"] == 1
    alone(encoder, batch)


@torch.no_grad()
def test_brainiacs_resnet_gives_its_own_feature(tmp_path: Path) -> None:
    """The earlier layout (BrainIAC/model.py, dataset2.py)."""
    net = resnet50(pretrained=False)
    net.conv1 = nn.Conv3d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
    net.fc = nn.Identity()
    shaken(net)
    torch.save({"state_dict": {f"backbone.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "BrainIAC.ckpt")
    encoder = open_brainiac(tmp_path / "BrainIAC.ckpt", CPU, side=24)
    batch = scans((40, 48, 40), 2)
    steps = Compose([Resize((24,) * 3), ScaleIntensity(0.0, 1.0)])
    files = [v[None].flip(1, 2).float() for v in batch.volume_BXYZ]
    close(encoder.features(batch)["mean"], net(torch.stack([torch.as_tensor(steps(v)) for v in files])))


@pytest.mark.parametrize("channels", [1, 2])
@torch.no_grad()
def test_brainsegfounder_gives_its_swins_last_stage(channels: int, tmp_path: Path) -> None:
    net = SwinUNETR(in_channels=channels, out_channels=1, feature_size=12, depths=(2, 2, 4, 2))
    shaken(net)
    state = {f"module.{k}": v for k, v in net.state_dict().items()}
    torch.save({"state_dict": state, "optimizer": {}, "global_step": 7}, tmp_path / "b.pt")
    encoder = open_brainsegfounder(tmp_path / "b.pt", CPU)
    batch = scans((32, 64, 32), 2)
    z = normalize(batch.volume_BXYZ, batch.mean_B, batch.rstd_B).flip(1, 2)
    expected = net.swinViT(torch.stack([z] * channels, 1))[4].mean((2, 3, 4))
    close(encoder.features(batch)["mean"], expected)
    assert encoder.about["keys"]["unused"] == len([k for k in state if "swinViT" not in k])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained.chain(tmp_path_factory.mktemp("chain"), 2, 1) / "runs"


def test_our_runs_give_tokens_as_training_sees_them(runs: Path) -> None:
    batch = scans((16, 16, 16))
    inputs = (batch.volume_BXYZ, batch.mean_B, batch.rstd_B)
    z = open_encoder(runs / "mae")[0](*inputs, cls=True)
    mae = open_encoder_of(str(runs / "mae"), CPU)
    found = mae.features(batch)
    close(found["mean"], z[:, 1:].mean(1), 1e-6)
    close(found["cls"], z[:, 0], 1e-6)
    raw = LatentSpace.open(runs / "decoder").project(*inputs)
    decoder = open_encoder_of(str(runs / "decoder"), CPU, flat=True)
    found = decoder.features(batch)
    close(found["latent"], raw.mean(1), 1e-6)
    close(found["latent_tokens"], raw.reshape(3, 8 * 4), 1e-6)
    close(found["cls"], z[:, 0], 1e-6)
    assert list(open_encoder_of(str(runs / "decoder"), CPU).features(batch)) == ["mean", "cls", "latent"]
    assert mae.fingerprint != decoder.fingerprint
    assert mae.grid is not None
    assert mae.grid.shape == (16, 16, 16)
    alone(decoder, batch)


def test_pca_scores_are_scikit_learns(tmp_path: Path) -> None:
    grid = atlas_grid((80, 48, 40), 4)
    train, other = scans((80, 48, 40), 12, grid), scans((80, 48, 40), 3, grid)
    x = pooled(train).numpy()
    assert x.shape == (12, 40 * 48 * 40)
    z = normalize(train.volume_BXYZ, train.mean_B, train.rstd_B).numpy()
    np.testing.assert_allclose(x, z.reshape(12, 40, 2, 48, 40).mean(2).reshape(12, -1), atol=1e-6)
    fit_voxel_pca(x, grid, {"shards": "ab"}, tmp_path / "pca.safetensors")
    encoder = open_encoder_of(f"voxel-pca:{tmp_path / 'pca.safetensors'}", CPU)
    expected = PCA(11, svd_solver="full").fit(x.astype(np.float64)).transform(pooled(other).numpy())
    found = encoder.features(other)["pca"].numpy()
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=2e-2 * np.abs(expected).max())
    assert encoder.grid == grid
    assert encoder.about["variance_share"] == pytest.approx(1, abs=1e-3)  # 11 components of 12 scans
    with pytest.raises(G3nError, match="at least 3"):
        fit_voxel_pca(x[:2], grid, {}, tmp_path / "pca.safetensors")
    save_file({"mean": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(G3nError, match="fit it with --encoder voxel-pca"):
        open_voxel_pca(tmp_path / "other.safetensors", CPU)


def test_tissue_volumes_are_counted() -> None:
    """A made brain whose every voxel is white matter but a block of CSF at the ventricles."""
    grid = atlas_grid((40, 48, 40), 4)
    volume = np.zeros((2, 40, 48, 40), np.float32)
    volume[0, 8:32, 8:40, 8:32] = 500 + np.random.default_rng(0).normal(0, 1, (24, 32, 24))
    csf = (ventricle_distance_mm(grid) <= 0) & (volume[0] > 0)
    volume[0][csf] = 50
    batch = Scans(torch.from_numpy(volume), torch.ones(2), torch.ones(2), grid, ("T1", ""))
    found = open_tissue_volumes().features(batch)["volumes"]
    voxel_ml = 0.064
    assert found[0, 3] == pytest.approx(24 * 32 * 24 * voxel_ml)
    assert found[0, 0] == pytest.approx(csf.sum() * voxel_ml, rel=0.01)
    assert float(found[0, 0] + found[0, 1]) == pytest.approx(float(found[0, 3]), rel=1e-3)
    assert bool(found[1].isnan().all())  # no brain


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("medicalnet51:x.pth", "did you mean 'medicalnet50'"),
        ("brainiac", "needs its file; write brainiac:FILE"),
        ("voxel-pca", "needs its file"),
        ("runs/none", "no run folder .* expected a run folder, monai-mae:FILE"),
        ("brainiac:none.ckpt", "weights 'none.ckpt' cannot be read"),
    ],
)
def test_wrong_names_are_explained(text: str, message: str) -> None:
    with pytest.raises(G3nError, match=message):
        open_encoder_of(text, CPU)


def test_options_of_other_encoders_and_code_in_files_are_refused(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(G3nError, match="--encoder-config is for monai-mae"):
        open_encoder_of(str(runs / "mae"), CPU, tmp_path / "c.yaml")
    with pytest.raises(G3nError, match="--all-tokens is for a run of the decoder task"):
        open_encoder_of("tissue-volumes", CPU, flat=True)
    with pytest.raises(G3nError, match="is a checkpoint of task 'dit'"):
        open_encoder_of(str(runs / "dit"), CPU)
    torch.save({"state_dict": {"w": torch.zeros(2)}, "hyper": Path("x")}, tmp_path / "code.ckpt")
    with pytest.raises(G3nError, match="or holds more than tensors"):
        open_encoder_of(f"brainiac:{tmp_path / 'code.ckpt'}", CPU)
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(G3nError, match="no named tensors"):
        open_encoder_of(f"brainiac:{tmp_path / 'list.pt'}", CPU)
