"""LatentSpace: the one owner of encoder, projection P, latent statistics and decoder. No one else scales a latent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from g3n.config import G3nError, build
from g3n.models.autoencoder import Autoencoder, AutoencoderConfig
from g3n.models.decoder import TRAINING_ONLY, Tokenizer, TokenizerConfig, to_volume
from g3n.models.mae import Encoder, MAEConfig
from g3n.models.pretrained import Run, fingerprint, load_weights, open_run


def normalize(volume_BXYZ: Tensor, mean_B: Tensor, rstd_B: Tensor) -> Tensor:
    """(v - mean) * rstd over non-zero voxels, background 0; float32 [B, X, Y, Z]. What patchify3d does to a patch."""
    v = volume_BXYZ.float()
    return torch.where(v == 0, 0.0, (v - mean_B.view(-1, 1, 1, 1)) * rstd_B.view(-1, 1, 1, 1))


def open_encoder(run_path: str | Path) -> tuple[Encoder, MAEConfig, Run, str]:
    """The frozen encoder of a MAE run, its config, the run, and the fingerprint of its weights."""
    run = open_run(run_path, "mae")
    config = build(MAEConfig, run.config["model"]["net"], "model.net")
    encoder = Encoder(config)
    load_weights(encoder, run.weights, "encoder.", source=str(run.path))
    return freeze(encoder), config, run, fingerprint(encoder.state_dict())


def freeze(module: Any) -> Any:
    """Evaluation mode without gradients."""
    return module.eval().requires_grad_(False)


def pick_device(name: str | None) -> torch.device:
    """The device called ``name``; None is the GPU where there is one. Raises G3nError where it cannot be used."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise G3nError(f"device '{name}' cannot be used: {str(error).splitlines()[0]}; give cpu or cuda") from error
    return device


