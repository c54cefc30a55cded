"""g3n: training and use of BrainG3N (arXiv 2606.19651). ``g3n.load(folder)`` opens an exported model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from g3n.exported import Model


def load(path: str | Path, device: str | None = None) -> Model:
    """The model in a folder that ``g3n export`` wrote: ``encode``, ``decode``, ``sample``, ``forecast``.

    ``device`` is cpu or cuda (default: the GPU if there is one). Raises G3nError where the folder is not one, is damaged or
    has been changed.
    """
    from g3n import exported  # torch comes with it, and importing g3n shall stay light

    return exported.load(path, device)
