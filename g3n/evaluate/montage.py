"""Pictures of volumes: the three middle planes of each, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

WINDOW = (-2.5, 2.5)  # z-scores shown from black to white


def planes(volume_XYZ: np.ndarray, at: tuple[int, int, int] | None = None) -> list[np.ndarray]:
    """Axial, coronal and sagittal slices of an LPS volume through voxel ``at`` (default: the middle), as one looks at
    them: anterior or superior at the top, the subject's right on the left."""
    i, j, k = at or tuple(n // 2 for n in volume_XYZ.shape)
    return [volume_XYZ[:, :, k].T, volume_XYZ[:, j, ::-1].T, volume_XYZ[i, :, ::-1].T]


def to_gray(z: np.ndarray, window: tuple[float, float] = WINDOW) -> np.ndarray:
    """z-scores as 0..1; exact zeros, the background, are black."""
    return np.clip((z - window[0]) / (window[1] - window[0]), 0, 1) * (z != 0)


def write_montage(path: str | Path, columns: Sequence[tuple[str, np.ndarray]], title: str = "") -> None:
    """A PNG with one column for each (label, z-scored LPS volume [X, Y, Z]) and one row a plane."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [planes(volume) for _, volume in columns]
    heights = [max(column[r].shape[0] for column in shown) for r in range(3)]
    width = max(image.shape[1] for column in shown for image in column)
    inch = 1.7 / width
    figure = Figure(figsize=(1.75 * len(columns), inch * sum(heights) + (0.9 if title else 0.5)), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, len(columns), squeeze=False, gridspec_kw={"height_ratios": heights})
    for c, (label, _) in enumerate(columns):
        for r in range(3):
            ax = axes[r, c]
            ax.imshow(to_gray(shown[c][r]), cmap="gray", vmin=0, vmax=1, interpolation="bilinear")
            ax.set_axis_off()
        axes[0, c].set_title(label, fontsize=8)
    if title:
        figure.suptitle(title, fontsize=10)
    figure.patch.set_facecolor("white")
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=0.88 if title else 0.93, wspace=0.03, hspace=0.03)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, format="png")
    part.replace(path)
