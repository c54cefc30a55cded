"""Anatomy of the phantom: tissue maps of one visit, made by warping the ICBM152 2009a templates (in the nilearn wheel).

All lengths in mm. A subject is a smooth invertible warp of the template; the ventricles are widened to an exact volume,
the cortex thins, a tumor pushes tissue aside.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage

from g3n.nifti import ATLAS_CENTER_MM, Grid, resample
from g3n.templates import FAR_MM, lateral_ventricles, read_template, signed_distance_mm

BOX_MM = (160.0, 192.0, 160.0)
MAPS = ("gm", "wm", "csf", "texture", "sulci", "mask")
_DECAY_MM = 15.0  # how far the push of a widened ventricle reaches


@dataclass(frozen=True)
class Template:
    """Maps float32 [6, X, Y, Z] (MAPS; ventricles filled with tissue) and ``distance_mm`` [X, Y, Z] to the lateral
    ventricles (negative inside) on the work grid."""

    grid: Grid
    maps: np.ndarray
    distance_mm: np.ndarray


@dataclass(frozen=True)
class Tumor:
    """A ball of ``radius_mm`` (necrotic core and rim) with uneven surface; oedema reaches ``oedema`` times as far."""

    center_mm: tuple[float, float, float]
    radius_mm: float
    oedema: float
    seed: int


@dataclass(frozen=True)
class Shape:
    """What determines the anatomy of one visit. ``size`` is the linear scale, ``atrophy`` 0 (none) to 1."""

    seed: int
    size: float
    ventricle_ml: float
    atrophy: float
    tumor: Tumor | None = None


@dataclass(frozen=True)
class Anatomy:
    """Fractions float32 [X, Y, Z] of each tissue (they sum to 1 inside the brain), texture, and true volumes in mL."""

    gm: np.ndarray
    wm: np.ndarray
    csf: np.ndarray
    ventricle: np.ndarray
    core: np.ndarray
    rim: np.ndarray
    oedema: np.ndarray
    texture: np.ndarray
    mask: np.ndarray
    rim_distance_mm: np.ndarray  # from the ventricles' wall as it is now
    ventricle_ml: float
    brain_ml: float
    lesion_ml: float


def box_grid(spacing_mm: float, divide: int = 1) -> Grid:
    """RAS grid over the atlas box; its voxels coincide with the atlas grid's at the same spacing.

    ``divide`` splits each voxel's side into so many.
    """
    shape = [2 * math.ceil(side / spacing_mm / 2) * divide for side in BOX_MM]
    step = spacing_mm / divide
    corner = [c - step * (n - 1) / 2 for c, n in zip(ATLAS_CENTER_MM, shape, strict=True)]
    rows = [[step * (i == j) for j in range(3)] + [corner[i]] for i in range(3)]
    return Grid((shape[0], shape[1], shape[2]), (*(tuple(row) for row in rows), (0.0, 0.0, 0.0, 1.0)))


@lru_cache(maxsize=2)
def load_template(grid: Grid) -> Template:
    """The template's maps on ``grid``. Takes some seconds; cached a process."""
    t1, affine = read_template("t1")
    gm, wm = read_template("gm")[0], read_template("wm")[0]
    mask = (t1 > 0).astype(np.float32)
    gm, wm = gm * mask, wm * mask
    csf = np.clip(mask - gm - wm, 0, 1)

    ventricles = lateral_ventricles(t1, csf)
    distance_mm = signed_distance_mm(ventricles)

    # Texture is what a mixture of three tissues does not explain: deep nuclei, brain stem.
    tissues = np.stack([gm, wm, csf], -1)[mask > 0]
    levels = np.linalg.lstsq(tissues, t1[mask > 0], rcond=None)[0]
    texture = np.zeros_like(t1)
    texture[mask > 0] = t1[mask > 0] - tissues @ levels
    # The ventricles are filled with white matter, so that they can shrink as well as grow.
    fill = ndimage.binary_dilation(ventricles, iterations=2) & (csf > 0.1)
    gm, wm, csf, texture = (np.where(fill, value, v) for v, value in ((gm, 0), (wm, 1), (csf, 0), (texture, 0)))
    sulci = ndimage.gaussian_filter(csf, 2.5)
    maps = np.stack([resample(v, affine, grid) for v in (gm, wm, csf, texture, sulci, mask)])
    far = resample(distance_mm - FAR_MM, affine, grid) + FAR_MM
    return Template(grid, maps, far)


def waves(shape: tuple[int, int, int], rng: np.random.Generator, count: int = 6) -> np.ndarray:
    """A smooth random field float32 ``shape`` of unit variance: products of cosines, long waves the strongest."""
    k = np.arange(count)
    k2 = k[:, None, None] ** 2 + k[None, :, None] ** 2 + k[None, None, :] ** 2
    weights = rng.standard_normal((count, count, count)) / (1 + k2 / 4) * (k2 > 0)
    bases = [np.cos(np.pi * (np.arange(n)[:, None] + 0.5) / n * k).astype(np.float32) for n in shape]
    field = np.einsum("abc,xa,yb,zc->xyz", weights.astype(np.float32), *bases, optimize=True)
    return field / field.std()


