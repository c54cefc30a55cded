"""The quality page: one HTML file that shows every preprocessed scan, outliers first."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import image as picture
from scipy import ndimage

from data_prep.atlas import atlas_on, load_atlas
from data_prep.manifest import Scan, read_manifest, read_table
from data_prep.progress import run_all
from data_prep.quality import FLAGS
from data_prep.shards import write_text
from g3n.config import G3nError, build
from g3n.nifti import ATLAS_CENTER_MM, Grid, read_volume

NUMBERS = {
    "dice_atlas": "overlap with the atlas brain (Dice)",
    "correlation_atlas": "correlation with the atlas T1 (absolute)",
    "brain_ml": "brain in the scan, mL",
    "atlas_covered": "share of the atlas brain covered",
    "background_share": "share of background",
    "p1": "1st percentile",
    "p50": "median",
    "p99": "99th percentile",
}
_SIDE = 128  # pixels of one plane
_OUTLINE = (1.0, 0.55, 0.1)


@dataclass(frozen=True)
class Thumb:
    """What a worker needs to draw one scan."""

    source: str
    target: str
    grid: Grid


def write_page(derivatives: Path, output: Path, workers: int | None = None) -> int:
    """Write <output>/index.html and <output>/thumbs/*.png; how many scans it shows. Pictures already drawn are kept.

    Raises G3nError for a folder that preprocess did not write.
    """
    manifest = read_manifest(derivatives / "manifest.tsv")
    recipe = _json(derivatives / "recipe.json")
    grid = build(Grid, recipe["grid"], "grid")
    (output / "thumbs").mkdir(parents=True, exist_ok=True)
    thumbs = []
    rows = []
    for scan in manifest.scans:
        name = Path(scan.path).name.removesuffix(".nii.gz")
        about = _json(derivatives / scan.path.replace(".nii.gz", ".json"))
        rows.append(_row(scan, name, about))
        target = output / "thumbs" / f"{name}.png"
        source = derivatives / scan.path
        if not target.is_file() or target.stat().st_mtime_ns < source.stat().st_mtime_ns:
            thumbs.append(Thumb(str(source), str(target), grid))
    for _ in run_all(draw, thumbs, workers, "thumbnails"):
        pass
    for row, score in zip(rows, outlier_scores(rows), strict=True):
        row["z"] = score
    rows.sort(key=lambda row: (-len(row["flags"]), -row["z"], row["name"]))
    failures = read_table(derivatives / "failures.tsv") if (derivatives / "failures.tsv").is_file() else []
    data = {
        "rows": rows,
        "numbers": NUMBERS,
        "flags": FLAGS,
        "failures": failures,
        "recipe": {k: recipe.get(k) for k in ("atlas", "align", "strip", "bias", "versions")}
        | {"shape": list(grid.shape)},
    }
    # "<" as an escape: nothing in the data can end the script element
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    page = files("data_prep").joinpath("qc_page.html").read_text(encoding="utf-8")
    write_text(output / "index.html", page.replace("__DATA__", text))
    return len(rows)


def _row(scan: Scan, name: str, about: dict[str, Any]) -> dict[str, Any]:
    quality = about.get("quality", {})
    return {
        "name": name,
        "subject": scan.subject,
        "session": scan.session,
        "cohort": scan.cohort or "",
        "modality": scan.modality,
        "split": scan.split,
        "route": str(about.get("align", "")),
        "strip": str(about.get("strip", "")),
        "flags": [str(flag) for flag in about.get("flags", [])],
        "q": [quality.get(number) for number in NUMBERS],
    }


def outlier_scores(rows: list[dict[str, Any]]) -> list[float]:
    """Largest robust z (distance from the median over 1.4826 MAD) of each row's numbers, within its modality."""
    scores = np.zeros(len(rows))
    for modality in {row["modality"] for row in rows}:
        members = [i for i, row in enumerate(rows) if row["modality"] == modality]
        for column in range(len(NUMBERS)):
            values = np.array([rows[i]["q"][column] or 0.0 for i in members], float)
            off = np.abs(values - np.median(values))
            spread = 1.4826 * np.median(off)
            z = off / spread if spread > 0 else np.zeros(len(off))
            scores[members] = np.maximum(scores[members], z)
    return [round(float(min(score, 999.0)), 2) for score in scores]


def draw(thumb: Thumb) -> None:
    """Axial, coronal and sagittal plane through the atlas's center, with its outline; the patient's left is on the right
    of the first two (radiological), front is to the left of the third."""
    volume, affine = read_volume(thumb.source)
    outline = _outline(thumb.grid)
    center = (np.linalg.inv(affine) @ [*ATLAS_CENTER_MM, 1])[:3]
    i, j, k = (min(max(round(float(x)), 0), n - 1) for x, n in zip(center, volume.shape, strict=True))
    high = float(np.percentile(volume[volume > 0], 99)) if (volume > 0).any() else 1.0
    around = [slice(max(0, w.min() - 4), w.max() + 5) for w in np.nonzero(outline)]
    planes = []
    # LPS voxels: the first index runs to the patient's left, the second to the back, the third up
    for upright, index in (
        (False, (around[0], around[1], k)),
        (True, (around[0], j, around[2])),
        (True, (i, around[1], around[2])),
    ):
        plane = np.repeat(_square(np.clip(volume[index] / high, 0, 1))[..., None], 3, axis=2)
        edge = _square(outline[index].astype(np.float32)) > 0.3
        plane[edge] = 0.35 * plane[edge] + 0.65 * np.array(_OUTLINE)
        shown = np.swapaxes(plane, 0, 1)  # rows run down
        planes.append(shown[::-1] if upright else shown)
    part = f"{thumb.target}.part.png"
    picture.imsave(part, (np.concatenate(planes, axis=1) * 255).astype(np.uint8), metadata={"Software": None})  # type: ignore[dict-item]
    os.replace(part, thumb.target)


@lru_cache(maxsize=1)
def _outline(grid: Grid) -> np.ndarray:
    """The rim of the ICBM152 brain: every atlas of g3n lies around the same center."""
    _, brain = atlas_on(load_atlas("icbm152"), grid)
    return np.asarray(brain & ~ndimage.binary_erosion(brain))


def _square(plane: np.ndarray) -> np.ndarray:
    """[_SIDE, _SIDE]: the plane scaled to fit, centered on black."""
    factor = _SIDE / max(plane.shape)
    small = ndimage.zoom(plane, factor, order=1)[:_SIDE, :_SIDE]
    result = np.zeros((_SIDE, _SIDE))
    x, y = ((_SIDE - n) // 2 for n in small.shape)
    result[x : x + small.shape[0], y : y + small.shape[1]] = small
    return result


def _json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise G3nError(f"'{path}' is missing or damaged; give the folder that preprocess wrote") from error
    if not isinstance(tree, dict):
        raise G3nError(f"'{path}' is not a JSON object; give the folder that preprocess wrote")
    return tree
