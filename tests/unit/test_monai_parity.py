"""A MONAI MaskedAutoEncoderViT's weights in our MAE: the same features, the same reconstruction."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets.masked_autoencoder_vit import MaskedAutoEncoderViT
from torch import Tensor

from g3n.config import G3nError
from g3n.models.mae import MAE, MAEConfig
from g3n.models.pretrained import from_monai, load_weights

SHAPE, PATCH = (32, 48, 16), 8
N = 4 * 6 * 2


@pytest.fixture(scope="module")
def theirs() -> MaskedAutoEncoderViT:
    torch.manual_seed(0)
    net = MaskedAutoEncoderViT(
        in_channels=1, img_size=SHAPE, patch_size=PATCH, hidden_size=48, mlp_dim=96, num_layers=3, num_heads=4,
        decoder_hidden_size=24, decoder_mlp_dim=48, decoder_num_layers=2, decoder_num_heads=2, masking_ratio=0.7,
    )  # fmt: skip
    for parameter in net.parameters():  # away from initial zeros and ones, so that nothing agrees by chance
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return net.eval()


@pytest.fixture(scope="module")
def ours(theirs: MaskedAutoEncoderViT) -> MAE:
    config = MAEConfig(
        volume_shape=SHAPE, patch=PATCH, width=48, depth=3, heads=4, mlp=96,
        decoder_width=24, decoder_depth=2, decoder_heads=2, decoder_mlp=48,
    )  # fmt: skip
    net = MAE(config)
    load_weights(net, {**net.state_dict(), **from_monai(theirs.state_dict(), 3, 2)})
    return net.eval()


def arguments(volume: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What leaves a volume without zeros as it is."""
    return volume, torch.zeros(len(volume)), torch.ones(len(volume))


def test_every_weight_is_used(theirs: MaskedAutoEncoderViT, ours: MAE) -> None:
    taken = from_monai(theirs.state_dict(), 3, 2)
    assert set(dict(ours.named_parameters())) <= set(taken)


@torch.no_grad()
def test_reconstruction_with_the_same_mask(theirs: MaskedAutoEncoderViT, ours: MAE) -> None:
    volume = torch.randn(2, *SHAPE)
    torch.manual_seed(7)
    expected, mask = theirs(volume[:, None])
    torch.manual_seed(7)
    visible = torch.multinomial(torch.ones(2, N), int(0.3 * N), replacement=False)
    assert int((mask == 0).sum()) == visible.numel()
    assert all((mask[b, visible[b]] == 0).all() for b in range(2))
    found = ours(*arguments(volume), visible)
    assert float((found - expected).abs().max()) <= 1e-4
    assert float(expected.abs().max()) > 0.1


@torch.no_grad()
def test_encoder_of_the_whole_volume(theirs: MaskedAutoEncoderViT, ours: MAE) -> None:
    volume = torch.randn(2, *SHAPE)
    tokens = theirs.patch_embedding(volume[:, None])
    expected = theirs.blocks(torch.cat([theirs.cls_token.expand(2, -1, -1), tokens], dim=1))
    found = ours.encoder(*arguments(volume), cls=True)
    assert float((found - expected).abs().max()) <= 1e-4


def test_a_foreign_key_is_named(theirs: MaskedAutoEncoderViT) -> None:
    with pytest.raises(G3nError, match=r"key 'blocks.9.norm1.weight', which no part of the MAE answers to"):
        from_monai({**theirs.state_dict(), "blocks.9.norm1.weight": torch.zeros(48)}, 3, 2)
