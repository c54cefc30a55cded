"""How P can begin: from frozen features [B, N, D] and z-scored patches [B, N, P] of some training volumes, float64.

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
    """patch = (shared + place basis)^T z + mean of its place, float32; without place_rank there is no place and no basis."""

    shared_CP: Tensor
    mean_NP: Tensor
    place_NCR: Tensor | None
    basis_RP: Tensor | None


def _around(f_BND: Tensor) -> Tensor:
    """[M, D], M = B N."""
    return (f_BND - f_BND.mean(0)).flatten(0, 1)


def _ridge(x_MD: Tensor, y_MP: Tensor, penalty: float = 1e-3) -> Tensor:
    """[D, P]: least squares with a penalty of so much of the mean power of a feature. Leading axes are problems of their own."""
    gram_DD = x_MD.mT @ x_MD
    eye_DD = torch.eye(gram_DD.shape[-1], dtype=gram_DD.dtype, device=gram_DD.device)
    power = gram_DD.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return torch.linalg.solve(gram_DD + penalty * power * eye_DD, x_MD.mT @ y_MP)


def _start(p_DC: Tensor, f_MD: Tensor) -> Start:
    return Start(p_DC.T.float(), float((f_MD @ p_DC).std()))


def regression(f_BND: Tensor, x_BNP: Tensor, channels: int) -> Start:
    """Reduced-rank regression of patches on features: the best linear map through C channels (Izenman 1975).

    Starting from it instead of a random P is worth decibels on short runs (docs/log.md).
    """
    f_MD = _around(f_BND)
    weight_DP = _ridge(f_MD, _around(x_BNP))
    fitted_MP = f_MD @ weight_DP
    _, vectors_PP = torch.linalg.eigh(fitted_MP.T @ fitted_MP)
    return _start(weight_DP @ vectors_PP[:, -channels:], f_MD)


def pca(f_BND: Tensor, channels: int) -> Start:
    """The ``channels`` directions in which features vary most, the widest first."""
    f_MD = _around(f_BND)
    _, vectors_DD = torch.linalg.eigh(f_MD.T @ f_MD)
    return _start(vectors_DD.flip(1)[:, :channels], f_MD)


def identity(f_BND: Tensor) -> Start:
    """All features as they are."""
    return _start(torch.eye(f_BND.shape[2], dtype=f_BND.dtype, device=f_BND.device), _around(f_BND))


def image(z_BNC: Tensor, x_BNP: Tensor, place_rank: int) -> Image:
    """The linear image of latents that is nearest to ``x_BNP``, by ridge regression.

    With ``place_rank`` each place adds its own regression of what the shared image leaves there, in the ``place_rank`` directions
    of a patch that hold most of it over all places. In an atlas the same place is the same anatomy in everyone.
    """
    z_NC, x_NP = z_BNC.mean(0), x_BNP.mean(0)
    z_NBC, x_NBP = (z_BNC - z_NC).transpose(0, 1), (x_BNP - x_NP).transpose(0, 1)
    shared_CP = _ridge(z_NBC.flatten(0, 1), x_NBP.flatten(0, 1))
    mean_NP = x_NP - z_NC @ shared_CP
    if not place_rank:
        return Image(shared_CP.float(), mean_NP.float(), None, None)
    found_NCP = _ridge(z_NBC, x_NBP - z_NBC @ shared_CP, PLACE_PENALTY)
    fitted_MP = (z_NBC @ found_NCP).flatten(0, 1)
    _, vectors_PP = torch.linalg.eigh(fitted_MP.T @ fitted_MP)
    basis_PR = vectors_PP[:, -place_rank:]
    place_NCR = found_NCP @ basis_PR
    mean_NP = mean_NP - torch.einsum("nc,ncr,pr->np", z_NC, place_NCR, basis_PR)
    return Image(shared_CP.float(), mean_NP.float(), place_NCR.float(), basis_PR.T.contiguous().float())


def spread(f_BND: Tensor) -> Tensor:
    """float32 [D, D]: the transpose of it times itself is the features' covariance around the mean of each place."""
    f_MD = _around(f_BND)
    return torch.linalg.qr(f_MD, mode="r").R.float() / len(f_MD) ** 0.5
