"""The ``g3n`` command: what one does with trained models."""

from __future__ import annotations

import math
import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from g3n.config import G3nError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Use trained models: **sample** volumes, **forecast** a follow-up scan, see the same brain under other conditions "
    "(**counterfactual**), **embed** scans, **probe** features, **evaluate** a run, **audit** its privacy, **report** all of it, "
    "**export** it; **sweep** a config, **compare** runs; **doctor** shows what this machine has. Models are trained by "
    "`deepspeed g3n/train.py`, data is prepared by `python -m data_prep`.",
)
evaluate_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="Figures and pictures of a trained run."
)
app.add_typer(evaluate_app, name="evaluate")


class SamplerName(StrEnum):
    HEUN = "heun"
    EULER = "euler"
    MULTISTEP = "multistep"


Output = Annotated[Path, typer.Option(help="New folder; the same command goes on in it where it stopped.")]
Results = Annotated[
    Path, typer.Option(help="Folder for metrics.json, tables and pictures; made again by the same command.")
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: the GPU if there is one.")]
Batch = Annotated[int, typer.Option(min=1, help="Volumes at once.")]
Steps = Annotated[int, typer.Option(min=1, help="Steps of the sampler.")]
Seed = Annotated[int, typer.Option(min=0, help="The same seed gives the same volumes, whatever the batch.")]
Guidance = Annotated[float, typer.Option(min=0, help="How strongly the variables act: 1 as trained, 2 stronger.")]
SamplerOption = Annotated[
    SamplerName,
    typer.Option(help="heun: two evaluations a step, more exact; euler: one; multistep: one, nearly as exact."),
]
Interval = Annotated[str, typer.Option(help="Guidance acts for t from low to high only; 0 is noise, 1 the volume.")]
Shift = Annotated[float | None, typer.Option(help="Above 1: more steps near the noise. Default: the run's time_shift.")]
Modality = Annotated[str | None, typer.Option(help="T1, T1c, T2, FLAIR: a level of the run's table.")]
Age = Annotated[float | None, typer.Option(help="Years.")]
Sex = Annotated[str | None, typer.Option(help="F or M.")]
Diagnosis = Annotated[str | None, typer.Option(help="A level of the run's table, such as HC or AD.")]
Cohort = Annotated[str | None, typer.Option(help="A level of the run's table.")]
FieldStrength = Annotated[float | None, typer.Option(help="Tesla.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="name=value of any variable of the run; repeatable.")]


def conditions_of(
    modality: str | None,
    age: float | None,
    sex: str | None,
    diagnosis: str | None,
    cohort: str | None,
    field_strength: float | None,
    extra: list[str] | None,
) -> dict[str, Any]:
    """The given variables; one not given is null. Raises G3nError for a ``--set`` that is not name=value."""
    named = {
        "modality": modality,
        "age_years": age,
        "sex": sex,
        "diagnosis": diagnosis,
        "cohort": cohort,
        "field_strength_t": field_strength,
    }
    conditions = {name: value for name, value in named.items() if value is not None}
    for item in extra or []:
        name, equals, value = item.partition("=")
        if not equals or not name or not value:
            raise G3nError(f"--set '{item}' is not name=value, for example --set age_years=70")
        if name in conditions:
            raise G3nError(f"variable '{name}' is given twice; leave out one")
        conditions[name] = value
    return conditions


def interval_of(text: str) -> tuple[float, float]:
    """``low,high`` within [0, 1]. Raises G3nError."""
    try:
        low, high = (float(word) for word in text.split(","))
    except ValueError:
        raise G3nError(f"--guidance-interval '{text}' is not low,high such as 0.2,0.9") from None
    if not 0 <= low <= high <= 1:
        raise G3nError(f"--guidance-interval '{text}' must be low,high with 0 <= low <= high <= 1")
    return low, high


def check_shift(shift: float | None) -> None:
    if shift is not None and not 0 < shift < float("inf"):
        raise G3nError(f"--shift {shift:g} must be above 0; 1 makes all steps equal")


@app.command()
def sample(
    run: Annotated[Path, typer.Option(help="Run folder of the dit task.")],
    output: Output,
    modality: Modality = None,
    age: Age = None,
    sex: Sex = None,
    diagnosis: Diagnosis = None,
    cohort: Cohort = None,
    field_strength: FieldStrength = None,
    set_: Set = None,
    conditions: Annotated[Path | None, typer.Option(help="CSV with a column a variable and a row a volume.")] = None,
    sweep: Annotated[
        str | None,
        typer.Option(help="age_years=20:90:10 or diagnosis=HC,AD: the same seeds under each of these values."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Volumes (for each row of the CSV, each value of a sweep).")] = 1,
    seed: Seed = 0,
    steps: Steps = 50,
    guidance: Guidance = 2.0,
    guidance_interval: Interval = "0,1",
    sampler: SamplerOption = SamplerName.HEUN,
    shift: Shift = None,
    batch: Batch = 8,
    device: Device = None,
) -> None:
    """Generate volumes under clinical variables. A variable left out is null: the model draws over all its values.

    Writes NIfTI on the atlas grid, `montage.png` and `samples.json`, which says how each volume was made. The same seed
    with other variables gives the same person changed: a counterfactual, and with `--sweep` a row of them.

    Example: `g3n sample --run runs/demo/dit --modality T1 --age 70 --sex F --count 4 --output out/samples`
    """
    from g3n.generate import open_generator
    from g3n.outputs import read_conditions, read_sweep, swept, write_samples

    given = conditions_of(modality, age, sex, diagnosis, cohort, field_strength, set_)
    interval = interval_of(guidance_interval)
    check_shift(shift)
    values = read_sweep(sweep) if sweep is not None else None
    if conditions is not None and given:
        raise G3nError(f"give variables either in --conditions or as options, not both ({', '.join(given)})")
    generator = open_generator(run, device)
    rows = read_conditions(conditions, generator.variables) if conditions is not None else [given]
    wanted = [row for row in rows for _ in range(count)] if values is None else swept(rows, values, count)
    alike = 1 if values is None else len(values[1])
    made = write_samples(generator, wanted, output, seed, steps, guidance, sampler.value, batch, interval, shift, alike)
    typer.echo(f"{len(made)} volumes in {output}, picture {output / 'montage.png'}")


@app.command()
def forecast(
    run: Annotated[Path, typer.Option(help="Run folder of the forecast task.")],
    baseline: Annotated[
        list[Path], typer.Option(help="NIfTI, any orientation and spacing; repeatable with an --age each.")
    ],
    age: Annotated[list[float], typer.Option(help="Age at the baseline, years; one for each --baseline.")],
    target_age: Annotated[list[float], typer.Option(help="Age at the follow-up, years; repeatable.")],
    output: Output,
    modality: Modality = None,
    sex: Sex = None,
    diagnosis: Diagnosis = None,
    cohort: Cohort = None,
    field_strength: FieldStrength = None,
    set_: Set = None,
    draws: Annotated[int, typer.Option(min=1, help="Forecasts for each age, from different noises.")] = 1,
    seed: Seed = 0,
    steps: Steps = 25,
    guidance: Guidance = 1.0,
    sampler: SamplerOption = SamplerName.HEUN,
    batch: Batch = 8,
    center: Annotated[bool, typer.Option("--center", help="Place the brain's center on the atlas's, always.")] = False,
    device: Device = None,
) -> None:
    """Forecast a patient's follow-up scan from the baseline.

    The baseline must look like the training scans: skull-stripped if they were. Writes baseline and follow-ups on the atlas
    grid in the baseline's intensities, follow-ups also at the baseline's own voxels (`_native`), with `--draws` mean and spread
    over them, `montage.png` and `forecast.json`. A run trained with `model.history` above 1 also reads earlier scans: repeat
    `--baseline` and `--age`.

    Example: `g3n forecast --run runs/demo/forecast --baseline scan.nii.gz --modality T1 --age 70 --target-age 73 --output out`
    """
    from g3n.generate import open_forecaster
    from g3n.outputs import write_forecasts

    if len(baseline) != len(age) or len(set(age)) < len(age):
        raise G3nError(f"{len(baseline)} --baseline and {len(age)} --age given; give one age for each, all different")
    *earlier, (latest, years) = sorted(zip(baseline, age, strict=True), key=lambda scan: scan[1])
    given = conditions_of(modality, years, sex, diagnosis, cohort, field_strength, set_)
    generator = open_forecaster(run, device)
    made = write_forecasts(
        generator,
        latest,
        given,
        target_age,
        output,
        draws,
        seed,
        steps,
        guidance,
        sampler.value,
        batch,
        center,
        earlier,
    )
    typer.echo(f"{len(made)} forecasts in {output}, picture {output / 'montage.png'}")


@app.command()
def counterfactual(
    run: Annotated[Path, typer.Option(help="Run folder of the dit task.")],
    vary: Annotated[str, typer.Option(help="One variable and its values, such as age_years=30,50,70.")],
    output: Output,
    baseline: Annotated[
        Path | None, typer.Option(help="NIfTI of a real scan to edit; its own variables as options.")
    ] = None,
    modality: Modality = None,
    age: Age = None,
    sex: Sex = None,
    diagnosis: Diagnosis = None,
    cohort: Cohort = None,
    field_strength: FieldStrength = None,
    set_: Set = None,
    seeds: Annotated[int, typer.Option(min=1, help="Noises to draw from (not for a scan, which has its own).")] = 1,
    seed: Seed = 0,
    steps: Steps = 50,
    guidance: Annotated[float | None, typer.Option(min=0, help="Default: 2 for drawn volumes, 1 for a scan.")] = None,
    sampler: SamplerOption = SamplerName.HEUN,
    batch: Batch = 8,
    center: Annotated[bool, typer.Option("--center", help="Place the scan's center on the atlas's, always.")] = False,
    device: Device = None,
) -> None:
    """The same brain under other conditions: one variable varies, the noise stays.

    Without `--baseline` volumes are drawn; with it a real scan is taken back to the noise it would have come from and made
    again under other conditions. Writes volumes and signed differences on the atlas grid, `montage.png` and
    `counterfactual.json` with ventricle and brain volumes.

    Example: `g3n counterfactual --run runs/demo/dit --modality T1 --sex F --vary age_years=30,50,70 --seeds 4 --output out`

    Example: `g3n counterfactual --run runs/demo/dit --baseline scan.nii.gz --modality T1 --age 62 --vary age_years=75,85
    --output out`
    """
    from g3n.counterfactual import read_varied, write_counterfactuals, write_edits
    from g3n.generate import open_generator

    given = conditions_of(modality, age, sex, diagnosis, cohort, field_strength, set_)
    if baseline is not None and (seeds != 1 or seed != 0 or sampler != SamplerName.HEUN):
        raise G3nError("a scan has its own noise and is solved by heun; leave out --seeds, --seed and --sampler")
    generator = open_generator(run, device)
    varied = read_varied(vary, generator.variables)
    if baseline is None:
        strength = 2.0 if guidance is None else guidance
        write_counterfactuals(generator, given, varied, output, seeds, seed, steps, strength, sampler.value, batch)
    else:
        strength = 1.0 if guidance is None else guidance
        write_edits(generator, baseline, given, varied, output, steps, strength, batch, center)
    typer.echo(f"volumes and differences in {output}, picture {output / 'montage.png'}")


@evaluate_app.command()
def reconstruction(
    run: Annotated[Path, typer.Option(help="Run folder of the decoder task, or of its baseline, autoencoder.")],
    shards: Annotated[str, typer.Option(help="The volume shards it was trained on.")],
    output: Results,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "val",
    batch: Batch = 8,
    device: Device = None,
) -> None:
    """What volumes keep through the tokenizer, with intervals over subjects, by modality and cohort.

    PSNR, its gain over the mean volume, SSIM, MS-SSIM, MAE, error of the fine detail, Dice of the brain.

    Example: `g3n evaluate reconstruction --run runs/demo/decoder --shards runs/demo/shards --output out/reconstruction`
    """
    from g3n.evaluate.reconstruction import evaluate_reconstruction

    evaluate_reconstruction(str(run), shards, output, split, batch, device)


@evaluate_app.command()
def distances(
    run: Annotated[Path, typer.Option(help="Run folder of the dit task.")],
    latents: Annotated[str, typer.Option(help="The latent shards it was trained on.")],
    output: Results,
    count: Annotated[int, typer.Option(min=8, help="Volumes to generate, and to read at most.")] = 256,
    split: Annotated[str, typer.Option(help="train, val or test: real volumes, and variables to generate by.")] = "val",
    seed: Seed = 0,
    steps: Steps = 25,
    guidance: Guidance = 1.0,
    sampler: SamplerOption = SamplerName.HEUN,
    batch: Batch = 8,
    device: Device = None,
) -> None:
    """How far the generated distribution is from the real one: Fréchet and kernel distance, precision, recall, diversity.

    Each beside what two sets of real volumes of different people are apart at the same size, which is not 0.

    Example: `g3n evaluate distances --run runs/demo/dit --latents runs/demo/latents --output out/distances --count 64`
    """
    from g3n.evaluate.distances import evaluate_distances
    from g3n.generate import open_generator

    generator = open_generator(run, device)
    evaluate_distances(generator, latents, output, count, split, seed, steps, guidance, sampler.value, batch)


@evaluate_app.command()
def generation(
    run: Annotated[Path, typer.Option(help="Run folder of the dit task.")],
    output: Results,
    ages: Annotated[str, typer.Option(help="Comma-separated years.")] = "25,55,85",
    modality: Annotated[str, typer.Option(help="A level of the run's table.")] = "T1",
    sex: Sex = None,
    diagnosis: Diagnosis = None,
    cohort: Cohort = None,
    field_strength: FieldStrength = None,
    count: Annotated[int, typer.Option(min=1, help="Volumes an age.")] = 8,
    seed: Seed = 0,
    steps: Steps = 25,
    guidance: Annotated[
        str, typer.Option(help="How strongly the variables act, or auto: chosen on the train split (needs --latents).")
    ] = "2.0",
    guidance_interval: Interval = "0,1",
    sampler: SamplerOption = SamplerName.HEUN,
    shift: Shift = None,
    batch: Batch = 8,
    latents: Annotated[str | None, typer.Option(help="The latent shards it was trained on, for probes.")] = None,
    split: Annotated[str, typer.Option(help="val or test: the people that probes are tested on.")] = "val",
    utility: Annotated[bool, typer.Option("--utility", help="Also train predictors on generated latents.")] = False,
    device: Device = None,
) -> None:
    """Does the generator obey? Anatomy of generated volumes by requested age, sex, diagnosis and modality.

    With `--latents` also what probes trained on real latents see in generated ones, beside real people.

    Example: `g3n evaluate generation --run runs/demo/dit --ages 25,55,85 --output out/generation`
    """
    from g3n.evaluate.generation import evaluate_generation
    from g3n.generate import open_generator

    try:
        years = [float(age) for age in ages.split(",")]
    except ValueError:
        raise G3nError(f"--ages '{ages}' is not a list of numbers such as 25,55,85") from None
    strength, interval = _guidance(guidance), interval_of(guidance_interval)
    check_shift(shift)
    fixed = conditions_of(modality, None, sex, diagnosis, cohort, field_strength, None)
    generator = open_generator(run, device)
    evaluate_generation(
        generator, years, output, fixed, count, seed, steps, strength, sampler.value, batch, interval, shift, latents,
        split, utility,
    )  # fmt: skip


def _guidance(text: str) -> float | Literal["auto"]:
    try:
        strength = 0.0 if text == "auto" else float(text)
    except ValueError:
        strength = -1.0
    if not 0 <= strength < math.inf:
        raise G3nError(f"--guidance is '{text}'; expected a number of at least 0, or auto")
    return "auto" if text == "auto" else strength


@evaluate_app.command()
def forecasting(
    run: Annotated[Path, typer.Option(help="Run folder of the forecast task.")],
    latents: Annotated[str, typer.Option(help="The latent shards it was trained on.")],
    output: Results,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "val",
    draws: Annotated[
        int, typer.Option(min=1, help="Forecasts of each pair, from different noises; their mean is judged.")
    ] = 4,
    steps: Steps = 25,
    batch: Batch = 8,
    device: Device = None,
) -> None:
    """Forecasts of first to last visits against the follow-up, beside three simple predictors: the baseline itself, the mean
    change of the train split, and a regression. And how ventricles grow as more years are asked for.

    Example: `g3n evaluate forecasting --run runs/demo/forecast --latents runs/demo/latents --output out/forecasting`
    """
    from g3n.evaluate.forecasting import evaluate_forecasting
    from g3n.generate import open_forecaster

    evaluate_forecasting(open_forecaster(run, device), latents, output, split, steps, batch, draws)


@app.command()
def audit(
    run: Annotated[Path, typer.Option(help="Run folder of the dit task.")],
    latents: Annotated[list[str], typer.Option(help="The latent shards it was trained on; one a folder of a mix.")],
    output: Output,
    count: Annotated[int, typer.Option(min=2, help="Volumes to generate.")] = 256,
    seed: Seed = 0,
    steps: Steps = 25,
    guidance: Guidance = 2.0,
    sampler: SamplerOption = SamplerName.HEUN,
    batch: Batch = 8,
    device: Device = None,
) -> None:
    """Does the generator give its training scans away? Nearest neighbors, copies and membership inference.

    Volumes are generated under variables of training scans. Writes `audit.json` (which `g3n export` asks for), `volumes.csv`
    and `closest.png`, which shows training scans.

    Example: `g3n audit --run runs/demo/dit --latents runs/demo/latents --count 256 --output out/audit`
    """
    from g3n.evaluate.privacy import audit as audit_run
    from g3n.generate import open_generator

    found = audit_run(open_generator(run, device), latents, output, count, seed, steps, guidance, sampler.value, batch)
    typer.echo(found["verdict"])


@app.command()
def export(
    run: Annotated[Path, typer.Option(help="Run folder of the dit task.")],
    output: Annotated[Path, typer.Option(help="New folder.")],
    forecaster: Annotated[Path | None, typer.Option(help="Run folder of the forecast task.")] = None,
    audit: Annotated[Path | None, typer.Option(help="audit.json of g3n audit on this run.")] = None,
    without_audit: Annotated[bool, typer.Option("--without-audit", help="The card will say so.")] = False,
    metrics: Annotated[list[Path] | None, typer.Option(help="metrics.json for the card; repeatable.")] = None,
) -> None:
    """Write a folder to pass on: weights, config and a model card, in the Hugging Face layout. `g3n.load(folder)` opens it.

    Example: `g3n export --run runs/demo/dit --audit out/audit/audit.json --output out/model`
    """
    from g3n.export import export as export_run

    folder = export_run(run, output, forecaster, audit, without_audit, metrics or [])
    typer.echo(f"model in {folder}, card {folder / 'README.md'}")


@app.command()
def report(
    run: Annotated[Path, typer.Option(help="Run folder of the dit task.")],
    output: Annotated[Path, typer.Option(help="Folder of the report; the same command goes on where it stopped.")],
    forecaster: Annotated[Path | None, typer.Option(help="Run folder of the forecast task.")] = None,
    count: Annotated[int, typer.Option(min=8, help="Generated volumes of distances and audit.")] = 256,
    seed: Seed = 0,
) -> None:
    """Every evaluation of a run on one page: reconstruction, obedience, distances, forecasts, privacy.

    Tokenizer and shards are found through the run's config. Writes `index.html`, which needs no other file, `report.json` and a folder
    for each part, and logs figures and page to the run's MLflow.

    Example: `g3n report --run runs/demo/dit --forecaster runs/demo/forecast --output out/report`
    """
    from g3n.report import write_report

    page = write_report(lambda words: app(list(words), standalone_mode=False), run, forecaster, output, count, seed)
    typer.echo(f"report: {page}")


@app.command("sweep")
def sweep_(
    config: Annotated[Path, typer.Argument(help="YAML of the sweep, one of configs/sweeps/*.yaml or yours.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key=value", help="For example trials=40 parallel=4 sampler.seed=1.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check space and inputs, print the plan, train nothing.")
    ] = False,
) -> None:
    """Train a config many times with other values, each time by `deepspeed g3n/train.py`; Optuna proposes and ends poor trials early.

    The study lies in `runs/NAME`: `best.yaml` for `g3n/train.py --config`, `study.csv`, `sweep.png`, and a run folder a trial. The same
    command goes on after Ctrl-C, a kill or a crash, with the same trials. In MLflow a study is a run with its trials under it.

    Example: `g3n sweep configs/sweeps/tiny/dit.yaml`
    """
    from g3n.sweep.drive import describe, run_sweep
    from g3n.sweep.plan import load_sweep

    sweep = load_sweep(config, overrides or [])
    if dry_run:
        describe(sweep)
        return
    raise typer.Exit(run_sweep(sweep, shlex.join(["g3n", "sweep", str(config), *(overrides or [])])))


@app.command("compare")
def compare_(
    runs: Annotated[list[str], typer.Argument(metavar="RUN RUN...", help="Run folders, or MLflow run ids.")],
    output: Results,
    tracking_uri: Annotated[
        str | None, typer.Option(help="Where MLflow ids are: a server, or sqlite:///runs/mlflow.db.")
    ] = None,
    evaluations: Annotated[
        list[Path] | None, typer.Option(help="Folder with results of g3n evaluate or g3n report; repeatable.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="Pattern of metrics; repeatable. Default: val/* and train/*, but no levels or ages."),
    ] = None,
) -> None:
    """What differs between runs: config, curves on one figure, last and lowest figures, and evaluations with their intervals.

    Writes `compare.json`, `compare.csv` and `compare.png`.

    Example: `g3n compare runs/demo/sweep-dit/trial_0003 runs/demo/sweep-dit/trial_0007 --output out/compare`

    Example: `g3n compare runs/demo/dit runs/other/dit --evaluations out/evaluations --metric "val/*" --output out/compare`
    """
    from g3n.compare import compare

    compare(runs, output, tracking_uri, evaluations or [], metric or [])


@app.command()
def embed(
    encoder: Annotated[
        str,
        typer.Option(
            help="A run folder of the mae or decoder task, monai-mae:FILE, medicalnet10|18|34|50:FILE, brainiac:FILE, "
            "brainsegfounder:FILE, voxel-pca[:FILE] or tissue-volumes."
        ),
    ],
    output: Annotated[Path, typer.Option(help="The .parquet to write; the same command goes on where it stopped.")],
    shards: Annotated[
        str | None, typer.Option(help="Volume shards, a folder or URL: every scan of every split.")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of NIfTI files (BIDS or any), or a table with a column path, such as manifest.tsv."),
    ] = None,
    encoder_config: Annotated[
        Path | None, typer.Option(help="monai-mae: YAML with volume_shape, heads, spacing_mm where not BrainG3N's.")
    ] = None,
    all_tokens: Annotated[
        bool, typer.Option("--all-tokens", help="Decoder run: also all projected tokens, flattened [N x 32].")
    ] = False,
    variables: Annotated[
        Path | None, typer.Option(help="TSV or CSV by path, participant_id or subject; default: participants.tsv.")
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(help="Secret of the hashed names, as of data_prep; default: subjects.key beside the output."),
    ] = None,
    keep_names: Annotated[
        bool, typer.Option("--keep-names", help="Files: write their names and labels as they are.")
    ] = False,
    center: Annotated[
        bool, typer.Option("--center", help="Files: place each brain's center on the atlas's, always.")
    ] = False,
    umap: Annotated[
        bool | None, typer.Option("--umap/--no-umap", help="Beside PCA in the picture; default: if installed.")
    ] = None,
    batch: Batch = 8,
    device: Device = None,
) -> None:
    """Features of every scan from a frozen encoder: one Parquet file of ids, variables and features, which any tool reads.

    Kinds: `mean` and `cls` of the tokens; a decoder run adds `latent`, the mean of its 32-channel tokens (a linear image of `mean`).
    Others have `mean` (BrainIAC's ViT also `first_token`), `pca` or `volumes`. Weights of others are read without running code from
    them, and what was found is told. Files must look like the encoder's training scans: skull-stripped if those were (`python -m
    data_prep preprocess`). Their names are hashed; `<output>.names.tsv` and `subjects.key` are yours to keep. A picture by modality, diagnosis,
    age, sex and cohort lies beside.

    Example: `g3n embed --encoder runs/demo/decoder --shards runs/demo/shards --output out/features.parquet`

    Example: `g3n embed --encoder medicalnet50:resnet_50_23dataset.pth --images bids --output out/medicalnet.parquet`
    """
    from g3n.embed import Images, embed_and_draw

    if (shards is None) == (images is None):
        raise G3nError("give either --shards or --images")
    if images is None and (variables or key or keep_names or center):
        raise G3nError("--variables, --key, --keep-names and --center are for --images; leave them out")
    inputs = shards if images is None else Images(images, variables, key, keep_names, center)
    assert inputs is not None
    for line in embed_and_draw(encoder, inputs, output, device, batch, encoder_config, all_tokens, umap):
        typer.echo(line)


@app.command()
def probe(
    features: Annotated[
        list[Path],
        typer.Option(
            help="Parquet of g3n embed, or any Parquet or npz (features [n, d], ids [n]); repeatable, one an encoder."
        ),
    ],
    output: Output,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            help="mean, cls, latent: kinds of features; repeatable. Default: mean. A file of one kind gives that."
        ),
    ] = None,
    tasks: Annotated[
        Path | None, typer.Option(help="Table of tasks; default configs/probes.yaml, or the targets' columns.")
    ] = None,
    task: Annotated[list[str] | None, typer.Option(help="Only tasks of this name; repeatable.")] = None,
    targets: Annotated[
        Path | None, typer.Option(help="CSV or TSV with a row a scan (or subject) and a column a target.")
    ] = None,
    id_: Annotated[str | None, typer.Option("--id", help="Column of the targets that has the features' ids.")] = None,
    folds: Annotated[int, typer.Option(min=3, help="Folds of a repeat.")] = 5,
    repeats: Annotated[int, typer.Option(min=1, help="How often people are divided anew.")] = 5,
    splits: Annotated[Path | None, typer.Option(help="splits/ of an earlier call, to test on the same folds.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the folds.")] = 0,
    mlflow: Annotated[
        bool, typer.Option(help="Also log to MLflow (MLFLOW_TRACKING_URI, or a file beside the results).")
    ] = True,
) -> None:
    """What frozen features tell of people: logistic and ridge probes of every task, beside age + sex and a constant.

    Folds keep people, families and duplicates whole. Several feature files are compared on the same folds. Writes `results.csv`,
    `comparisons.csv` (both with Holm and Benjamini-Hochberg corrections over tasks), `metrics.json`, `index.html`, `probe.png` and `splits/`.

    Example: `g3n probe --features out/ours.parquet --features out/pca.parquet --tasks configs/probes.yaml --output out/probe`

    Example: `g3n probe --features mine.npz --targets mine.csv --id scan --output out/probe`
    """
    from g3n.probing.command import probe as run_probe

    run_probe(features, output, kind or [], tasks, task or [], targets, id_, folds, repeats, splits, seed, mlflow)
    typer.echo(f"results in {output / 'results.csv'}, page {output / 'index.html'}")


@app.command()
def doctor() -> None:
    """What this machine has (GPU, kernels, attention backends, versions), what g3n will use of it, and why."""
    from g3n.doctor import report

    report()


def main() -> None:
    """Run a command; a user's mistake is one line on stderr and exit code 2."""
    try:
        app()
    except G3nError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
