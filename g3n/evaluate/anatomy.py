"""Volumes in mL measured on a scan itself: lateral ventricles and brain tissue, from intensities in atlas regions.

Checked against the phantom's truth at 4 mm (docs/log.md): ventricles r = 0.998 on T1 and T1c, 0.997 on FLAIR, 0.992 on T2
of subjects without a tumor; tissue r = 0.95. On scans of people it is a measure to compare scans by, not a segmentation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from g3n.config import G3nError
from g3n.nifti import Grid
from g3n.templates import ventricle_distance_mm

REACH_MM = 8.0  # ventricles are looked for this far outside of the template's
WHITE_MM = (6.0, 15.0)  # white matter lies around them at this distance
RAMP = (0.4, 0.8)  # a voxel counts as CSF from 0 to 1 as its intensity goes from white matter's (0) to CSF's (1)


@dataclass(frozen=True)
class AnatomyML:
    """Volumes in mL."""

    ventricle_ml: float
    brain_ml: float  # tissue without CSF


def measure(volume_XYZ: np.ndarray, grid: Grid, modality: str) -> AnatomyML:
    """Volumes of a brain on an atlas grid, any intensity scale, background exactly 0.

    Raises G3nError where the volume has no brain at the place of the ventricles.
    """
    brain = volume_XYZ != 0
    distance_mm = ventricle_distance_mm(grid)
    white = brain & (distance_mm > WHITE_MM[0]) & (distance_mm < WHITE_MM[1])
    if not white.any():
        raise G3nError("the volume has no brain around the atlas's ventricles; is it on the atlas grid?")
    white_level = float(np.median(volume_XYZ[white]))
    csf_level = float(np.percentile(volume_XYZ[brain], 99.5 if modality == "T2" else 0.5))
    if csf_level == white_level:
        return AnatomyML(0.0, 0.0)
    share = (volume_XYZ - white_level) / (csf_level - white_level)
    csf = np.clip((share - RAMP[0]) / (RAMP[1] - RAMP[0]), 0, 1) * brain
    voxel_ml = float(np.prod(grid.spacing_mm)) / 1000
    ventricle = csf[distance_mm < REACH_MM].sum(dtype=np.float64)
    return AnatomyML(float(ventricle) * voxel_ml, float((brain - csf).sum(dtype=np.float64)) * voxel_ml)
