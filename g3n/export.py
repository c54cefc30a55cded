"""From a run to a folder one can pass on: weights, config.json and a model card, in the layout of the Hugging Face hub."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from g3n.config import G3nError, build, to_plain
from g3n.evaluate.privacy import FORMAT as AUDIT_FORMAT
from g3n.evaluate.report import leaves
from g3n.exported import FORMAT, WEIGHTS, Fingerprints, FlowConfig, ModelConfig
from g3n.generate import Generator, open_forecaster, open_generator
from g3n.models.decoder import TokenizerConfig
from g3n.models.mae import MAEConfig
from g3n.models.pretrained import fingerprint, open_run
from g3n.stream.index import ShardIndex
from g3n.stream.lanes import StreamConfig
from g3n.stream.sources import open_shards
from g3n.tasks.dit import DiTTaskConfig
from g3n.tasks.forecast import ForecastTaskConfig

MAX_JSON_BYTES = 1 << 24
LICENSES = {
    "open": "open",
    "nc": "not for commercial use",
    "dua": "under a data use agreement",
    "unknown": "license unknown",
}


_SETTINGS = ("count", "seed", "steps", "step", "guidance", "shift", "draws", "neighbors", "ms_ssim_scales")


def export(
    run: str | Path,
    output: Path,
    forecaster: str | Path | None = None,
    audit: Path | None = None,
    without_audit: bool = False,
    metrics: Sequence[Path] = (),
) -> Path:
    """Write the model of a ``dit`` run (EMA weights), with a ``forecast`` run beside it where given, to the new folder ``output``.

    ``audit`` is the audit.json of ``g3n audit`` on the same weights; ``metrics`` are metrics.json files of ``g3n evaluate``,
    whose figures go into the card. Written under another name and renamed. Raises G3nError for an existing folder with
    something in it, runs that do not belong together, weights that are not finite, a missing audit (unless
    ``without_audit``), or the audit of other weights.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise G3nError(f"'{output}' holds something already; give a new folder")
    if audit is not None and without_audit:
        raise G3nError("give either --audit or --without-audit")
    if audit is None and not without_audit:
        raise G3nError(
            "a generator may repeat the people it was trained on; run g3n audit and give its audit.json as --audit, or "
            "export --without-audit"
        )
    generator = open_generator(run, "cpu")
    second = None if forecaster is None else open_forecaster(forecaster, "cpu")
    config = model_config(generator, second)
    audited = None if audit is None else read_audit(audit, config.fingerprints)
    card = model_card(config, audited, [(path.parent.name, read_json(path)) for path in metrics])
    parts: dict[str, Mapping[str, Tensor]] = {
        "encoder": generator.space.encoder.state_dict(),
        "tokenizer": generator.space.tokenizer.state_dict(),
        "generator": generator.run.weights,
    }
    if second is not None:
        parts["forecaster"] = second.run.weights
    for part, weights in parts.items():
        for name, tensor in weights.items():
            if not bool(tensor.isfinite().all()):
                raise G3nError(f"the {part}'s weight '{name}' has numbers that are not finite; export an earlier step")
    part_folder = output.with_name(f".{output.name}.part")
    shutil.rmtree(part_folder, ignore_errors=True)
    for part, weights in parts.items():
        (part_folder / part).mkdir(parents=True)
        contiguous = {name: tensor.float().contiguous() for name, tensor in weights.items()}
        save_file(contiguous, part_folder / part / WEIGHTS, metadata={"format": "pt"})
    (part_folder / "config.json").write_text(json.dumps(to_plain(config), indent=1) + "\n")
    (part_folder / "README.md").write_text(card)
    if audited is not None:
        (part_folder / "audit.json").write_text(json.dumps(audited, indent=1) + "\n")
    os.replace(part_folder, output)
    return output


