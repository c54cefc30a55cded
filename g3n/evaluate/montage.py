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


def write_difference_montage(
    path: str | Path, rows: Sequence[Sequence[np.ndarray]], labels: Sequence[str], title: str = ""
) -> None:
    """A PNG with a row for each list of z-scored LPS volumes [X, Y, Z]: their middle axial slices, then each but the first
    minus the first. Blue is below the first and red above; the bar gives the scale, in the brain's standard deviations, which
    ends at the 99.5th percentile of all that differs. Where one of the two has background, that counts as the brain's mean.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    slices = [[planes(volume)[0] for volume in row] for row in rows]
    changes = [[image - row[0] for image in row[1:]] for row in slices]
    sizes = np.abs(np.concatenate([change.ravel() for row in changes for change in row]))
    limit = float(np.percentile(sizes[sizes > 0], 99.5)) if (sizes > 0).any() else 1.0
    n = len(labels)
    height, width = slices[0][0].shape
    columns, inch = 2 * n - 1, 1.5
    tight = ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.01, wspace=0.01, hspace=0.01)
    size = (inch * columns + 0.9, inch * height / width * len(rows) + 0.7)
    figure = Figure(figsize=size, dpi=150, layout=tight)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for r, row in enumerate(slices):
        for c, image in enumerate(row):
            axes[r, c].imshow(to_gray(image), cmap="gray", vmin=0, vmax=1, interpolation="bilinear")
        for c, change in enumerate(changes[r]):
            drawn = axes[r, n + c].imshow(change, cmap="RdBu_r", vmin=-limit, vmax=limit)
    for ax in axes.flat:
        ax.set_axis_off()
    for c, label in enumerate(labels):
        axes[0, c].set_title(label, fontsize=8)
        if c:
            axes[0, n + c - 1].set_title(f"{label} \N{MINUS SIGN} {labels[0]}", fontsize=8)
    bar = figure.colorbar(drawn, ax=axes, fraction=0.03, pad=0.01, aspect=12 * len(rows))
    bar.set_label("change (SD of the brain)", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    if title:
        figure.suptitle(title, fontsize=10)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, format="png", facecolor="white")
    part.replace(path)
