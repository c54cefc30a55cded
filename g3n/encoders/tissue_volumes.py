"""Volumes of ventricles and tissue as features: what an encoder must know more than."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from g3n.config import G3nError
from g3n.encoders.contract import Encoder, Scans
from g3n.evaluate.anatomy import measure

NAMES = ("ventricle_ml", "tissue_ml", "lesion_ml", "brain_ml")


def open_tissue_volumes() -> Encoder:
    """Kind ``volumes`` [4] in mL: lateral ventricles, tissue without CSF, lesion, all that is not background (``g3n.evaluate.anatomy``).

    A scan without a brain at the atlas's place gets NaN. An unknown modality counts as T1. Runs on the CPU.
    """

    def features(scans: Scans) -> dict[str, Tensor]:
        volumes = scans.volume_BXYZ.float().cpu().numpy()
        rows = [_row(v, scans, i) for i, v in enumerate(volumes)]
        return {"volumes": torch.tensor(rows, dtype=torch.float32).reshape(-1, len(NAMES))}

    return Encoder("tissue-volumes", "anatomy-1", None, {"names": NAMES}, features)


def _row(volume_XYZ: np.ndarray, scans: Scans, i: int) -> list[float]:
    try:
        found = measure(volume_XYZ, scans.grid, scans.modalities[i] or "T1")
    except G3nError:
        return [float("nan")] * len(NAMES)
    brain_ml = np.count_nonzero(volume_XYZ) * float(np.prod(scans.grid.spacing_mm)) / 1000
    return [found.ventricle_ml, found.brain_ml, found.lesion_ml, brain_ml]
