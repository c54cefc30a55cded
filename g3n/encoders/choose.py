"""From what a user writes after ``--encoder`` to an encoder."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from g3n.config import G3nError, did_you_mean
from g3n.encoders.contract import Encoder

WITH_FILE = ("monai-mae", "medicalnet10", "medicalnet18", "medicalnet34", "medicalnet50", "brainiac", "brainsegfounder")
NAMES = (*WITH_FILE, "voxel-pca", "tissue-volumes")
USAGE = "a run folder, " + ", ".join(f"{name}:FILE" for name in WITH_FILE) + ", voxel-pca[:FILE] or tissue-volumes"


def open_encoder_of(text: str, device: torch.device, config: Path | None = None, flat: bool = False) -> Encoder:
    """``runs/demo/decoder`` (or a step folder), ``name:FILE``, or a name alone (``voxel-pca`` only with a file: fitting is
    ``g3n.embed``'s). Raises G3nError for anything else, and for an option that the encoder does not have."""
    name, colon, file = text.partition(":")
    known = name in NAMES
    if config is not None and name != "monai-mae":
        raise G3nError("--encoder-config is for monai-mae:FILE alone; leave it out")
    if flat and known:
        raise G3nError("--all-tokens is for a run of the decoder task; leave it out")
    if not known:
        if not Path(text).is_dir():
            close = did_you_mean(name, NAMES) if colon or not re.search(r"[/\\.]", text) else f"; expected {USAGE}"
            raise G3nError(f"encoder '{text}' is no run folder and no known name{close}")
        from g3n.encoders.ours import open_ours

        return open_ours(Path(text), device, flat)
    if name == "tissue-volumes":
        from g3n.encoders.tissue_volumes import open_tissue_volumes

        return open_tissue_volumes()
    if not file:
        raise G3nError(f"encoder '{name}' needs its file; write {name}:FILE")
    path = Path(file)
    if name == "voxel-pca":
        from g3n.encoders.voxel_pca import open_voxel_pca

        return open_voxel_pca(path, device)
    if name == "monai-mae":
        from g3n.encoders.monai_mae import open_monai_mae

        return open_monai_mae(path, config, device)
    if name == "brainiac":
        from g3n.encoders.brainiac import open_brainiac

        return open_brainiac(path, device)
    if name == "brainsegfounder":
        from g3n.encoders.brainsegfounder import open_brainsegfounder

        return open_brainsegfounder(path, device)
    from g3n.encoders.medicalnet import open_medicalnet

    return open_medicalnet(int(name.removeprefix("medicalnet")), path, device)
