"""Checkpoints: written whole or not at all, verified before they are read, and without a trace of the ranks that wrote them.

``runs/<name>/ckpt/step_00001200/`` holds whole float32 tensors in safetensors: ``model``, ``ema`` (the average) and AdamW's moments
``exp_avg`` and ``exp_avg_sq``; ``config.yaml``, ``cursors.json``, ``state.json`` and, written last, ``COMPLETE``: a hash of every
file. So any world size and ZeRO stage reads what any other wrote, and no pickle is ever opened. ``saver.py`` writes them.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from g3n.config import G3nError
from g3n.engine import ema
from g3n.engine.pieces import MOMENTS, moment, owned, publish_weights, restore_moments, shapes

log = logging.getLogger(__name__)
FORMAT = 2
TENSORS = ("model", "ema", *MOMENTS)
_STEP = re.compile(r"step_(\d{8})")


def step_folder(run: Path, step: int) -> Path:
    return run / "ckpt" / f"step_{step:08d}"


def part_folder(run: Path, step: int) -> Path:
    """Where a checkpoint lies until it is whole."""
    return run / "ckpt" / f".step_{step:08d}.part"


def unfinished(run: Path) -> list[Path]:
    """What saves that never ended left behind."""
    return sorted((run / "ckpt").glob(".step_*.part")) if (run / "ckpt").is_dir() else []


def prune(run: Path, keep_last: int, keep_every: int | None) -> None:
    """Remove all but the last ``keep_last`` checkpoints and those whose step ``keep_every`` divides."""
    for folder in finished_steps(run)[:-keep_last]:
        if keep_every is None or int(folder.name.removeprefix("step_")) % keep_every:
            shutil.rmtree(folder, ignore_errors=True)


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
        if hash_file(path) != expected:
            return f"file '{name}' is damaged (its checksum differs)"
    extra = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} - set(hashes) - {"COMPLETE"}
    return f"file '{min(extra)}' does not belong to it" if extra else None


def check_state(
    folder: Path,
    state: Mapping[str, Any],
    config: Mapping[str, Any],
    allowed: Sequence[str] = (),
    completed: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
) -> dict[str, Any]:
    """The checkpoint's state.json. Raises G3nError where this run differs from it in anything that changes the result.

    Keys of ``config`` that are or begin with one of ``allowed`` may differ; they are logged. ``completed`` gives keys that the
    checkpoint's version did not know their defaults.
    """
    saved = json.loads((folder / "state.json").read_text())
    if saved.get("format") != FORMAT:
        raise G3nError(
            f"checkpoint '{folder}' has format {saved.get('format', 1)}, this version reads {FORMAT}; "
            f"train on with the version that wrote it (env.json), or start a run of another name"
        )
    if saved["task"] != state["task"]:
        raise G3nError(f"checkpoint '{folder}' was written by task {saved['task']}, this run is {state['task']}")
    before, now = flat(completed(saved["config"])), flat(config)
    changed = [k for k in sorted({*before, *now}) if before.get(k) != now.get(k) and not k.startswith(FREE_KEYS)]
    refused = [k for k in changed if not k.startswith(tuple(allowed))]
    if refused:
        lines = "; ".join(f"{k}: {before.get(k)!r} -> {now.get(k)!r}" for k in refused[:10])
        more = f"; and {len(refused) - 10} more" if len(refused) > 10 else ""
        raise G3nError(
            f"the config differs from that of checkpoint '{folder}' ({lines}{more}); set it back, start a run of another "
            f"name, or allow it with 'allow_changes=[{','.join(refused[:10])}]'"
        )
    for key in changed:
        log.warning("config key %s is now %r, the checkpoint was written with %r", key, now.get(key), before.get(key))
    if saved["artifact"] != state["artifact"]:
        raise G3nError(
            f"the inputs of checkpoint '{folder}' changed ({saved['artifact']} before, {state['artifact']} now)"
        )
    return dict(saved)


# What may change when a run goes on: where it reads and writes, how it is split up, what it says. Nothing here changes what is learned.
FREE_KEYS = (
    "name",
    "runs",
    "allow_changes",
    "tracking.",
    "data.shards",  # the artifact holds their fingerprint
    "data.workers",
    "data.prefetch",
    "data.cache",
    "data.keep_gib",
    "trainer.micro_batch",
    "trainer.zero_stage",
    "trainer.offload",
    "trainer.recompute",
    "trainer.compile",
    "trainer.log_every",
    "trainer.eval_",
    "trainer.save_every",
    "trainer.keep_",
    "trainer.panels",
    "trainer.max_skipped",
    "trainer.stuck_seconds",
    "trainer.spike_",
)


@torch.no_grad()
def load(folder: Path, engine: Any, optimizer_steps: int) -> tuple[ema.Average, dict[str, Any]]:
    """Read this rank's pieces into ``engine``; returns the average and the data cursors. Collective; ``folder`` was verified by find.

    Raises G3nError where the checkpoint is of another model.
    """
    restore_moments(engine, optimizer_steps)
    average = ema.start_average(engine)
    pieces = owned(engine)
    for file in TENSORS:
        path = folder / f"{file}.safetensors"
        try:
            with safe_open(path, framework="pt") as tensors:
                _check_shapes(path, tensors, shapes(engine))
                for piece in pieces:
                    target = {"model": piece.weight, "ema": average[piece.name]}.get(file)
                    target = moment(engine, piece, file) if target is None else target
                    target.copy_(tensors.get_tensor(piece.name).flatten().narrow(0, piece.start, piece.numel))
                if file == "model":
                    for name, buffer in engine.module.named_buffers():
                        buffer.copy_(tensors.get_tensor(name))
        except (OSError, SafetensorError) as error:
            raise G3nError(f"'{path}' cannot be read ({error}); resume from an earlier step folder") from error
    publish_weights(engine)
    return average, json.loads((folder / "cursors.json").read_text())


def _check_shapes(path: Path, tensors: Any, expected: Mapping[str, tuple[int, ...]]) -> None:
    there = set(tensors.keys())
    for name, shape in expected.items():
        found = tuple(tensors.get_slice(name).get_shape()) if name in there else None
        if found != shape:
            raise G3nError(f"'{path}' has {name} of shape {found}, the model's is {shape}; it is of another model")


def write_atomically(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix[:-1]: tree}
    return {k: v for key, value in tree.items() for k, v in flat(value, f"{prefix}{key}.").items()}


def hash_file(path: Path) -> str:
    """Hex xxh3_64 of a file's bytes."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
