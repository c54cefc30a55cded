"""How P can begin: from frozen features [B, N, D] and z-scored patches [B, N, P] of some training volumes, float64.

All statistics are around the mean of each place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Start:
    """z' = P f; patch = patch_PC z' + mean of its place. ``scale`` is the standard deviation of z' around its means."""

    projection_CD: Tensor
    scale: float
    patch_PC: Tensor
    mean_NP: Tensor


def _ridge(x_MD: Tensor, y_MP: Tensor) -> Tensor:
    """[D, P]: least squares with a penalty of a thousandth of the mean power of a feature."""
    gram_DD = x_MD.T @ x_MD
    eye_DD = torch.eye(len(gram_DD), dtype=gram_DD.dtype, device=gram_DD.device)
    return torch.linalg.solve(gram_DD + 1e-3 * gram_DD.diagonal().mean() * eye_DD, x_MD.T @ y_MP)


def regression(f_BND: Tensor, x_BNP: Tensor, channels: int) -> Start:
    """Reduced-rank regression of patches on features: the best linear map through C channels (Izenman 1975).

    Starting from it instead of a random P is worth decibels on short runs (docs/log.md).
    """
    f_ND, x_NP = f_BND.mean(0), x_BNP.mean(0)
    f_MD, x_MP = (f_BND - f_ND).flatten(0, 1), (x_BNP - x_NP).flatten(0, 1)
    weight_DP = _ridge(f_MD, x_MP)
    fitted_MP = f_MD @ weight_DP
    _, vectors_PP = torch.linalg.eigh(fitted_MP.T @ fitted_MP)
    patch_PC = vectors_PP[:, -channels:]
    p_DC = weight_DP @ patch_PC
    mean_NP = x_NP - f_ND @ p_DC @ patch_PC.T
    return Start(p_DC.T.float(), float((f_MD @ p_DC).std()), patch_PC.float(), mean_NP.float())


def pca(f_BND: Tensor, x_BNP: Tensor, channels: int) -> Start:
    """The ``channels`` directions in which features vary most, the widest first; patches by ridge regression on them."""
    f_MD = (f_BND - f_BND.mean(0)).flatten(0, 1)
    _, vectors_DD = torch.linalg.eigh(f_MD.T @ f_MD)
    return _with_patches(vectors_DD.flip(1)[:, :channels], f_BND, x_BNP)


def identity(f_BND: Tensor, x_BNP: Tensor) -> Start:
    """All features as they are."""
    return _with_patches(torch.eye(f_BND.shape[2], dtype=f_BND.dtype, device=f_BND.device), f_BND, x_BNP)


def _with_patches(p_DC: Tensor, f_BND: Tensor, x_BNP: Tensor) -> Start:
    z_BNC, x_NP = f_BND @ p_DC, x_BNP.mean(0)
    z_NC = z_BNC.mean(0)
    z_MC = (z_BNC - z_NC).flatten(0, 1)
    patch_CP = _ridge(z_MC, (x_BNP - x_NP).flatten(0, 1))
    mean_NP = x_NP - z_NC @ patch_CP
    return Start(p_DC.T.float(), float(z_MC.std()), patch_CP.T.float(), mean_NP.float())


def spread(f_BND: Tensor) -> Tensor:
    """float32 [D, D]: the transpose of it times itself is the features' covariance around the mean of each place."""
    f_MD = (f_BND - f_BND.mean(0)).flatten(0, 1)
    return torch.linalg.qr(f_MD, mode="r").R.float() / len(f_MD) ** 0.5
