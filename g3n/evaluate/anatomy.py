"""Volumes in mL measured on a scan itself: lateral ventricles, brain tissue and lesions, from intensities in atlas regions.

Checked against the phantom's truth at 4 mm (docs/log.md): ventricles r = 0.998 on T1 and T1c, 0.997 on FLAIR, 0.992 on T2
of subjects without a tumor; tissue r = 0.95. On scans of people it is a measure to compare scans by, not a segmentation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from g3n.config import G3nError
from g3n.nifti import Grid
from g3n.templates import ventricle_distance_mm

REACH_MM = 8.0  # ventricles are looked for this far outside of the template's
WHITE_MM = (6.0, 15.0)  # white matter lies around them at this distance
RAMP = (0.4, 0.8)  # a voxel counts as CSF from 0 to 1 as its intensity goes from white matter's (0) to CSF's (1)

# Where intensity 0 is white matter's and 1 is CSF's: how far a lesion is beyond white matter, and beyond its mirror image.
LIKE_CSF = {"T1": 0.4, "T2": 0.3}  # core and edema look more like CSF; also other modalities, as T1
BRIGHT = {"T1c": (0.5, 0.3), "FLAIR": (0.5, 0.3)}  # the enhancing rim, or core and edema: away from CSF's intensity
SHIFT_MM = 4.0  # the two hemispheres differ by so much where both are healthy
GROW = 0.05  # least asymmetry of a lesion's edge
CLEAR_MM = 2.0  # distance of a lesion from the template's ventricles
LESION_PRESENT_ML = {"T1": 2.0, "T1c": 0.5, "T2": 3.0, "FLAIR": 6.0}  # docs/log.md has how often this is right


@dataclass(frozen=True)
class AnatomyML:
    """Volumes in mL."""

    ventricle_ml: float
    brain_ml: float  # tissue without CSF
    lesion_ml: float  # what the modality shows of it: T1c its enhancing part


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
        return AnatomyML(0.0, 0.0, 0.0)
    share = (volume_XYZ - white_level) / (csf_level - white_level)
    csf = np.clip((share - RAMP[0]) / (RAMP[1] - RAMP[0]), 0, 1) * brain
    voxel_ml = float(np.prod(grid.spacing_mm)) / 1000
    ventricle = csf[distance_mm < REACH_MM].sum(dtype=np.float64)
    lesion = lesion_mask(np.where(brain, share, 0), brain, grid, modality)
    return AnatomyML(
        float(ventricle) * voxel_ml,
        float((brain - csf).sum(dtype=np.float64)) * voxel_ml,
        float(lesion.sum()) * voxel_ml,
    )


def lesion_mask(share_XYZ: np.ndarray, brain_XYZ: np.ndarray, grid: Grid, modality: str) -> np.ndarray:
    """bool [X, Y, Z]: the largest piece of tissue that looks abnormal and has no like in the other hemisphere.

    share_XYZ: float, 0 at white matter's intensity and 1 at CSF's, on a grid whose first axis runs left-right with the
    midline in its middle. Bright lesions are bright beyond any healthy tissue. Those that look like CSF do so in all of a
    neighborhood of ``SHIFT_MM`` where their mirror image does not, so that a sulcus beside its fellow's place does not
    count; then their edge is added.
    """
    both = brain_XYZ & brain_XYZ[::-1]
    distance_mm = ventricle_distance_mm(grid)
    allowed = both & (np.minimum(distance_mm, distance_mm[::-1]) > CLEAR_MM)
    if modality in BRIGHT:
        least, asymmetry = BRIGHT[modality]
        share = _smooth(share_XYZ, both, grid, SHIFT_MM / 2)
        return _largest((share < -least) & (share[::-1] - share > asymmetry) & allowed)
    window = np.ones([2 * max(1, round(SHIFT_MM / mm)) + 1 for mm in grid.spacing_mm], bool)
    mirror = share_XYZ[::-1]
    inner = ndimage.grey_erosion(np.where(both, share_XYZ, np.inf), footprint=window)
    core = _largest((inner - mirror > LIKE_CSF.get(modality, LIKE_CSF["T1"])) & allowed)
    return ndimage.binary_dilation(core, window, mask=both & (share_XYZ - mirror > GROW))


def lesion_present(anatomy: AnatomyML, modality: str) -> bool:
    """Whether there is more of a lesion than healthy brains of this modality seem to have."""
    return anatomy.lesion_ml > LESION_PRESENT_ML.get(modality, LESION_PRESENT_ML["T1"])


def _smooth(share_XYZ: np.ndarray, inside: np.ndarray, grid: Grid, mm: float) -> np.ndarray:
    """A Gaussian mean over voxels ``inside``; 0 elsewhere."""
    sigma = [mm / spacing for spacing in grid.spacing_mm]
    total, weight = (ndimage.gaussian_filter(x.astype(np.float32), sigma) for x in (share_XYZ * inside, inside))
    return np.where(inside, total / np.maximum(weight, 1e-3), 0)


def _largest(mask: np.ndarray) -> np.ndarray:
    labels, pieces = ndimage.label(mask)
    if pieces == 0:
        return mask
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return labels == sizes.argmax()
