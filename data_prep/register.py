"""Linear registration by antspyx: what brings one volume's world onto another's."""

from __future__ import annotations

import os
import tempfile
from typing import Any, Literal

import numpy as np

# Read when ITK is loaded. With more threads sums come in another order, and results differ from run to run.
os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"

Kind = Literal["Rigid", "Affine"]
_FLIP = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK's world is LPS


def register(
    moving: np.ndarray,
    moving_affine: np.ndarray,
    fixed: np.ndarray,
    fixed_affine: np.ndarray,
    kind: Kind,
    spacing_mm: float = 2.0,
) -> np.ndarray:
    """[4, 4] that maps RAS+ world mm of ``fixed`` to those of ``moving``; volumes [X, Y, Z], affines [4, 4].

    Mutual information, from the centers of mass, both at no finer than ``spacing_mm``. One thread and a fixed seed: the same
    input gives the same matrix.
    """
    import ants

    ants.config.set_ants_deterministic(True, 1)  # registration() itself takes a seed and ignores it
    target, source = (_coarser(to_ants(v, a), spacing_mm) for v, a in ((fixed, fixed_affine), (moving, moving_affine)))
    with tempfile.TemporaryDirectory() as folder:
        prefix = os.path.join(folder, "t")
        result = ants.registration(target, source, kind, outprefix=prefix)
        found = ants.read_transform(result["fwdtransforms"][0])
    origin = np.array(found.apply_to_point((0.0, 0.0, 0.0)))
    lps = np.eye(4)
    lps[:3, 3] = origin
    for axis in range(3):
        step = [0.0, 0.0, 0.0]
        step[axis] = 100.0
        lps[:3, axis] = (np.array(found.apply_to_point(tuple(step))) - origin) / 100
    return _FLIP @ lps @ _FLIP


def _coarser(image: Any, spacing_mm: float) -> Any:
    import ants

    if min(image.spacing) >= spacing_mm:
        return image
    return ants.resample_image(image, tuple(max(spacing_mm, s) for s in image.spacing), False, 0)


def to_ants(volume: np.ndarray, affine: np.ndarray) -> Any:
    """An antspyx image of float32 [X, Y, Z]."""
    import ants

    lps = _FLIP @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    # ITK takes rotations only; a shear of the header stays as the small difference it is.
    u, _, v = np.linalg.svd(lps[:3, :3] / spacing)
    return ants.from_numpy(np.asarray(volume, np.float32), lps[:3, 3].tolist(), spacing.tolist(), u @ v)
