"""``g3n embed``: features of every scan of a cohort from a frozen encoder, in one Parquet file. A call that was stopped goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from g3n.config import G3nError
from g3n.encoders.choose import open_encoder_of
from g3n.encoders.contract import Encoder, Scans
from g3n.encoders.voxel_pca import MAX_FIT, fit_voxel_pca, open_voxel_pca, pooled
from g3n.encoders.weights import KeyReport
from g3n.evaluate.feature_map import MIN_POINTS, check_umap, write_feature_map
from g3n.evaluate.report import claim
from g3n.features import Features, join_features, read_about, read_features, write_features
from g3n.latent import pick_device
from g3n.meters import progress_bar
from g3n.names import hash_label, read_key
from g3n.nifti import Grid
from g3n.scans import LeftOut, Loaded, Part, Source, image_scans, same_grid, shard_scans, training_scans
from g3n.stream.files import local_path

READERS = min(8, os.cpu_count() or 2)  # threads
REMOTE_READERS = 16  # storage far away is waited for more than it is worked on
SHOWN = 3
LARGEST_BRAIN_ML = 2200.0  # no brain with its CSF is larger; a head is


@dataclass(frozen=True)
class Images:
    """What ``g3n embed`` reads where it reads files; see ``g3n.scans.image_scans``."""

    path: Path
    variables: Path | None = None
    key: Path | None = None  # default: subjects.key beside the output
    keep_names: bool = False
    center: bool = False


@dataclass(frozen=True)
class Done:
    """``left_out``: (key, why) of scans without features."""

    rows: int
    left_out: tuple[tuple[str, str], ...]
    encoder: Encoder


def embed(
    encoder_text: str,
    inputs: str | Images,
    output: Path,
    device: str | None = None,
    batch: int = 8,
    config: Path | None = None,
    flat: bool = False,
) -> Done:
    """Write ``output`` (``g3n.features``), a row a scan in the order of the input, whatever the batch.

    inputs: volume shards (folder or URL), or ``Images``; of these also ``<output>.names.tsv`` says which key is which file, where names are
    hashed. Parts lie in ``<output>.parts`` until all are there. ``voxel-pca`` without a file is fitted on the train split of the
    shards first, into ``<output>.pca.safetensors``. ``about`` of the features has encoder, fingerprint, input, arithmetic and what was left out.
    Raises G3nError for wrong inputs, another recipe's parts or output, and where no scan can be encoded.
    """
    if output.suffix != ".parquet":
        raise G3nError(f"--output '{output}' must end in .parquet")
    where = pick_device(device)
    if encoder_text == "voxel-pca":
        encoder = _fitted_pca(inputs, output.with_suffix(".pca.safetensors"), where, batch)
    else:
        encoder = open_encoder_of(encoder_text, where, config, flat)
    source = _open(inputs, encoder.grid, output)
    recipe = {
        "encoder": encoder.name,
        "fingerprint": encoder.fingerprint,
        "encoder_about": dict(encoder.about),
        "all_tokens": flat,
        "arithmetic": "bf16" if where.type == "cuda" else "fp32",
        **source.about,
    }
    recipe = json.loads(json.dumps(recipe))
    folder = output.with_suffix(".parts")
    if output.exists():
        done = _as_before(output, recipe, encoder)
        shutil.rmtree(folder, ignore_errors=True)  # of a call that was stopped right after it had joined them
        return done
    try:
        claim(folder, recipe)
    except G3nError as error:
        raise G3nError(
            f"'{folder}' holds parts of another encoder or input; remove it, or give another --output"
        ) from error
    _write_names(output, source, inputs)
    write_parts(source, encoder, folder, where, batch, readers_of(inputs))
    return _join(source, folder, output, recipe, encoder)


def embed_and_draw(
    encoder_text: str, inputs: str | Images, output: Path, device: str | None, batch: int, config: Path | None, flat: bool,
    umap: bool | None,
) -> list[str]:  # fmt: skip
    """``embed`` and ``<output>.png`` (``g3n.evaluate.feature_map``); lines that say what was done."""
    if umap:
        check_umap()
    done = embed(encoder_text, inputs, output, device, batch, config, flat)
    lines = [f"encoder {done.encoder.name}, fingerprint {done.encoder.fingerprint}"]
    if "keys" in done.encoder.about:
        lines.append(f"{KeyReport(**done.encoder.about['keys'])}")
    widths = read_about(output)[2]
    features = read_features(output, list(widths)[:1])
    told = ", ".join(f"{kind} [{width}]" for kind, width in widths.items())
    lines.append(f"{done.rows} scans in {output}: {told}")
    if done.left_out:
        lines.append(f"{len(done.left_out)} scans left out:")
        lines += [f"  {key}: {why}" for key, why in done.left_out[:SHOWN]]
    heads = int((features.table.get("foreground_ml", pd.Series(dtype=float)) > LARGEST_BRAIN_ML).sum())
    if heads:
        lines.append(
            f"warning: {heads} scans have more than {LARGEST_BRAIN_ML:g} mL of foreground; are they skull-stripped?"
        )
    if len(features) >= MIN_POINTS:
        picture = output.with_suffix(".png")
        lines.append(f"picture {picture}: {' and '.join(write_feature_map(features, picture, umap))}")
    if not isinstance(inputs, str) and not inputs.keep_names:
        lines.append(f"names in {output.with_suffix('.names.tsv')}: keep it and the key to yourself")
    return lines


def _open(inputs: str | Images, grid: Grid | None, output: Path) -> Source:
    if isinstance(inputs, str):
        return shard_scans(inputs, grid)
    if not inputs.path.exists():
        raise G3nError(
            f"images '{inputs.path}' do not exist; give a folder of NIfTI files or a table with a column 'path'"
        )
    key = None if inputs.keep_names else read_key(inputs.key or output.parent / "subjects.key", output)
    source = image_scans(inputs.path, grid, inputs.variables, key, inputs.center)
    names = "kept" if key is None else hash_label("names", key)  # another key gives other names
    return Source({**source.about, "names": names}, source.grid, source.parts, source.names)


def _as_before(output: Path, recipe: Mapping[str, Any], encoder: Encoder) -> Done:
    """What an earlier call wrote. Raises G3nError where that was another recipe's."""
    about, rows, _ = read_about(output)
    left_out = tuple((key, why) for key, why in about.pop("left_out", []))
    if about != recipe:
        other = sorted(name for name in {*about, *recipe} if about.get(name) != recipe.get(name))
        raise G3nError(f"'{output}' holds other features (its {', '.join(other)} differs); give another --output")
    return Done(rows, left_out, encoder)


