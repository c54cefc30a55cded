"""Features in two dimensions, colored by what is known of the scans: PCA, and UMAP (McInnes et al. 2018, arXiv 1802.03426)."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from g3n.config import G3nError
from g3n.features import Features

COLORED_BY = ("modality", "diagnosis", "age_years", "sex", "cohort")
MAX_POINTS = 5000
MIN_POINTS = 3
MAX_LEVELS = 10
NEIGHBORS = 15  # of UMAP
COMPONENTS = 50  # UMAP sees this many principal components


def write_feature_map(features: Features, path: Path, umap: bool | None = None, kind: str | None = None) -> list[str]:
    """``path`` (PNG) with a row a projection and a column for each known variable of ``COLORED_BY``; the projections' names.

    ``kind`` of features (default: the first), each standardized; at most ``MAX_POINTS`` scans, evenly taken. ``umap`` None is yes where
    umap-learn is installed; it has a fixed seed. Raises G3nError where it is asked for and missing, or with fewer than 3 scans.
    """
    if umap:
        check_umap()
    kind = kind or next(iter(features.arrays))
    chosen = np.unique(np.linspace(0, len(features) - 1, min(len(features), MAX_POINTS)).astype(int))
    if len(chosen) < MIN_POINTS:
        raise G3nError(f"a picture needs at least {MIN_POINTS} scans with features, but there are {len(chosen)}")
    x_NK, shares = principal(features.array(kind)[chosen])
    table = features.table.iloc[chosen]
    axes = [f"PC{i + 1} ({share:.0%})" for i, share in enumerate(shares[:2])]
    shown = [(f"PCA of '{kind}'", x_NK[:, :2], axes)]
    if umap or (umap is None and len(chosen) > NEIGHBORS and importlib.util.find_spec("umap")):
        shown.append((f"UMAP of '{kind}'", _umap(x_NK), ["", ""]))
    _draw(shown, [name for name in COLORED_BY if name in table and table[name].nunique() > 1], table, path)
    return [title.split()[0] for title, _, _ in shown]


def check_umap() -> None:
    """Raise G3nError where umap-learn is not installed."""
    if importlib.util.find_spec("umap") is None:
        raise G3nError("UMAP needs the package umap-learn; pip install 'g3n[umap]', or leave out --umap")


def principal(x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores [N, K] on the principal components of standardized features, and their shares of variance [K]."""
    from sklearn.decomposition import PCA
    from sklearn.preprocessing import StandardScaler

    pca = PCA(min(COMPONENTS, *x_ND.shape), random_state=0)
    return pca.fit_transform(StandardScaler().fit_transform(x_ND.astype(np.float64))), pca.explained_variance_ratio_


def _umap(x_NK: np.ndarray) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a seed means one thread
        from umap import UMAP

        return np.asarray(UMAP(n_neighbors=min(NEIGHBORS, len(x_NK) - 1), random_state=0, n_jobs=1).fit_transform(x_NK))


def _draw(
    shown: Sequence[tuple[str, np.ndarray, list[str]]], variables: Sequence[str], table: pd.DataFrame, path: Path
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(1, len(variables))
    figure = Figure(figsize=(3.6 * columns, 3.4 * len(shown)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(shown), columns, squeeze=False)
    for row, (title, points_N2, names) in zip(grid, shown, strict=True):
        for i, ax in enumerate(row):
            _scatter(ax, points_N2, table[variables[i]] if variables else None, len(points_N2))
            ax.set_xlabel(names[0], fontsize=8)
            ax.set_ylabel(f"{title}\n{names[1]}" if i == 0 else "", fontsize=8)
            ax.set_xticks([])
            ax.set_yticks([])
            ax.set_title(variables[i].replace("_", " ") if variables else "", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, format="png")
    part.replace(path)


def _scatter(ax: object, points_N2: np.ndarray, values: pd.Series | None, n: int) -> None:
    from matplotlib import colormaps

    style = {"s": max(3.0, 40 / max(1.0, n / 100)), "linewidths": 0, "alpha": 0.8}
    draw = ax.scatter  # type: ignore[attr-defined]
    unknown = np.ones(n, bool) if values is None else values.isna().to_numpy()
    draw(*points_N2[unknown].T, color="0.8", **style)
    if values is None:
        return
    if pd.api.types.is_numeric_dtype(values):
        known = draw(*points_N2[~unknown].T, c=values.to_numpy(np.float64)[~unknown], cmap="viridis", **style)
        ax.figure.colorbar(known, ax=ax, pad=0.01).ax.tick_params(labelsize=7)  # type: ignore[attr-defined]
        return
    levels = values.value_counts().index[:MAX_LEVELS]
    colors = {level: colormaps["tab10"](i) for i, level in enumerate(levels)}
    drawn = values.isin(levels).to_numpy()  # all levels in one call, or the last would hide the others
    draw(*points_N2[drawn].T, c=[colors[value] for value in values[drawn]], **style)
    for level, color in colors.items():
        draw([], [], color=color, label=f"{level} ({(values == level).sum()})")
    ax.legend(fontsize=6, frameon=False)  # type: ignore[attr-defined]