class LatentSpace(nn.Module):
    """Volumes <-> standardized latents [B, N, C].

    Statistics are of the train split: a mean for each token position and a scale for each channel.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, encoder: Encoder, tokenizer: Tokenizer, artifact: Mapping[str, Any]) -> None:
        super().__init__()
        self.encoder = encoder
        self.tokenizer = tokenizer
        n_tokens = encoder.positions.shape[1]
        self.register_buffer("mean", torch.zeros(n_tokens, tokenizer.projection.out_features))
        self.register_buffer("scale", torch.ones(tokenizer.projection.out_features))
        self.volumes_fingerprint: str = artifact["shards"]
        self.volumes = frozenset([artifact["shards"], *artifact.get("parts", ())])  # and of each folder of a mix
        self.tokenizer_fingerprint = fingerprint(
            {**{f"encoder.{k}": v for k, v in encoder.state_dict().items()}, **tokenizer.state_dict()}
        )

    @staticmethod
    def open(
        tokenizer_run: str | Path,
        statistics: Mapping[str, Tensor] | None = None,
        device: torch.device | str = "cpu",
    ) -> LatentSpace:
        """The space of a finished decoder run; ``statistics`` holds ``mean`` [N, C] and ``scale`` [C] (default 0 and 1).

        Raises G3nError for a missing or foreign run, or an encoder other than the one the tokenizer was trained on.
        """
        run = open_run(tokenizer_run, "decoder")
        encoder_run = run.config["model"]["encoder"]
        encoder, mae, _, print_ = open_encoder(encoder_run)
        if print_ != run.artifact["encoder"]:
            raise G3nError(
                f"encoder '{encoder_run}' has fingerprint {print_}, but '{tokenizer_run}' was trained on "
                f"{run.artifact['encoder']}; train the decoder again or restore that encoder"
            )
        config = build(TokenizerConfig, run.config["model"]["net"], "model.net")
        tokenizer = Tokenizer(config, mae.width, mae.tokens, mae.patch)
        weights = {name: w for name, w in run.weights.items() if not name.startswith(TRAINING_ONLY)}
        load_weights(tokenizer, weights, source=str(run.path))
        space = LatentSpace(encoder, freeze(tokenizer), run.artifact)
        if statistics is not None:
            space.set_statistics(statistics["mean"], statistics["scale"])
        return space.to(device)

    def set_statistics(self, mean_NC: Tensor, scale_C: Tensor) -> None:
        """Raises G3nError where the shapes are not those of this tokenizer or a scale is not positive."""
        if mean_NC.shape != self.mean.shape or scale_C.shape != self.scale.shape or not bool((scale_C > 0).all()):
            raise G3nError(
                f"latent statistics are {tuple(mean_NC.shape)} and {tuple(scale_C.shape)}, expected "
                f"{tuple(self.mean.shape)} and positive {tuple(self.scale.shape)}; run data_prep encode again"
            )
        self.mean.copy_(mean_NC)
        self.scale.copy_(scale_C)

    @torch.no_grad()
    def features(self, volume_BXYZ: Tensor, mean_B: Tensor, rstd_B: Tensor) -> Tensor:
        """Frozen encoder tokens float32 [B, N, D]; bf16 arithmetic on a GPU."""
        with torch.autocast(volume_BXYZ.device.type, torch.bfloat16, enabled=volume_BXYZ.is_cuda):
            return self.encoder(volume_BXYZ, mean_B, rstd_B).float()

    @torch.no_grad()
    def project(self, volume_BXYZ: Tensor, mean_B: Tensor, rstd_B: Tensor) -> Tensor:
        """Raw projected tokens z' = zP, float32 [B, N, C]."""
        return self.tokenizer.projection(self.features(volume_BXYZ, mean_B, rstd_B))

    def encode(self, volume_BXYZ: Tensor, mean_B: Tensor, rstd_B: Tensor) -> Tensor:
        """Standardized latents float32 [B, N, C] of volumes in stored units."""
        return self.standardize(self.project(volume_BXYZ, mean_B, rstd_B))

    def standardize(self, raw_BNC: Tensor) -> Tensor:
        return (raw_BNC - self.mean) / self.scale

    def unstandardize(self, latent_BNC: Tensor) -> Tensor:
        return latent_BNC * self.scale + self.mean

    @torch.no_grad()
    def decode(self, latent_BNC: Tensor) -> Tensor:
        """Standardized latents -> z-scored volumes float32 [B, X, Y, Z], background 0 where a mask head knows it."""
        return to_volume(self.tokenizer.decode(self.unstandardize(latent_BNC)))


class AutoencoderSpace(nn.Module):
    """The baseline's latents [B, C, x, y, z], as far as reconstruction needs them: the posterior's mean and back."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.net = Autoencoder(build(AutoencoderConfig, run.config["model"]["net"], "model.net"))
        load_weights(self.net, run.weights, source=str(run.path))
        freeze(self.net)
        self.volumes_fingerprint: str = run.artifact["shards"]
        self.volumes = frozenset([run.artifact["shards"], *run.artifact.get("parts", ())])

    @torch.no_grad()
    def encode(self, volume_BXYZ: Tensor, mean_B: Tensor, rstd_B: Tensor) -> Tensor:
        """Posterior means float32 [B, C, x, y, z] of volumes in stored units."""
        return self.net.encode(normalize(volume_BXYZ, mean_B, rstd_B))[0]

    @torch.no_grad()
    def decode(self, latent_BCxyz: Tensor) -> Tensor:
        """z-scored volumes float32 [B, X, Y, Z]."""
        return self.net.decode(latent_BCxyz)


def open_reconstruction(run_path: str | Path, device: torch.device | str = "cpu") -> LatentSpace | AutoencoderSpace:
    """What encodes and decodes volumes in a run of task decoder or autoencoder. Raises G3nError for any other."""
    run = open_run(run_path, "decoder", "autoencoder")
    return LatentSpace.open(run_path, device=device) if run.task == "decoder" else AutoencoderSpace(run).to(device)
