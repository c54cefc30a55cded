"""BrainSegFounder (Cox et al. 2024, doi:10.1016/j.media.2024.103301; https://github.com/lab-smile/BrainSegFounder): the Swin
transformer of its SSLHead and SwinUNETR checkpoints (weights: https://huggingface.co/smilelab/BrainSegFounder).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from monai.networks.nets.swin_unetr import SwinTransformer
from torch import Tensor

from g3n.config import G3nError
from g3n.encoders.contract import WHOLE_BRAIN, Encoder, Scans, arithmetic, to_ras
from g3n.encoders.weights import load_reported, read_weights, shape_of, under_prefix
from g3n.latent import freeze, normalize
from g3n.models.pretrained import fingerprint

WHAT = "BrainSegFounder's Swin transformer"
_ANCHOR = "patch_embed.proj.weight"
_TABLE = "layers{}.0.blocks.0.attn.relative_position_bias_table"


def open_brainsegfounder(path: Path, device: torch.device) -> Encoder:
    """Kind ``mean``, the average over space of the last stage [16 x feature size: 768].

    Whole brain of 160 x 192 x 160 at 1 mm, axes to R, A, S as in pretraining (``pretrain/Data/Dataloader.py``), z-scores of non-zero voxels as
    in fine-tuning on several scanners (``Downstream/BraTS/utils.py``; pretraining scaled UK Biobank's raw units). The models were
    trained on crops of 96^3. One of several input channels gets the scan in each, as ``ATLAS_Stage2_duplicated_channels.py`` does.
    All sizes follow from the weights. Raises G3nError for another model's.
    """
    inside, outside = under_prefix(read_weights(path), _ANCHOR, WHAT)
    net, channels = _swin_of(inside)
    keys = load_reported(net, inside, WHAT, outside)
    freeze(net).to(device)

    @torch.no_grad()
    def features(scans: Scans) -> dict[str, Tensor]:
        z_BXYZ = to_ras(normalize(scans.volume_BXYZ, scans.mean_B, scans.rstd_B))
        with arithmetic(z_BXYZ.device):
            stages = net(z_BXYZ[:, None].expand(-1, channels, -1, -1, -1).contiguous())
        return {"mean": stages[4].float().flatten(2).mean(2)}

    about = {"intensity": "z-scores of the brain, background 0", "channels": channels, "orientation": "R, A, S"}
    return Encoder("brainsegfounder", fingerprint(net.state_dict()), WHOLE_BRAIN, {**about, "keys": keys}, features)


def _swin_of(weights: Mapping[str, Tensor]) -> tuple[SwinTransformer, int]:
    """The network whose sizes the weights tell, and its input channels."""
    width, channels, *patch = shape_of(weights, _ANCHOR, 5, WHAT)
    shapes = [shape_of(weights, _TABLE.format(stage), 2, WHAT) for stage in range(1, 5)]
    depths = [_count(weights, rf"layers{stage}\.0\.blocks\.(\d+)\.") for stage in range(1, 5)]
    window = (round(shapes[0][0] ** (1 / 3)) + 1) // 2
    try:
        net = SwinTransformer(
            in_chans=channels, embed_dim=width, window_size=(window,) * 3, patch_size=patch,
            depths=depths, num_heads=[heads for _, heads in shapes],
        )  # fmt: skip
    except (ValueError, ZeroDivisionError, RuntimeError) as error:
        raise G3nError(f"the weights are not {WHAT}: {' '.join(str(error).split())[:200]}") from error
    return net, channels


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for key in weights if (match := re.match(pattern, key))})