def model_config(generator: Generator, forecaster: Generator | None) -> ModelConfig:
    """config.json's content. Raises G3nError where the two do not share a tokenizer or a grid."""
    run, space = generator.run, generator.space
    task = build(DiTTaskConfig, run.config["model"], "model")
    tokenizer_run = open_run(task.tokenizer, "decoder")
    encoder_run = open_run(tokenizer_run.config["model"]["encoder"], "mae")
    second = None
    if forecaster is not None:
        if forecaster.space.tokenizer_fingerprint != space.tokenizer_fingerprint or forecaster.grid != generator.grid:
            raise G3nError(
                f"'{forecaster.run.path}' and '{run.path}' have different tokenizers or grids; train both on one"
            )
        its = build(ForecastTaskConfig, forecaster.run.config["model"], "model")
        second = FlowConfig(its.net, its.noise, forecaster.run.step, its.shift, its.history, its.tau_years)
    return ModelConfig(
        format=FORMAT,
        g3n_version=_version(),
        grid=generator.grid,
        encoder=build(MAEConfig, encoder_run.config["model"]["net"], "model.net"),
        tokenizer=build(TokenizerConfig, tokenizer_run.config["model"]["net"], "model.net"),
        generator=FlowConfig(task.net, generator.start_noise, run.step, task.shift),
        forecaster=second,
        fingerprints=Fingerprints(
            encoder=fingerprint(space.encoder.state_dict()),
            tokenizer=space.tokenizer_fingerprint,
            generator=fingerprint(run.weights),
            volumes=space.volumes_fingerprint,
            latents=run.artifact["latents"],
            forecaster=None if forecaster is None else fingerprint(forecaster.run.weights),
        ),
        training=training_data(run.config, tokenizer_run.config),
    )


