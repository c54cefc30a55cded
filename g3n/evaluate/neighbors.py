"""Exact nearest neighbors by blocks, and copies under flips and small shifts."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

CANDIDATES = 8  # a query's nearest by float32, measured again in float64
LIKELY = 4  # pairs whose every flip and shift is tried at full resolution
SHIFT = 2  # voxels
Advance = Callable[[int], object]


@dataclass(frozen=True)
class Neighbors:
    """The nearest reference of each query."""

    distance: np.ndarray  # float64 [Q], Euclidean
    index: np.ndarray  # int64 [Q]


@dataclass(frozen=True)
class Matches:
    """The reference that each query correlates with most, and by which flip and shift."""

    correlation: np.ndarray  # float64 [Q]
    index: np.ndarray  # int64 [Q]
    flipped: np.ndarray  # bool [Q]
    shift: np.ndarray  # int64 [Q, 3], voxels


def nearest(
    queries_QD: Tensor,
    references_RD: Tensor,
    subjects: tuple[Tensor, Tensor] | None = None,
    block: int = 1024,
    device: torch.device | str = "cpu",
    advance: Advance = lambda n: None,
) -> Neighbors:
    """The nearest reference of each query by Euclidean distance, exact to float64.

    Any float dtype, on the CPU or on ``device``. Blocks of ``block`` rows are compared there, so it holds two blocks and their
    product whatever Q and R. ``subjects`` (int64 [Q], [R]): references of the query's own subject do not count. Squared
    distances are |q|^2 + |r|^2 - 2 q.r in float32; the best ``CANDIDATES`` are measured again in float64, and where the
    rounding of float32 (4 sqrt(D) eps of the norms: Higham & Mary 2019, doi 10.1137/18M1226312) could hide a nearer one,
    the whole row. Raises ValueError where a query has no reference of another subject.
    """
    found = [
        _nearest_of(queries_QD[i : i + block], i, references_RD, subjects, block, torch.device(device), advance)
        for i in range(0, len(queries_QD), block)
    ]
    distance, index = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Neighbors(distance, index)


@torch.no_grad()
def _nearest_of(
    part_QD: Tensor,
    first: int,
    references_RD: Tensor,
    subjects: tuple[Tensor, Tensor] | None,
    block: int,
    device: torch.device,
    advance: Advance,
) -> tuple[np.ndarray, np.ndarray]:
    q_QD = part_QD.to(device, torch.float32)
    own_Q = None if subjects is None else subjects[0][first : first + len(q_QD)].to(device)
    qq_Q1 = q_QD.square().sum(1, keepdim=True)
    largest = torch.zeros((), device=device)
    keep = min(CANDIDATES, len(references_RD))
    best_QK = torch.full((len(q_QD), keep), torch.inf, device=device)
    rows_QK = torch.zeros((len(q_QD), keep), dtype=torch.int64, device=device)
    with _full_precision():
        for start in range(0, len(references_RD), block):
            r_RD = references_RD[start : start + block].to(device, torch.float32)
            rr_R = r_RD.square().sum(1)
            largest = torch.maximum(largest, rr_R.max())
            squared_QR = qq_Q1 + rr_R - 2 * (q_QD @ r_RD.T)
            if subjects is not None and own_Q is not None:
                own_R = subjects[1][start : start + block].to(device)
                squared_QR.masked_fill_(own_Q[:, None] == own_R, torch.inf)
            rows_R = torch.arange(start, start + len(r_RD), device=device).expand(len(q_QD), -1)
            best_QK, order = torch.cat([best_QK, squared_QR], 1).topk(keep, dim=1, largest=False)
            rows_QK = torch.cat([rows_QK, rows_R], 1).gather(1, order)
            advance(len(q_QD) * len(r_RD))
    if not bool(best_QK[:, 0].isfinite().all()):
        raise ValueError(
            "a row has no finite neighbor of another subject; give at least two subjects and finite numbers"
        )
    exact_QK = torch.stack([_squared(part_QD, references_RD, rows, device) for rows in rows_QK.T], 1)
    exact_QK.masked_fill_(best_QK.isinf(), torch.inf)
    value_Q, place_Q = exact_QK.min(1)
    row_Q = rows_QK.gather(1, place_Q[:, None])[:, 0]
    slack_Q = 4 * part_QD.shape[1] ** 0.5 * torch.finfo(torch.float32).eps * (qq_Q1[:, 0] + largest)
    unsure_Q = (value_Q > best_QK[:, -1] - slack_Q) & best_QK[:, -1].isfinite() & (keep < len(references_RD))
    for i in unsure_Q.nonzero()[:, 0].tolist():
        squared = [
            _squared(part_QD[i], references_RD, torch.arange(s, min(s + block, len(references_RD))), device)
            for s in range(0, len(references_RD), block)
        ]
        row_R = torch.cat(squared)
        if subjects is not None and own_Q is not None:
            row_R.masked_fill_(subjects[1].to(device) == own_Q[i], torch.inf)
        value_Q[i], row_Q[i] = row_R.min(0)
    return value_Q.sqrt().cpu().numpy(), row_Q.cpu().numpy()


def _squared(q: Tensor, references_RD: Tensor, rows: Tensor, device: torch.device) -> Tensor:
    """float64 squared distances of ``q`` (a row each, or one for all) to the references at ``rows``."""
    chosen = references_RD[rows.to(references_RD.device)].to(device, torch.float64)
    return (q.to(device, torch.float64) - chosen).square().sum(1)


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
def best_matches(
    queries_QXYZ: Tensor,
    references_RXYZ: Tensor,
    kinds_R: Sequence[str],
    subjects: tuple[Tensor, Tensor] | None = None,
    block: int = 256,
    device: torch.device | str = "cpu",
    advance: Advance = lambda n: None,
) -> Matches:
    """For each query the reference it correlates with most, left-right flipped or not, shifted by up to ``SHIFT`` voxels an axis.

    Volumes are LPS, any float dtype. What is correlated (Pearson, over all voxels) are differences from the mean reference of
    the same kind (modality): brains are alike, and what is left is what tells one from another. Volumes are rolled, so what
    leaves on one side enters on the other. Two steps: at half the resolution each query meets each reference under every flip
    and shift of one coarse voxel; the best ``LIKELY`` meet it again at full resolution under all 250.
    ``subjects`` as in ``nearest``.
    """
    device = torch.device(device)
    kinds = sorted(set(kinds_R))
    kind_R = torch.tensor([kinds.index(k) for k in kinds_R])
    mean_KXYZ = torch.stack([_mean(references_RXYZ, (kind_R == k).nonzero()[:, 0], block) for k in range(len(kinds))])
    found = []
    for first in range(0, len(queries_QXYZ), block):
        q_QXYZ = queries_QXYZ[first : first + block].to(device, torch.float32)
        own_Q = None if subjects is None else subjects[0][first : first + block]
        likely_QK = _likely(q_QXYZ, own_Q, references_RXYZ, subjects, kind_R, mean_KXYZ, block, advance)
        found.append(_exactly(q_QXYZ, likely_QK, references_RXYZ, kind_R, mean_KXYZ))
    return Matches(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def _mean(volumes: Tensor, rows: Tensor, block: int) -> Tensor:
    total = torch.zeros(volumes.shape[1:], dtype=torch.float64)
    for part in rows.split(block):
        total += volumes[part.to(volumes.device)].double().sum(0).cpu()
    return (total / len(rows)).float()


def _halved(x_BXYZ: Tensor) -> Tensor:
    return F.avg_pool3d(x_BXYZ[:, None], 2)[:, 0]


def _variants(shift: int, step: int = 1) -> list[tuple[bool, tuple[int, int, int]]]:
    along = range(-shift, shift + 1, step)
    return [(flip, (i, j, k)) for flip in (False, True) for i, j, k in itertools.product(along, along, along)]


def _moved(x_BXYZ: Tensor, flip: bool, shift: tuple[int, int, int]) -> Tensor:
    return torch.roll(x_BXYZ.flip(1) if flip else x_BXYZ, shift, (1, 2, 3))


def _unit(x_BXYZ: Tensor) -> Tensor:
    """Flattened, mean 0, length 1 (0 where constant): a product of two is their correlation."""
    x_BD = x_BXYZ.flatten(1)
    x_BD = x_BD - x_BD.mean(1, keepdim=True)
    return F.normalize(x_BD, dim=1)


def _likely(
    q_QXYZ: Tensor,
    own_Q: Tensor | None,
    references_RXYZ: Tensor,
    subjects: tuple[Tensor, Tensor] | None,
    kind_R: Tensor,
    mean_KXYZ: Tensor,
    block: int,
    advance: Advance,
) -> Tensor:
    """Rows [Q, LIKELY] of the references that correlate most at half the resolution; -1 where there are fewer."""
    device = q_QXYZ.device
    small_QXYZ, mean_KXYZ = _halved(q_QXYZ), _halved(mean_KXYZ.to(device))
    best_QK = torch.full((len(q_QXYZ), LIKELY), -torch.inf, device=device)
    rows_QK = torch.full((len(q_QXYZ), LIKELY), -1, device=device)
    for k in range(len(mean_KXYZ)):
        for rows in (kind_R == k).nonzero()[:, 0].split(block):
            references = references_RXYZ[rows.to(references_RXYZ.device)].to(device, torch.float32)
            r_RD = _unit(_halved(references) - mean_KXYZ[k])
            c_QR = torch.full((len(q_QXYZ), len(rows)), -torch.inf, device=device)
            for flip, shift in _variants(1):
                c_QR = torch.maximum(c_QR, _unit(_moved(small_QXYZ, flip, shift) - mean_KXYZ[k]) @ r_RD.T)
            if subjects is not None and own_Q is not None:
                c_QR.masked_fill_(own_Q.to(device)[:, None] == subjects[1][rows].to(device), -torch.inf)
            best_QK, order = torch.cat([best_QK, c_QR], 1).topk(LIKELY, dim=1)
            rows_QK = torch.cat([rows_QK, rows.to(device).expand(len(q_QXYZ), -1)], 1).gather(1, order)
            advance(len(q_QXYZ) * len(rows))
    return rows_QK.masked_fill(best_QK.isinf(), -1)


def _exactly(
    q_QXYZ: Tensor, likely_QK: Tensor, references_RXYZ: Tensor, kind_R: Tensor, mean_KXYZ: Tensor
) -> tuple[np.ndarray, ...]:
    """(correlation, reference, flipped, shift) of the best of all flips and shifts of each query and its likely references."""
    device = q_QXYZ.device
    variants = _variants(SHIFT)
    best_Q = torch.full((len(q_QXYZ),), -torch.inf, device=device)
    row_Q, variant_Q = (torch.full((len(q_QXYZ),), -1, device=device) for _ in range(2))
    for rows_Q in likely_QK.T:
        rows = rows_Q.clamp(min=0).cpu()
        mean_QXYZ = mean_KXYZ[kind_R[rows]].to(device)
        r_QD = _unit(references_RXYZ[rows.to(references_RXYZ.device)].to(device, torch.float32) - mean_QXYZ)
        for v, (flip, shift) in enumerate(variants):
            c_Q = (_unit(_moved(q_QXYZ, flip, shift) - mean_QXYZ) * r_QD).sum(1)
            better_Q = (c_Q > best_Q) & (rows_Q >= 0)
            best_Q = torch.where(better_Q, c_Q, best_Q)
            row_Q = torch.where(better_Q, rows_Q, row_Q)
            variant_Q = torch.where(better_Q, v, variant_Q)
    chosen = [variants[v] for v in variant_Q.tolist()]
    flipped, shifts = np.array([flip for flip, _ in chosen]), np.array([shift for _, shift in chosen])
    return best_Q.double().cpu().numpy(), row_Q.cpu().numpy(), flipped, shifts
