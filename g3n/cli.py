"""The ``g3n`` command: what one does with trained models."""

from __future__ import annotations

import math
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
    help="Use trained models: **sample** volumes, **forecast** a follow-up scan, **evaluate** a run; **doctor** shows "
    "what this machine has. Models are trained by `deepspeed g3n/train.py`, data is prepared by `python -m data_prep`.",
)
evaluate_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode="markdown", help="Figures and pictures of a trained run."
)
app.add_typer(evaluate_app, name="evaluate")


class SamplerName(StrEnum):
    HEUN = "heun"
    EULER = "euler"


Output = Annotated[Path, typer.Option(help="New folder; the same command goes on in it where it stopped.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: the GPU if there is one.")]
Batch = Annotated[int, typer.Option(min=1, help="Volumes at once.")]
Steps = Annotated[int, typer.Option(min=1, help="Steps of the sampler.")]
Seed = Annotated[int, typer.Option(min=0, help="The same seed gives the same volumes, whatever the batch.")]
Guidance = Annotated[float, typer.Option(min=0, help="How strongly the variables act: 1 as trained, 2 stronger.")]
SamplerOption = Annotated[SamplerName, typer.Option(help="heun: two evaluations a step, more exact; euler: one.")]
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
    count: Annotated[int, typer.Option(min=1, help="Volumes (for each row of the CSV).")] = 1,
    seed: Seed = 0,
    steps: Steps = 50,
    guidance: Guidance = 2.0,
    sampler: SamplerOption = SamplerName.HEUN,
    batch: Batch = 8,
    device: Device = None,
) -> None:
    """Generate volumes under clinical variables. A variable left out is null: the model draws over all its values.

    Writes NIfTI on the atlas grid, `montage.png` and `samples.json`, which says how each volume was made. The same seed
    with other variables gives the same person changed: a counterfactual.

    Example: `g3n sample --run runs/demo/dit --modality T1 --age 70 --sex F --count 4 --output out/samples`
    """
    from g3n.generate import open_generator
    from g3n.outputs import read_conditions, write_samples

    given = conditions_of(modality, age, sex, diagnosis, cohort, field_strength, set_)
    if conditions is not None and given:
        raise G3nError(f"give variables either in --conditions or as options, not both ({', '.join(given)})")
    generator = open_generator(run, device)
    rows = read_conditions(conditions, generator.variables) if conditions is not None else [given]
    wanted = [row for row in rows for _ in range(count)]
    made = write_samples(generator, wanted, output, seed, steps, guidance, sampler.value, batch)
    typer.echo(f"{len(made)} volumes in {output}, picture {output / 'montage.png'}")


@app.command()
def forecast(
    run: Annotated[Path, typer.Option(help="Run folder of the forecast task.")],
    baseline: Annotated[Path, typer.Option(help="NIfTI of the baseline, any orientation and spacing.")],
    age: Annotated[float, typer.Option(help="Age at the baseline, years.")],
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
    grid in the baseline's intensities, `montage.png` and `forecast.json`.

    Example: `g3n forecast --run runs/demo/forecast --baseline scan.nii.gz --modality T1 --age 70 --target-age 73 --output out`
    """
    from g3n.generate import open_forecaster
    from g3n.outputs import write_forecasts

    given = conditions_of(modality, age, sex, diagnosis, cohort, field_strength, set_)
    generator = open_forecaster(run, device)
    made = write_forecasts(
        generator, baseline, given, target_age, output, draws, seed, steps, guidance, sampler.value, batch, center
    )
    typer.echo(f"{len(made)} forecasts in {output}, picture {output / 'montage.png'}")


@evaluate_app.command()
def reconstruction(
    run: Annotated[Path, typer.Option(help="Run folder of the decoder task.")],
    shards: Annotated[str, typer.Option(help="The volume shards it was trained on.")],
    output: Output,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "val",
    batch: Batch = 8,
    device: Device = None,
) -> None:
    """PSNR, its gain over the mean volume, SSIM and MAE of volumes through the tokenizer, by modality and cohort.

    Example: `g3n evaluate reconstruction --run runs/demo/decoder --shards runs/demo/shards --output out/reconstruction`
    """
    from g3n.evaluate.reconstruction import evaluate_reconstruction

    evaluate_reconstruction(str(run), shards, output, split, batch, device)


@evaluate_app.command()
def generation(
    run: Annotated[Path, typer.Option(help="Run folder of the dit task.")],
    output: Output,
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
    sampler: SamplerOption = SamplerName.HEUN,
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
    strength = _guidance(guidance)
    fixed = conditions_of(modality, None, sex, diagnosis, cohort, field_strength, None)
    generator = open_generator(run, device)
    evaluate_generation(
        generator, years, output, fixed, count, seed, steps, strength, sampler.value, batch, latents, split, utility
    )


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
    output: Output,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "val",
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

    evaluate_forecasting(open_forecaster(run, device), latents, output, split, steps, batch)


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
