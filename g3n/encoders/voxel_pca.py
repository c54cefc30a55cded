"""Principal components of voxels, fitted on training scans: the linear baseline of every encoder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from g3n.config import G3nError, build, to_plain
from g3n.encoders.contract import Encoder, Scans
from g3n.latent import normalize
from g3n.models.pretrained import fingerprint
from g3n.nifti import Grid

POOLED = (40, 48, 40)  # at most: 4 mm on the atlas box
COMPONENTS = 128
MAX_FIT = 1024  # volumes in memory: 0.3 GiB, and twice that while they are decomposed
MAX_BYTES = 1 << 30
FORMAT = "g3n-voxel-pca-1"


def pooled(scans: Scans) -> Tensor:
    """z-scores of the brain averaged to at most 4 mm, float32 [B, P]."""
    z_BXYZ = normalize(scans.volume_BXYZ, scans.mean_B, scans.rstd_B)
    x, y, z = (min(n, most) for n, most in zip(z_BXYZ.shape[1:], POOLED, strict=True))
    return F.adaptive_avg_pool3d(z_BXYZ[:, None], (x, y, z)).flatten(1)


def fit_voxel_pca(rows: Iterable[np.ndarray], grid: Grid, about: Mapping[str, Any], path: Path) -> None:
    """Fit on pooled volumes float32 [P] of training scans and write ``path`` (.safetensors), atomically.

    scikit-learn's randomized PCA with a fixed seed, at most ``COMPONENTS`` and one fewer than scans. Raises G3nError for fewer than 3.
    """
    from sklearn.decomposition import PCA

    kept = list(rows)
    if len(kept) < 3:
        raise G3nError(f"voxel-pca has {len(kept)} training scans; give at least 3")
    x_NP = np.stack(kept)
    pca = PCA(min(COMPONENTS, len(x_NP) - 1), svd_solver="randomized", random_state=0).fit(x_NP)
    tensors = {
        "mean": torch.from_numpy(pca.mean_.astype(np.float32)),
        "components": torch.from_numpy(np.ascontiguousarray(pca.components_, np.float32)),
        "variance_share": torch.from_numpy(pca.explained_variance_ratio_.astype(np.float32)),
    }
    described = {**about, "scans": len(x_NP), "grid": to_plain(grid)}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    save_file(tensors, part, {"format": FORMAT, "about": json.dumps(described, sort_keys=True)})
    part.replace(path)


def open_voxel_pca(path: Path, device: torch.device) -> Encoder:
    """Kind ``pca``: scores on the components [at most 128]. Raises G3nError for a file that ``fit_voxel_pca`` did not write."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError("too large")
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name).float() for name in ("mean", "components", "variance_share")}
        grid = build(Grid, about.pop("grid"), "grid")
        mean_P, components_KP = tensors["mean"].to(device), tensors["components"].to(device)
        sides = [min(n, most) for n, most in zip(grid.shape, POOLED, strict=True)]
        if components_KP.ndim != 2 or mean_P.shape != components_KP.shape[1:] or len(mean_P) != np.prod(sides):
            raise ValueError("shapes do not fit")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise G3nError(f"voxel-pca '{path}' cannot be read ({reason}); fit it with --encoder voxel-pca") from error

    @torch.no_grad()
    def features(scans: Scans) -> dict[str, Tensor]:
        return {"pca": (pooled(scans) - mean_P) @ components_KP.T}

    share = float(tensors["variance_share"].sum())
    return Encoder("voxel-pca", fingerprint(tensors), grid, {**about, "variance_share": round(share, 4)}, features)
