"""Checkpoints: written whole or not at all, verified before they are read.

``runs/<name>/ckpt/step_00001200/`` holds DeepSpeed's own files (``engine/``), consolidated weights (``model.safetensors``,
``ema.safetensors``), ``config.yaml``, ``cursors.json``, ``state.json`` and, written last, ``COMPLETE``: a hash of every file.
DeepSpeed's files are pickles, so they are opened only when these hashes match.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
import xxhash
from safetensors.torch import load_file, save_file

from g3n.config import G3nError
from g3n.engine import ema

log = logging.getLogger(__name__)
_STEP = re.compile(r"step_(\d{8})")


def step_folder(run: Path, step: int) -> Path:
    return run / "ckpt" / f"step_{step:08d}"


def save(
    run: Path,
    step: int,
    engine: Any,
    average: ema.Fragments,
    config_yaml: str,
    cursors: Mapping[str, Any],
    state: Mapping[str, Any],
    keep_last: int,
) -> Path:
    """Write the checkpoint of ``step`` under a temporary name, hash it, rename it, point ``latest`` at it. Collective."""
    final = step_folder(run, step)
    part = final.with_name(f".{final.name}.part")
    main = dist.get_rank() == 0
    if main:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(part), tag="engine", save_latest=False)
    for name, pieces in (("model", ema.fragments(engine)), ("ema", average)):
        weights = ema.gather(engine, pieces)
        if weights is not None:
            save_file(weights, part / f"{name}.safetensors")
            del weights
    dist.barrier()
    if main:
        (part / "config.yaml").write_text(config_yaml)
        (part / "cursors.json").write_text(json.dumps(dict(cursors)))
        (part / "state.json").write_text(json.dumps(dict(state), indent=1))
        files = sorted(p for p in part.rglob("*") if p.is_file())
        hashes = {p.relative_to(part).as_posix(): _hash(p) for p in files}
        write_atomically(part / "COMPLETE", json.dumps(hashes, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(part, final)
        write_atomically(run / "latest", final.name)
        for old in finished_steps(run)[:-keep_last]:
            shutil.rmtree(old, ignore_errors=True)
    dist.barrier()
    return final


def finished_steps(run: Path) -> list[Path]:
    """Committed checkpoints, oldest first; whether they are intact is another question."""
    folders = (run / "ckpt").glob("step_*") if (run / "ckpt").is_dir() else iter(())
    return sorted(f for f in folders if _STEP.fullmatch(f.name) and (f / "COMPLETE").is_file())


def find(run: Path, resume: str) -> Path | None:
    """The checkpoint to go on from, verified. ``resume``: auto (the newest intact one, None where there is none), never, or a step folder.

    Raises G3nError where a named folder is no intact checkpoint, every checkpoint is damaged, or ``never`` meets checkpoints.
    """
    found = finished_steps(run)
    if resume == "never":
        if found:
            raise G3nError(
                f"'{run}' already holds {found[-1].name}; choose another name=..., remove it, or --resume auto"
            )
        return None
    if resume != "auto":
        damage = damaged(Path(resume))
        if damage:
            raise G3nError(
                f"--resume '{resume}': {damage}; name a finished step folder such as runs/mae/ckpt/step_00001200"
            )
        return Path(resume)
    for folder in reversed(found):
        damage = damaged(folder)
        if damage is None:
            return folder
        log.warning("checkpoint '%s' is left aside: %s", folder, damage)
    if found:
        raise G3nError(
            f"every checkpoint under '{run}/ckpt' is damaged ({damaged(found[-1])}); remove them to start again"
        )
    return None


def damaged(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None: each file is there with the hash it was written with, and no other."""
    try:
        hashes = json.loads((folder / "COMPLETE").read_text())
    except (OSError, ValueError):
        return "it has no readable COMPLETE"
    for name, expected in hashes.items():
        path = folder / name
        if not path.is_file():
            return f"file '{name}' is missing"
        if _hash(path) != expected:
            return f"file '{name}' is damaged (its checksum differs)"
    extra = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - set(hashes) - {"COMPLETE"}
    return f"file '{min(extra)}' does not belong to it" if extra else None


def check_state(folder: Path, state: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The checkpoint's state.json. Raises G3nError where this run differs from it in anything that changes the result."""
    saved = json.loads((folder / "state.json").read_text())
    for key, label in (("task", "task"), ("world", "world size"), ("zero_stage", "trainer.zero_stage")):
        if saved[key] != state[key]:
            raise G3nError(
                f"checkpoint '{folder}' was written with {label} {saved[key]}, this run has {state[key]}; resume with the same"
            )
    before = flat(saved["config"])
    changed = [k for k, v in flat(config).items() if before.get(k) != v and not k.startswith(FREE_KEYS)]
    if changed:
        key = changed[0]
        raise G3nError(
            f"checkpoint '{folder}' was written with {key} = {before.get(key)!r}, this run has {flat(config)[key]!r} "
            f"({len(changed)} keys differ); set it back or start a run of another name"
        )
    if saved["artifact"] != state["artifact"]:
        raise G3nError(
            f"the inputs of checkpoint '{folder}' changed ({saved['artifact']} before, {state['artifact']} now)"
        )
    return dict(saved)


# What may change when a run goes on: nothing here touches the weights.
FREE_KEYS = (
    "name",
    "runs",
    "tracking.",
    "data.workers",
    "data.prefetch",
    "data.cache",
    "trainer.log_every",
    "trainer.eval_",
    "trainer.save_every",
    "trainer.keep_last",
    "trainer.panels",
    "trainer.max_skipped",
    "trainer.stuck_seconds",
)


def load(folder: Path, engine: Any) -> tuple[ema.Fragments, dict[str, Any]]:
    """Load weights and optimizer into ``engine``; returns the average and the data cursors. ``folder`` was verified by find."""
    path, _ = engine.load_checkpoint(str(folder), tag="engine")
    if path is None:
        raise G3nError(f"DeepSpeed could not load '{folder}/engine'; resume from an earlier step folder")
    average = ema.scatter(engine, load_file(folder / "ema.safetensors"))
    return average, json.loads((folder / "cursors.json").read_text())


def write_atomically(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix[:-1]: tree}
    return {k: v for key, value in tree.items() for k, v in flat(value, f"{prefix}{key}.").items()}


def _hash(path: Path) -> str:
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