def training_data(generator: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """Counts of the train split and its scans by license, as far as the shards of both configs are still there."""
    volumes, latents = _index(tokenizer), _index(generator)
    about: dict[str, Any] = {}
    for name, index in (("tokenizer", volumes), ("generator", latents)):
        if index is not None and "train" in index.splits:
            samples = [sample for shard in index.shards("train") for sample in shard.samples]
            about[name] = {"scans": sum(s.visits for s in samples), "subjects": len({s.subject for s in samples})}
    if volumes is not None and len(volumes.sources) == 1 and isinstance(volumes.raw.get("licenses"), Mapping):
        about["licenses_of_all_splits"] = {str(k): int(n) for k, n in volumes.raw["licenses"].items()}
    return about


def _index(config: Mapping[str, Any]) -> ShardIndex | None:
    try:
        return open_shards(build(StreamConfig, config["data"], "data"))
    except G3nError:  # moved or gone: a card without counts is still a card
        return None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of at most 16 MiB. Raises G3nError for anything else."""
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
        tree = json.loads(text) if len(text) <= MAX_JSON_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise G3nError(f"'{path}' is no readable JSON file ({' '.join(str(error).split())[:200]})") from error
    if not isinstance(tree, dict):
        raise G3nError(f"'{path}' is no JSON object of at most {MAX_JSON_BYTES} bytes")
    return tree


def read_audit(path: Path, prints: Fingerprints) -> dict[str, Any]:
    """audit.json. Raises G3nError where it is none, or of other weights."""
    tree = read_json(path)
    if tree.get("format") != AUDIT_FORMAT or not isinstance(tree.get("verdict"), str):
        raise G3nError(f"'{path}' is no {AUDIT_FORMAT} file; give the audit.json that g3n audit wrote")
    for name in ("generator", "tokenizer"):
        if tree.get(name) != getattr(prints, name):
            raise G3nError(
                f"'{path}' audits the {name} {tree.get(name)!r:.80}, these weights are {getattr(prints, name)!r}; "
                f"run g3n audit on this run"
            )
    return tree


def model_card(
    config: ModelConfig, audit: Mapping[str, Any] | None, metrics: Sequence[tuple[str, Mapping[str, Any]]]
) -> str:
    """README.md, with front matter that the hub reads."""
    x, y, z = config.grid.shape
    spacing = " x ".join(f"{s:g}" for s in config.grid.spacing_mm)
    variables = [
        f"| {name} | {', '.join(v.levels) if v.levels else f'{v.bounds[0]:g} to {v.bounds[1]:g}'} |"
        for name, v in config.generator.net.variables.items()
    ]
    verdict = (
        f"{audit['verdict']} `audit.json` has all figures."
        if audit is not None
        else "**No privacy audit was made.** Nobody measured whether this generator repeats the people it was trained on."
    )
    forecaster = config.forecaster is not None
    first = next((n for n, v in config.generator.net.variables.items() if v.levels), None)
    example = f", {first}={config.generator.net.variables[first].levels[0]!r}" if first else ""
    lines = [
        "---",
        "license: other",
        "license_name: see-training-data",
        "library_name: g3n",
        "tags: [medical-imaging, neuroimaging, brain-mri, 3d, masked-autoencoder, flow-matching, diffusion-transformer]",
        "---",
        "",
        "# BrainG3N weights, trained by g3n",
        "",
        f"A frozen 3D masked-autoencoder encoder, a tokenizer ({config.tokenizer.latent_channels} channels a token) and a "
        f"conditional flow-matching transformer{' and a forecaster of follow-up scans' if forecaster else ''} for brain MRI "
        f"of {x} x {y} x {z} voxels of {spacing} mm on the ICBM152 atlas grid, after BrainG3N (arXiv 2606.19651). "
        f"Weights are the averages of training step {config.generator.step}.",
        "",
        "```python",
        "import g3n",
        "",
        'model = g3n.load("FOLDER")',
        f"volume = model.sample(seed=0{example})  # z-scores, float32 [X, Y, Z]",
        "latents = model.encode(scan, affine)  # a skull-stripped scan and its 4 x 4 affine",
        "again = model.decode(latents)",
        *(["later = model.forecast(scan, affine, age_years=70, target_age_years=73)"] if forecaster else []),
        "```",
        "",
        "## Variables",
        "",
        "| name | values |",
        "|---|---|",
        *variables,
        "",
        "Any of them may be left out.",
        "",
        "## Training data",
        "",
        *_data_lines(config.training),
        "",
        f"Shards {config.fingerprints.volumes} (volumes) and {config.fingerprints.latents} (latents).",
        "",
        "## Figures",
        "",
        *(_figures(metrics) or ["None were given to the export."]),
        "",
        "## Privacy",
        "",
        verdict,
        "",
        "## Limits",
        "",
        "- Not a medical device. Not for diagnosis, treatment or any decision about a person.",
        "- Generated scans show what the training data made likely under the variables; a counterfactual is no cause.",
        "- Other scanners, ages, diagnoses and preparations than those of the training data were not tested.",
        "- Scans must be skull-stripped and placed as the training data were (`data_prep preprocess`).",
        "- The terms of the training data may bind these weights. Ask those who hold the data before you pass them on.",
        "",
    ]
    return "\n".join(lines)


def _data_lines(training: Mapping[str, Any]) -> list[str]:
    lines = [
        f"- {name}: {training[name]['scans']} scans of {training[name]['subjects']} subjects"
        for name in ("tokenizer", "generator")
        if name in training
    ]
    licenses = training.get("licenses_of_all_splits", {})
    if licenses:
        listed = ", ".join(f"{n} {LICENSES.get(name, name)}" for name, n in sorted(licenses.items()))
        lines.append(f"- scans of all splits by license: {listed}")
    else:
        lines.append("- licenses: not known")
    return (
        lines if len(lines) > 1 else ["The shards were not there when this was exported; counts are not known.", *lines]
    )


def _figures(metrics: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """A table a file, of its numbers with their intervals. Settings and words, such as names of files, stay out."""
    lines: list[str] = []
    for name, tree in metrics:
        figures = {path: _told(leaf) for path, leaf in leaves({k: v for k, v in tree.items() if k not in _SETTINGS})}
        lines += [
            f"### {name}",
            "",
            "| figure | value |",
            "|---|---|",
            *(f"| {k.replace('_', ' ')} | {v} |" for k, v in figures.items()),
            "",
        ]
    return lines[:-1]


def _told(leaf: float | Mapping[str, Any]) -> str:
    if not isinstance(leaf, Mapping):
        return f"{leaf:.4g}"
    value, low, high = (leaf[name] for name in ("value", "low", "high"))
    if value is None:
        return "not defined"
    return f"{value:.4g}" if low is None or high is None else f"{value:.4g} [{low:.4g}, {high:.4g}]"


def _version() -> str:
    try:
        return importlib.metadata.version("g3n")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