def make(template: Template, shape: Shape) -> Anatomy:
    """The anatomy of one visit on the template's grid; the same shape gives the same anatomy."""
    grid, maps = template.grid, template.maps
    spacing = grid.spacing_mm[0]
    voxel_ml = spacing**3 / 1000
    edge = max(spacing, 1.5)
    corner = grid.matrix[:3, 3]
    axes = [corner[i] + spacing * np.arange(grid.shape[i]) for i in range(3)]
    x = np.stack(np.meshgrid(*axes, indexing="ij")).astype(np.float32)

    tumor = shape.tumor
    y = x
    reach = np.full(grid.shape, np.inf, np.float32)  # distance from the tumor's center in units of its radius
    if tumor:
        offset = x - np.array(tumor.center_mm, np.float32)[:, None, None, None]
        r = np.sqrt((offset**2).sum(0)) + 1e-3
        bumps = np.clip(waves(grid.shape, np.random.default_rng(tumor.seed), 12), -2, 2)
        reach = r / tumor.radius_mm * (1 + 0.2 * bumps)
        # Tissue gives way as if 40 % of the ball had been inserted into it without loss of volume.
        pushed = np.cbrt(np.maximum(r**3 - 0.4 * tumor.radius_mm**3, 0))
        y = x + offset * (pushed / r - 1)

    rng = np.random.default_rng(shape.seed)
    center = np.array(ATLAS_CENTER_MM, np.float32)[:, None, None, None]
    y = (y - center) / shape.size + center
    y = y + np.stack([2.2 * waves(grid.shape, rng) for _ in range(3)])

    def sample(image: np.ndarray, at: np.ndarray, outside: float = 0.0) -> np.ndarray:
        index = ((at.T - corner.astype(np.float32)) / spacing).T
        return ndimage.map_coordinates(image, index, np.float32, order=1, mode="constant", cval=outside)

    distance = sample(template.distance_mm, y, FAR_MM)
    lesion = _soft(reach, 1.0, edge / (tumor.radius_mm if tumor else 1))
    near = distance < FAR_MM - 1
    widen = _solve_widening(distance[near], (1 - lesion)[near], edge, shape.ventricle_ml / voxel_ml)
    painted = _soft(distance, widen, edge)
    push = np.where(distance > widen, widen * np.exp(-np.maximum(distance - widen, 0) / _DECAY_MM), widen)
    push = np.minimum(push, distance + 1.5)  # never past the middle of the ventricle
    normal = np.stack(np.gradient(ndimage.gaussian_filter(distance, 2.0 / spacing), spacing))
    normal *= shape.size / np.maximum(1, np.sqrt((normal**2).sum(0)))
    z = y - push * normal

    mask = sample(maps[MAPS.index("mask")], z)
    brain = mask > 0
    warped = np.zeros((len(MAPS) - 1, *grid.shape), np.float32)
    for image, target in zip(maps, warped, strict=False):
        target[brain] = sample(image, z[:, brain])
    gm, wm, csf, texture, sulci = warped
    lost = np.clip(shape.atrophy * 3.0 * sulci, 0, 0.65) * gm
    gm, csf = gm - lost, csf + lost
    total = np.maximum(gm + wm + csf, 1e-3)
    painted *= (1 - lesion) * (mask > 0.05)
    lesion *= (mask > 0.05) * (1 - csf / total)
    rest = np.maximum(1 - painted - lesion, 0) / total
    gm, wm, csf = gm * rest, wm * rest, csf * rest
    core = lesion * _soft(reach, 0.62, 0.25)
    oedema = np.zeros_like(gm)
    if tumor:
        swollen = _soft(reach, tumor.oedema, 0.5)
        oedema = swollen * (wm + 0.15 * gm)
        gm, wm = gm * (1 - 0.15 * swollen), wm * (1 - swollen)
    inside = mask > 0.5
    sums = [float(v[inside].sum(dtype=np.float64)) * voxel_ml for v in (painted, gm, wm, lesion, oedema)]
    return Anatomy(
        gm=gm,
        wm=wm,
        csf=csf,
        ventricle=painted,
        core=core,
        rim=lesion - core,
        oedema=oedema,
        texture=texture * rest,
        mask=mask,
        rim_distance_mm=distance - widen,
        ventricle_ml=sums[0],
        brain_ml=sum(sums[1:]),
        lesion_ml=sums[3] + sums[4],
    )


def _soft(distance: np.ndarray, limit: float, width: float) -> np.ndarray:
    """1 well below ``limit``, 0 well above, a ramp of ``width`` between: the share of a voxel inside a surface."""
    return np.clip(0.5 + (limit - distance) / width, 0, 1)


def _solve_widening(distance: np.ndarray, weight: np.ndarray, edge: float, target_voxels: float) -> float:
    """How far (mm) the wall must move so that the painted volume is the target: bisection, it grows with the distance."""
    low, high = -8.0, 20.0
    for _ in range(24):
        middle = (low + high) / 2
        if float((_soft(distance, middle, edge) * weight).sum()) < target_voxels:
            low = middle
        else:
            high = middle
    return (low + high) / 2
