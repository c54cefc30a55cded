"""BrainIAC (Tak et al., doi:10.1038/s41593-026-02202-6, medRxiv 2024.12.02.24317992), both layouts its authors published: a SimCLR ViT-B
of 96^3 (2025, ``src/model.py`` of https://github.com/AIM-KannLab/BrainIAC) and, before it, a SimCLR ResNet-50 of 128^3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from monai.networks.nets import ViT, resnet50
from torch import Tensor, nn
from torch.nn import functional as F

from g3n.config import G3nError
from g3n.encoders.contract import Encoder, Scans, arithmetic, to_ras
from g3n.encoders.weights import load_reported, read_weights, shape_of, under_prefix
from g3n.latent import freeze, normalize
from g3n.models.pretrained import fingerprint

RESNET_SIDE = 128
_HEAD_WIDTH = 64  # of ViT-B
_PATCHES = "patch_embedding.patch_embeddings.weight"
_ORIENTATION = "R, A, S (theirs: the file's own)"


def open_brainiac(path: Path, device: torch.device, side: int = RESNET_SIDE) -> Encoder:
    """The layout is seen by the weights' names. Both resize the whole volume to a cube, here the atlas box; ``side`` is the ResNet's.

    ViT: kinds ``first_token`` [768], which is their feature (``features[0][:, 0]``; MONAI's ViT has no CLS token without a
    classifier, so it is that of the first patch), and ``mean`` over all tokens [768]. Trilinear resize, z-scores of
    non-zero voxels (``src/dataset.py``). ResNet: kind ``mean`` [2048], resize by area, then 0 to 1 (``dataset2.py``).
    Raises G3nError for another model's weights.
    """
    weights = read_weights(path)
    vit = any(key.endswith(_PATCHES) for key in weights)
    return _open_vit(weights, device) if vit else _open_resnet(weights, device, side)


def _open_vit(weights: Mapping[str, Tensor], device: torch.device) -> Encoder:
    what = "BrainIAC's ViT"
    inside, outside = under_prefix(weights, _PATCHES, what)
    net, side = _vit_of(inside, what)
    keys = load_reported(net, inside, what, outside)
    freeze(net).to(device)

    @torch.no_grad()
    def tokens(scans: Scans) -> Tensor:
        v_BXYZ = F.interpolate(to_ras(scans.volume_BXYZ.float())[:, None], (side,) * 3, mode="trilinear")[:, 0]
        inside_B = (v_BXYZ != 0).flatten(1).sum(1).clamp(min=1)
        mean_B = v_BXYZ.flatten(1).sum(1) / inside_B
        square_B = torch.where(v_BXYZ != 0, (v_BXYZ - mean_B.view(-1, 1, 1, 1)) ** 2, 0.0).flatten(1).sum(1) / inside_B
        z_BXYZ = normalize(v_BXYZ, mean_B, square_B.clamp(min=1e-12).rsqrt())
        with arithmetic(z_BXYZ.device):
            return net(z_BXYZ[:, None])[0].float()

    def features(scans: Scans) -> dict[str, Tensor]:
        z_BND = tokens(scans)
        return {"first_token": z_BND[:, 0], "mean": z_BND.mean(1)}

    about = {"intensity": "z-scores of non-zero voxels", "side": side, "orientation": _ORIENTATION, "keys": keys}
    return Encoder("brainiac-vit", fingerprint(net.state_dict()), None, about, features, tokens)


def _vit_of(weights: Mapping[str, Tensor], what: str) -> tuple[ViT, int]:
    """The network whose sizes the weights tell, and the side of its cube."""
    width, _, *patch = shape_of(weights, _PATCHES, 5, what)
    mlp, _ = shape_of(weights, "blocks.0.mlp.linear1.weight", 2, what)
    _, tokens, _ = shape_of(weights, "patch_embedding.position_embeddings", 3, what)
    depth = len({key.split(".")[1] for key in weights if re.match(r"blocks\.\d+\.mlp\.linear1\.weight$", key)})
    side = round(tokens ** (1 / 3)) * patch[0]
    if width % _HEAD_WIDTH or len(set(patch)) > 1:
        raise G3nError(f"weight '{_PATCHES}' is {tuple(weights[_PATCHES].shape)}, of {what} (768, 1, 16, 16, 16)")
    try:
        net = ViT(
            in_channels=1, img_size=(side,) * 3, patch_size=patch, hidden_size=width, mlp_dim=mlp,
            num_layers=depth, num_heads=width // _HEAD_WIDTH,
        )  # fmt: skip
    except ValueError as error:
        raise G3nError(f"the weights are not those of {what}: {' '.join(str(error).split())[:200]}") from error
    return net, side


def _open_resnet(weights: Mapping[str, Tensor], device: torch.device, side: int) -> Encoder:
    what = "BrainIAC's ResNet-50"
    inside, outside = under_prefix(weights, "conv1.weight", what)
    net = resnet50(spatial_dims=3, n_input_channels=1, conv1_t_stride=2, feed_forward=False)
    net.fc = nn.Identity()  # type: ignore[assignment]
    keys = load_reported(net, inside, what, outside)
    freeze(net).to(device)

    @torch.no_grad()
    def features(scans: Scans) -> dict[str, Tensor]:
        v_BXYZ = F.interpolate(to_ras(scans.volume_BXYZ.float())[:, None], (side,) * 3, mode="area")
        low_B, high_B = (end.view(-1, 1, 1, 1, 1) for end in (v_BXYZ.flatten(1).amin(1), v_BXYZ.flatten(1).amax(1)))
        with arithmetic(v_BXYZ.device):
            return {"mean": net((v_BXYZ - low_B) / (high_B - low_B).clamp(min=1e-12)).float()}

    about = {"intensity": "0 to 1", "side": side, "orientation": _ORIENTATION, "keys": keys}
    return Encoder("brainiac-resnet50", fingerprint(net.state_dict()), None, about, features)