def readers_of(inputs: str | Images) -> int:
    return REMOTE_READERS if isinstance(inputs, str) and local_path(inputs) is None else READERS


def _write_names(output: Path, source: Source, inputs: str | Images) -> None:
    if isinstance(inputs, str) or inputs.keep_names:
        return
    part = output.with_name(f".{output.stem}.names.part")
    with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", newline="") as file:
        pd.DataFrame(source.names, columns=["key", "subject", "path"]).to_csv(file, sep="\t", index=False)
    part.replace(output.with_suffix(".names.tsv"))


def write_parts(source: Source, encoder: Encoder, folder: Path, device: torch.device, batch: int, readers: int) -> None:
    """Each part that is not there yet. Batches go across parts, so that small shards do not make small batches."""
    todo = [part for part in source.parts if not (folder / f"{part.name}.parquet").is_file()]
    with progress_bar() as progress:
        total = sum(len(part.reads) for part in source.parts)
        bar = progress.add_task("embed", total=total, completed=total - sum(len(part.reads) for part in todo))
        open_parts = deque((part, _Rows([], [], [])) for part in todo)
        started: tuple[list[Loaded | str], dict[str, Tensor]] | None = None
        for chunk in _chunks(read_ahead(todo, readers, batch + readers), batch):
            good = [read for read in chunk if isinstance(read, Loaded)]
            features = encoder.features(scans_of(good, source.grid, device)) if good else {}
            if started:  # a GPU works on this batch while the last one is put away
                _put_away(*started, open_parts, folder)
                progress.advance(bar, len(started[0]))
            started = chunk, features
        if started:
            _put_away(*started, open_parts, folder)
            progress.advance(bar, len(started[0]))


def _put_away(
    chunk: Sequence[Loaded | str],
    features: Mapping[str, Tensor],
    open_parts: deque[tuple[Part, _Rows]],
    folder: Path,
) -> None:
    """Rows of a batch to the parts they belong to; parts that are full are written."""
    values = _rows_of(features)
    for read in chunk:
        _close_full(open_parts, folder)
        part, rows = open_parts[0]
        rows.add(part.keys[rows.seen], read, next(values) if isinstance(read, Loaded) else {})
    _close_full(open_parts, folder)


@dataclass(frozen=True)
class _Rows:
    """Of a part, as far as it has come."""

    table: list[dict[str, Any]]
    values: list[dict[str, np.ndarray]]
    left_out: list[tuple[str, str]]

    @property
    def seen(self) -> int:
        return len(self.table) + len(self.left_out)

    def add(self, key: str, read: Loaded | str, values: dict[str, np.ndarray]) -> None:
        if isinstance(read, str):
            self.left_out.append((key, read))
        elif not all(np.isfinite(value).all() for value in values.values()):
            self.left_out.append((key, "its features are not finite"))
        else:
            self.table.append(read.row)
            self.values.append(values)


