"""Our own encoders: a run folder of task mae or decoder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from g3n.config import G3nError, build
from g3n.encoders.contract import Encoder, Scans, arithmetic
from g3n.latent import LatentSpace, open_encoder
from g3n.models import mae
from g3n.models.pretrained import open_run
from g3n.nifti import Grid

INTENSITY = "(v - mean) / std of the brain, background 0"


def open_ours(run_path: Path, device: torch.device, flat: bool = False) -> Encoder:
    """Kinds ``mean`` (mean over the N tokens, [D]) and ``cls`` [D]; of a decoder run also ``latent``, the mean over tokens of
    z' = zP [C]. ``flat`` adds ``latent_tokens``, all of z' [N * C], token after token in the order of ``patchify3d``.

    ``latent`` is a linear image of ``mean`` and knows no more than it; where something is, only ``latent_tokens`` can say.
    Raises G3nError for a folder of another task and as ``LatentSpace.open`` does.
    """
    run = open_run(run_path, "mae", "decoder")
    grid = build(Grid, run.artifact["grid"], "grid")
    if run.task == "mae" and flat:
        raise G3nError(
            f"--all-tokens needs a run of the decoder task, but '{run_path}' is one of task mae; leave it out"
        )
    if run.task == "mae":
        encoder, _, _, fingerprint = open_encoder(run_path)
        return from_vit("g3n-mae", encoder.to(device), fingerprint, grid, {"step": run.step})
    space = LatentSpace.open(run_path, device=device)
    whole = from_vit("g3n-decoder", space.encoder, space.tokenizer_fingerprint, grid, {"step": run.step})

    @torch.no_grad()
    def features(scans: Scans) -> dict[str, Tensor]:
        z_BTD = _with_cls(space.encoder, scans)
        latent_BNC = space.tokenizer.projection(z_BTD[:, 1:])
        more = {"latent_tokens": latent_BNC.flatten(1)} if flat else {}
        return {**_pooled(z_BTD), "latent": latent_BNC.mean(1), **more}

    return Encoder(whole.name, whole.fingerprint, grid, whole.about, features, whole.tokens)


def from_vit(name: str, encoder: mae.Encoder, fingerprint: str, grid: Grid, about: dict[str, object]) -> Encoder:
    """Mean token and CLS of a MAE's encoder."""

    @torch.no_grad()
    def features(scans: Scans) -> dict[str, Tensor]:
        return _pooled(_with_cls(encoder, scans))

    @torch.no_grad()
    def tokens(scans: Scans) -> Tensor:
        return _with_cls(encoder, scans)[:, 1:]

    return Encoder(name, fingerprint, grid, {"intensity": INTENSITY, **about}, features, tokens)


def _with_cls(encoder: mae.Encoder, scans: Scans) -> Tensor:
    """float32 [B, 1 + N, D]."""
    with arithmetic(scans.volume_BXYZ.device):
        return encoder(scans.volume_BXYZ, scans.mean_B, scans.rstd_B, cls=True).float()


def _pooled(z_BTD: Tensor) -> dict[str, Tensor]:
    return {"mean": z_BTD[:, 1:].mean(1), "cls": z_BTD[:, 0]}
