"""MedicalNet's 3D ResNets (Chen et al. 2019, arXiv 1904.00625; https://github.com/Tencent/MedicalNet) in MONAI's implementation."""

from __future__ import annotations

from pathlib import Path

import torch
from monai.networks.nets import resnet10, resnet18, resnet34, resnet50
from monai.networks.nets.resnet import get_medicalnet_pretrained_resnet_args
from torch import Tensor
from torch.nn import functional as F

from g3n.encoders.contract import Encoder, Scans, arithmetic
from g3n.encoders.weights import load_reported, read_weights, under_prefix
from g3n.latent import freeze, normalize
from g3n.models.pretrained import fingerprint

NETS = {10: resnet10, 18: resnet18, 34: resnet34, 50: resnet50}
SIZE_DHW = (56, 448, 448)  # setting.py of the repository


def open_medicalnet(depth: int, path: Path, device: torch.device, size_DHW: tuple[int, int, int] = SIZE_DHW) -> Encoder:
    """Kind ``mean``, the average over space of the last stage: [512], of ResNet-50 [2048].

    As ``datasets/brains18.py`` of the repository: nearest-neighbor resize to 56 x 448 x 448 (axial slices first) without regard to
    spacing, then (v - mean) / std of the brain. It fills the background with noise of N(0, 1); here the background is that noise's
    mean, 0, so that features can be had again. MONAI's network has strides where theirs dilates in its last two stages; the
    weights are the same. Raises G3nError for another model's weights.
    """
    bias, shortcut = get_medicalnet_pretrained_resnet_args(depth)
    net = NETS[depth](
        spatial_dims=3, n_input_channels=1, feed_forward=False, conv1_t_stride=2, shortcut_type=shortcut,
        bias_downsample=bias,
    )  # fmt: skip
    what = f"MedicalNet's ResNet-{depth}"
    inside, outside = under_prefix(read_weights(path), "conv1.weight", what)
    keys = load_reported(net, inside, what, outside)
    freeze(net).to(device)

    @torch.no_grad()
    def features(scans: Scans) -> dict[str, Tensor]:
        v_BDHW = normalize(scans.volume_BXYZ, scans.mean_B, scans.rstd_B).permute(0, 3, 2, 1)
        with arithmetic(v_BDHW.device):
            return {"mean": net(F.interpolate(v_BDHW[:, None], size_DHW, mode="nearest-exact")).float()}

    about = {
        "intensity": "(v - mean) / std of the brain, background 0 (theirs: noise)",
        "size_dhw": size_DHW,
        "orientation": "slices S, rows P, columns L",
        "network": "MONAI: strides in the last two stages, where theirs dilates",
        "keys": keys,
    }
    return Encoder(f"medicalnet{depth}", fingerprint(net.state_dict()), None, about, features)
