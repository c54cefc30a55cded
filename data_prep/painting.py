"""From anatomy to the intensities a scanner would give: contrast of the modality, bias field, noise, resolution."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_prep.anatomy import Anatomy, waves

MODALITIES = ("T1", "T1c", "T2", "FLAIR")


@dataclass(frozen=True)
class Tissues:
    """Relative intensity of each tissue; ``texture`` scales what the template's T1 has beyond three tissues, ``hyper``
    what white matter near the ventricles gains in old age."""

    wm: float
    gm: float
    csf: float
    core: float
    rim: float
    oedema: float
    texture: float
    hyper: float = 0.0


CONTRASTS = {
    "T1": Tissues(wm=1.0, gm=0.72, csf=0.26, core=0.38, rim=0.72, oedema=0.66, texture=1.1, hyper=-0.1),
    "T1c": Tissues(wm=1.0, gm=0.75, csf=0.28, core=0.40, rim=1.55, oedema=0.68, texture=1.1, hyper=-0.1),
    "T2": Tissues(wm=0.42, gm=0.62, csf=1.15, core=1.0, rim=0.72, oedema=0.92, texture=-0.8, hyper=0.25),
    "FLAIR": Tissues(wm=0.58, gm=0.74, csf=0.14, core=0.5, rim=0.98, oedema=1.15, texture=-0.5, hyper=0.3),
}


@dataclass(frozen=True)
class Scanner:
    """``contrast`` stretches intensities about the white matter's, ``bias`` and ``noise`` are standard deviations
    relative to it."""

    contrast: float
    bias: float
    noise: float


def paint(
    anatomy: Anatomy, modality: str, scanner: Scanner, hyper: float, divide: int, rng: np.random.Generator
) -> np.ndarray:
    """int16 [X, Y, Z] at ``1 / divide`` of the anatomy's resolution, background 0.

    ``hyper`` 0..1 is the strength of the white-matter change of old age.
    """
    t = CONTRASTS[modality]
    image = (
        t.wm * anatomy.wm
        + t.gm * anatomy.gm
        + t.csf * (anatomy.csf + anatomy.ventricle)
        + t.core * anatomy.core
        + t.rim * anatomy.rim
        + t.oedema * anatomy.oedema
        + t.texture * anatomy.texture
    )
    if hyper > 0:
        caps = np.exp(-((np.maximum(anatomy.rim_distance_mm, 0) / 5.0) ** 2))
        image += hyper * t.hyper * caps * anatomy.wm
    inside = (anatomy.mask > 0.5).astype(np.float32)
    share = _average(inside, divide)
    image = _average(image * inside, divide) / np.maximum(share, 0.5)
    image = np.maximum(t.wm + scanner.contrast * (image - t.wm), 0.02)
    image *= np.exp(scanner.bias * waves(image.shape, rng, 3))
    noise = scanner.noise * rng.standard_normal((2, *image.shape), dtype=np.float32)
    image = np.hypot(image + noise[0], noise[1])  # magnitude images: Rician
    gain = rng.uniform(400, 1200)
    return np.where(share >= 0.5, np.clip(np.rint(image * gain), 1, 32000), 0).astype(np.int16)


def _average(volume: np.ndarray, divide: int) -> np.ndarray:
    """Mean of blocks of ``divide`` voxels a side."""
    if divide == 1:
        return volume
    x, y, z = (n // divide for n in volume.shape)
    return volume.reshape(x, divide, y, divide, z, divide).mean((1, 3, 5))