def _close_full(open_parts: deque[tuple[Part, _Rows]], folder: Path) -> None:
    while open_parts and open_parts[0][1].seen == len(open_parts[0][0].reads):
        part, rows = open_parts.popleft()
        kinds = rows.values[0] if rows.values else {}
        arrays = {kind: np.stack([value[kind] for value in rows.values]) for kind in kinds}
        table = pd.DataFrame(rows.table) if rows.table else pd.DataFrame({"key": pd.Series([], dtype=object)})
        write_features(folder / f"{part.name}.parquet", Features(table, arrays, {"left_out": rows.left_out}))


def _chunks(reads: Iterator[Loaded | str], size: int) -> Iterator[list[Loaded | str]]:
    chunk: list[Loaded | str] = []
    for read in reads:
        chunk.append(read)
        if sum(isinstance(one, Loaded) for one in chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def read_ahead(parts: Sequence[Part], readers: int, ahead: int) -> Iterator[Loaded | str]:
    """Every scan of the parts in order, or why it cannot be had; at most ``ahead`` are read beyond the one in use."""
    with ThreadPoolExecutor(readers) as pool:
        coming: deque[Future[Loaded]] = deque()
        try:
            for part in parts:
                for read in part.reads:
                    coming.append(pool.submit(read))
                    if len(coming) > ahead:
                        yield _result(coming.popleft())
            while coming:
                yield _result(coming.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _result(future: Future[Loaded]) -> Loaded | str:
    try:
        return future.result()
    except LeftOut as error:
        return str(error)


def scans_of(loaded: Sequence[Loaded], grid: Grid, device: torch.device) -> Scans:
    """The batch of some scans on a device; float32 where one of them is."""
    volume = torch.from_numpy(np.stack([one.volume for one in loaded])).to(device)
    mean = torch.tensor([one.mean for one in loaded], dtype=torch.float32, device=device)
    rstd = torch.tensor([1 / one.std for one in loaded], dtype=torch.float32, device=device)
    return Scans(volume, mean, rstd, grid, tuple(str(one.row.get("modality") or "") for one in loaded))


def _rows_of(features: Mapping[str, Tensor]) -> Iterator[dict[str, np.ndarray]]:
    arrays = {kind: value.float().cpu().numpy() for kind, value in features.items()}
    for i in range(min(map(len, arrays.values()), default=0)):
        yield {kind: array[i] for kind, array in arrays.items()}


def _join(source: Source, folder: Path, output: Path, recipe: Mapping[str, Any], encoder: Encoder) -> Done:
    paths = [folder / f"{part.name}.parquet" for part in source.parts]
    left_out = [(str(key), str(why)) for path in paths for key, why in read_about(path)[0].get("left_out", [])]
    total = sum(len(part.reads) for part in source.parts)
    if len(left_out) == total:
        shutil.rmtree(folder)
        raise G3nError(
            f"none of the {total} scans can be encoded; the first: {left_out[0][1]}" if total else "no scans"
        )
    keys_only = [(key, _without_names(why, source)) for key, why in left_out]
    rows = join_features(paths, output, {**recipe, "left_out": keys_only})
    shutil.rmtree(folder)
    return Done(rows, tuple(left_out), encoder)


def _without_names(why: str, source: Source) -> str:
    """Reasons quote the file's name; features may be passed on."""
    return "it cannot be read or has no brain on the grid" if source.names else why


def _fitted_pca(inputs: str | Images, path: Path, device: torch.device, batch: int) -> Encoder:
    """Fit on the train split (at most ``MAX_FIT`` scans, evenly taken), or open what an earlier call fitted on the same shards."""
    if not isinstance(inputs, str):
        raise G3nError(
            "voxel-pca is fitted on the train split of shards; give --shards, or voxel-pca:FILE of an earlier fit"
        )
    source = shard_scans(inputs, None)
    if path.is_file():
        encoder = open_voxel_pca(path, device)
        same = encoder.about.get("shards") == source.about["shards"]
        if not same or encoder.grid is None or not same_grid(encoder.grid, source.grid):
            raise G3nError(f"'{path}' was fitted on other shards; write voxel-pca:{path} to use it, or remove it")
        return encoder
    reads = training_scans(source)
    chosen = [reads[int(i)] for i in np.linspace(0, len(reads) - 1, min(len(reads), MAX_FIT))] if reads else []
    train = Part("train", ("",) * len(chosen), tuple(chosen))
    rows: list[np.ndarray] = []
    with progress_bar() as progress:
        bar = progress.add_task("voxel-pca: read train split", total=len(chosen))
        for chunk in _chunks(read_ahead([train], readers_of(inputs), batch + READERS), batch):
            good = [read for read in chunk if isinstance(read, Loaded)]
            rows += list(pooled(scans_of(good, source.grid, device)).cpu().numpy()) if good else []
            progress.advance(bar, len(chunk))
    fit_voxel_pca(rows, source.grid, {"shards": source.about["shards"]}, path)
    return open_voxel_pca(path, device)
