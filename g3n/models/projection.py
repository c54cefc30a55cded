"""How P can begin: from frozen features [B, N, D] and z-scored patches [B, N, P] of some training volumes.

All statistics are around the mean of each place.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PLACE_PENALTY = 1e-2  # the best of 1e-3 to 3e-2 on the phantom's validation scans (docs/log.md)


@dataclass(frozen=True)
class Start:
    """z' = P f; ``scale`` is the standard deviation of z' around the means of its places."""

    projection_CD: Tensor
    scale: float


@dataclass(frozen=True)
class Image:
    """patch = shared^T z + (place basis)^T seen + mean of its place, float32; without place_rank there is no place and no basis.
    ``seen`` is z, or z and its neighbors (K = C or 7C)."""

    shared_CP: Tensor
    mean_NP: Tensor
    place_NKR: Tensor | None
    basis_RP: Tensor | None


def _moments(f_BND: Tensor, x_BNP: Tensor) -> tuple[Tensor, Tensor]:
    """(f^T f [D, D], f^T x [D, P]), float64, over scans and places, around the means of each place."""
    gram_DD = torch.zeros(f_BND.shape[2], f_BND.shape[2], dtype=torch.float64, device=f_BND.device)
    cross_DP = torch.zeros(f_BND.shape[2], x_BNP.shape[2], dtype=torch.float64, device=f_BND.device)
    for n in range(f_BND.shape[1]):
        f_BD, x_BP = _around(f_BND[:, n]), _around(x_BNP[:, n])
        gram_DD += f_BD.T @ f_BD
        cross_DP += f_BD.T @ x_BP
    return gram_DD, cross_DP


def _around(x_BD: Tensor) -> Tensor:
    """float64, with mean 0 over scans."""
    x_BD = x_BD.double()
    return x_BD - x_BD.mean(0)


def _ridge(gram_DD: Tensor, cross_DP: Tensor, penalty: float = 1e-3) -> Tensor:
    """[D, P]: least squares with a penalty of so much of the mean power of a feature."""
    eye_DD = torch.eye(len(gram_DD), dtype=gram_DD.dtype, device=gram_DD.device)
    return torch.linalg.solve(gram_DD + penalty * gram_DD.diagonal().mean() * eye_DD, cross_DP)


def _start(p_DC: Tensor, gram_DD: Tensor, f_BND: Tensor) -> Start:
    variance = (p_DC.T @ gram_DD @ p_DC).trace() / (len(f_BND) * f_BND.shape[1] * p_DC.shape[1])
    return Start(p_DC.T.float(), float(variance.sqrt()))


def regression(f_BND: Tensor, x_BNP: Tensor, channels: int, pooled: int = 0) -> Start:
    """Reduced-rank regression of patches on features: the best linear map through C channels (Izenman 1975).

    Starting from it instead of a random P is worth decibels on short runs (docs/log.md). With ``pooled`` so many of the channels are
    directions that all places of a scan share, and the others the best beside them: what tells people apart draws few voxels, and
    the mean of projected tokens would lose it. Raises ValueError for more of them than channels.
    """
    if not 0 <= pooled <= channels:
        raise ValueError(f"pooled {pooled} must lie in 0 to {channels} channels")
    gram_DD, cross_DP = _moments(f_BND, x_BNP)
    first_DK = _of_whole_scans(f_BND, gram_DD)[:, :pooled]
    seen_DK = gram_DD @ first_DK  # what the first channels say of features is taken out of both moments
    back_KD = torch.linalg.solve(first_DK.T @ seen_DK, seen_DK.T)
    rest_DD, rest_DP = gram_DD - seen_DK @ back_KD, cross_DP - back_KD.T @ (first_DK.T @ cross_DP)
    weight_DP = _ridge(rest_DD, rest_DP)
    _, vectors_PP = torch.linalg.eigh(weight_DP.T @ rest_DD @ weight_DP)
    rest_DC = weight_DP @ vectors_PP[:, vectors_PP.shape[1] - channels + pooled :]
    if pooled:
        power = ((rest_DC.T @ gram_DD) * rest_DC.T).sum(1).mean() if pooled < channels else 1.0
        own_K = (first_DK.T @ seen_DK).diagonal()
        first_DK = first_DK * (power / own_K).sqrt()  # as loud as the others
    return _start(torch.cat([first_DK, rest_DC], 1), gram_DD, f_BND)


def _of_whole_scans(f_BND: Tensor, gram_DD: Tensor) -> Tensor:
    """[D, D]: directions by the share of their variance that all places of a scan have in common, the largest first."""
    mean_BD = _around(f_BND.mean(1))
    eye_DD = torch.eye(len(gram_DD), dtype=gram_DD.dtype, device=gram_DD.device)
    lower_DD = torch.linalg.cholesky(gram_DD + 1e-3 * gram_DD.diagonal().mean() * eye_DD)
    half_DB = torch.linalg.solve_triangular(lower_DD, mean_BD.T, upper=False)
    _, vectors_DD = torch.linalg.eigh(half_DB @ half_DB.T)
    return torch.linalg.solve_triangular(lower_DD.T, vectors_DD.flip(1), upper=True)


def pca(f_BND: Tensor, channels: int) -> Start:
    """The ``channels`` directions in which features vary most, the widest first."""
    gram_DD, _ = _moments(f_BND, f_BND)
    _, vectors_DD = torch.linalg.eigh(gram_DD)
    return _start(vectors_DD.flip(1)[:, :channels], gram_DD, f_BND)


def identity(f_BND: Tensor) -> Start:
    """All features as they are."""
    gram_DD, _ = _moments(f_BND, f_BND)
    return _start(torch.eye(len(gram_DD), dtype=gram_DD.dtype, device=gram_DD.device), gram_DD, f_BND)


def image(z_BNC: Tensor, x_BNP: Tensor, place_rank: int, seen_BNK: Tensor | None = None) -> Image:
    """The linear image of latents that is nearest to ``x_BNP``, by ridge regression.

    With ``place_rank`` each place adds its own regression of what the shared image leaves there, in the ``place_rank`` directions
    of a patch that hold most of it over all places. In an atlas the same place is the same anatomy in everyone. That regression is
    on ``seen_BNK``, the latents by default.
    """
    z_NC, mean_NP = z_BNC.double().mean(0), x_BNP.double().mean(0)
    shared_CP = _ridge(*_moments(z_BNC, x_BNP))
    mean_NP -= z_NC @ shared_CP
    if not place_rank:
        return Image(shared_CP.float(), mean_NP.float(), None, None)
    seen_BNK = z_BNC if seen_BNK is None else seen_BNK
    own: list[Tensor] = []
    power_PP = torch.zeros(x_BNP.shape[2], x_BNP.shape[2], dtype=torch.float64, device=x_BNP.device)
    for n in range(z_BNC.shape[1]):
        seen_BK = _around(seen_BNK[:, n])
        gram_KK = seen_BK.T @ seen_BK
        left_BP = _around(x_BNP[:, n]) - _around(z_BNC[:, n]) @ shared_CP
        found_KP = _ridge(gram_KK, seen_BK.T @ left_BP, PLACE_PENALTY)
        power_PP += found_KP.T @ gram_KK @ found_KP
        own.append(found_KP)
    _, vectors_PP = torch.linalg.eigh(power_PP)
    basis_PR = vectors_PP[:, -place_rank:]
    place_NKR = torch.stack([found_KP @ basis_PR for found_KP in own])
    mean_NP -= torch.einsum("nk,nkr,pr->np", seen_BNK.double().mean(0), place_NKR, basis_PR)
    return Image(shared_CP.float(), mean_NP.float(), place_NKR.float(), basis_PR.T.contiguous().float())


def spread(f_BND: Tensor) -> Tensor:
    """float32 [D, D]: the transpose of it times itself is the features' covariance around the mean of each place."""
    gram_DD, _ = _moments(f_BND, f_BND)
    values_D, vectors_DD = torch.linalg.eigh(gram_DD / (len(f_BND) * f_BND.shape[1]))
    return (values_D.clamp(min=0).sqrt()[:, None] * vectors_DD.T).float()
