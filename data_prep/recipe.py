"""What determines a preprocessed volume, besides the scan."""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.atlas import Atlas, load_atlas
from data_prep.shards import fingerprint_of
from g3n.config import G3nError, build, to_plain
from g3n.nifti import Grid

VERSION = 3
KEYS = ("preprocess", "align", "strip", "strip_command", "bias", "atlas", "grid")


@dataclass(frozen=True)
class Recipe:
    """``align`` header, center or affine; ``strip`` none, deepbet, robex or command; ``bias`` none or n4."""

    shape: tuple[int, int, int]
    spacing_mm: float
    align: str = "header"
    strip: str = "none"
    bias: str = "none"
    atlas_name: str = "icbm152"
    atlas_file: str | None = None
    strip_command: str | None = None

    @property
    def atlas(self) -> Atlas:
        return load_atlas(self.atlas_name, self.atlas_file)

    @property
    def grid(self) -> Grid:
        return self.atlas.grid(self.shape, self.spacing_mm)

    def describe(self) -> dict[str, Any]:
        """The recipe as it is written beside the volumes; ``fingerprint`` covers all the rest but the versions."""
        what = {
            "preprocess": VERSION,
            "align": self.align,
            "strip": self.strip,
            # a command may name a folder, and a folder a person
            "strip_command": fingerprint_of(self.strip_command) if self.strip == "command" else None,
            "bias": self.bias,
            "atlas": {"name": self.atlas.name, "checksum": self.atlas.checksum},
            "grid": to_plain(self.grid),
        }
        tools = ["g3n", "numpy", "scipy", "nibabel", "nilearn"]
        tools += ["antspyx"] * ("affine" in self.align or self.bias == "n4") + ["deepbet"] * (self.strip == "deepbet")
        return {**what, "fingerprint": fingerprint_of(what), "versions": {name: _version(name) for name in tools}}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def parse_shape(text: str) -> tuple[int, int, int]:
    """'40,48,40' -> (40, 48, 40)."""
    try:
        x, y, z = (int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise G3nError(f"shape is '{text}'; expected three whole numbers such as 160,192,160") from None
    return x, y, z


def read_recipe(manifest_path: Path) -> tuple[dict[str, Any], Grid]:
    """The fingerprint and grid that preprocess wrote beside its manifest. Raises G3nError where they are missing."""
    path = manifest_path.with_name("recipe.json")
    if not path.is_file():
        raise G3nError(f"'{manifest_path.parent}' has no recipe.json; give the manifest.tsv that preprocess wrote")
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
        return {"fingerprint": str(recipe["fingerprint"])}, build(Grid, recipe["grid"], "grid")
    except (ValueError, KeyError, TypeError) as error:
        raise G3nError(f"'{path}' is damaged; run preprocess again") from error
