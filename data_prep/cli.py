"""Commands of ``python -m data_prep``. Each reads what the one before wrote: phantom, scan, preprocess, pack, encode."""

from __future__ import annotations

import sys
from collections import Counter
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from data_prep.quality import FLAGS
from g3n.config import G3nError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Prepare scans for training: **scan** a BIDS folder, **preprocess** it onto the atlas grid, **pack** shards; "
    "later **encode** the shards to latents. **phantom** makes a BIDS folder to try it all on.",
)
out = Console()


class Align(StrEnum):
    HEADER = "header"
    CENTER = "center"
    AFFINE = "affine"


class Mode(StrEnum):
    CLEAN = "clean"
    PAPER = "paper"


class Strip(StrEnum):
    NONE = "none"
    DEEPBET = "deepbet"
    ROBEX = "robex"
    COMMAND = "command"


class Bias(StrEnum):
    NONE = "none"
    N4 = "n4"


class AtlasName(StrEnum):
    ICBM152 = "icbm152"
    SRI24 = "sri24"


Workers = Annotated[int | None, typer.Option(min=1, help="Processes; default: all processors.")]


@app.command()
def phantom(
    output: Annotated[Path, typer.Option(help="New BIDS folder.")],
    subjects: Annotated[int, typer.Option(help="How many subjects; each has 1 to 4 visits.")] = 160,
    spacing_mm: Annotated[float, typer.Option(help="Voxel size: 4 for a laptop, 1 for the published grid.")] = 4.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same cohort.")] = 0,
    workers: Workers = None,
) -> None:
    """Make a synthetic cohort with known truth from the ICBM152 templates.

    Healthy, AD and glioma subjects of three cohorts, T1, T1c, T2 and FLAIR, with follow-ups. `truth.tsv` holds the true
    ventricle, brain and lesion volume of every scan. Run again after an interruption, it goes on where it stopped.

    Example: `python -m data_prep phantom --output demo/bids --subjects 160`
    """
    from data_prep.phantom import make_phantom

    scans = make_phantom(output, subjects, spacing_mm, seed, workers)
    out.print(f"{scans} scans of {subjects} subjects in {output}", soft_wrap=True)


@app.command()
def dicom(
    root: Annotated[Path, typer.Argument(help="Folder with DICOM files anywhere below it.")],
    output: Annotated[Path, typer.Option(help="Folder for the NIfTI files, in the same folders.")],
    workers: Workers = None,
) -> None:
    """Convert DICOM series to NIfTI with dcm2niix, then `scan` the output.

    The folders stay, so the layouts of ADNI and PPMI are recognized. Run again, only what is missing is converted. A
    folder that fails is listed in failures.tsv and does not stop the rest. The output still names people: it is raw data.

    Example: `python -m data_prep dicom /data/PPMI --output work/ppmi`
    """
    from data_prep.dicom import convert

    done, failed = convert(root, output, workers)
    out.print(f"{done} folders converted in {output}", soft_wrap=True, highlight=False)
    for folder, reason in failed[:10]:
        out.print(f"failed: {folder}: {reason}", soft_wrap=True, highlight=False, markup=False)
    if failed:
        out.print(f"{len(failed)} failed: see {output / 'failures.tsv'}", soft_wrap=True, highlight=False)
    if not done:
        raise typer.Exit(1)


@app.command()
def scan(
    root: Annotated[Path, typer.Argument(help="BIDS folder (raw or derivatives), a known cohort's, or any other.")],
    output: Annotated[Path, typer.Option(help="The table to write; manifest.json goes beside it.")],
    seed: Annotated[int, typer.Option(help="Decides which subject is in which split.")] = 0,
    val: Annotated[float, typer.Option(min=0, max=1, help="Share of subjects for validation.")] = 0.15,
    test: Annotated[float, typer.Option(min=0, max=1, help="Share of subjects for the final test.")] = 0.15,
    cohort: Annotated[
        str | None,
        typer.Option(help="A cohort whose layout and tables are known: adni, ppmi, ixi, ... (data_prep/cohorts)."),
    ] = None,
    harmonise: Annotated[
        Mode, typer.Option(help="clean: labels as true at the scan; paper: as in the published harmonisation.")
    ] = Mode.CLEAN,
    table: Annotated[
        Path | None,
        typer.Option(help="For files in any folders: a CSV, TSV or Excel table with a row a file (path) or a subject."),
    ] = None,
    sex_codes: Annotated[
        str | None, typer.Option(help="What numbers in the column sex mean, e.g. 1=M,2=F; cohorts disagree.")
    ] = None,
) -> None:
    """List scans with their variables and a split by subject; relatives and one person's two labels stay together.

    Finds T1, contrast T1, T2 and FLAIR in a BIDS folder (age, sex, diagnosis and cohort from participants.tsv and
    sessions.tsv, field strength from the sidecars), in a known cohort's folder (`--cohort`), or in any other folder with
    NIfTI, Analyze, MGH or MGZ files: by `--table`, or one folder a subject. What it leaves out is reported and listed in
    manifest.json.

    Examples: `python -m data_prep scan my_bids --output work/manifest.tsv`,
    `python -m data_prep scan nifti --table people.csv --output work/manifest.tsv`
    """
    from data_prep.bids import is_bids, scan_bids
    from data_prep.cohort_scan import scan_cohort
    from data_prep.loose import scan_loose
    from data_prep.scan import Shares

    shares = Shares(val, test, seed)
    if cohort and cohort != "bids":
        report = scan_cohort(root, cohort, output, "paper" if harmonise is Mode.PAPER else "clean", shares)
    elif table is None and (cohort or not root.is_dir() or is_bids(root)):
        report = scan_bids(root, output, shares, sex_codes)
    else:
        report = scan_loose(root, output, shares, table, sex_codes)
    for line in report:
        out.print(line, soft_wrap=True, highlight=False, markup=False)


@app.command()
def preprocess(
    manifest: Annotated[Path, typer.Argument(help="manifest.tsv of scan.")],
    output: Annotated[Path, typer.Option(help="Folder for the volumes, their manifest.tsv and failures.tsv.")],
    spacing_mm: Annotated[float, typer.Option(help="Voxel size of the atlas grid.")] = 1.0,
    shape: Annotated[str, typer.Option(help="Voxels of the grid along L, P, S.")] = "240,240,155",
    align: Annotated[
        Align,
        typer.Option(
            help="affine: register to the atlas (antspyx); header: trust the file; center: move the center of mass."
        ),
    ] = Align.AFFINE,
    strip: Annotated[
        Strip, typer.Option(help="How to remove the skull where it is on; deepbet takes 12 s a scan on a CPU.")
    ] = Strip.DEEPBET,
    strip_command: Annotated[
        str | None, typer.Option(help="For --strip command: 'hd-bet -i {input} -o {output}', for example.")
    ] = None,
    bias: Annotated[Bias, typer.Option(help="n4 removes the bias field.")] = Bias.N4,
    atlas: Annotated[
        AtlasName, typer.Option(help="icbm152 comes with nilearn; sri24 needs its file. One a dataset.")
    ] = AtlasName.ICBM152,
    atlas_file: Annotated[str | None, typer.Option(help="The skull-stripped SRI24 T1.")] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(
            help="Secret that hides subject labels; made if missing. Default: subjects.key beside the manifest."
        ),
    ] = None,
    workers: Workers = None,
) -> None:
    """Bring every scan onto the atlas grid: skull off, bias removed, registered, LPS axes, background 0.

    A session's scans are registered to its T1 and reach the atlas through it. Scans that come stripped or registered are
    noticed and keep what they have. Each volume gets a sidecar with its transform and quality numbers; doubtful ones are
    flagged. Nothing in the output names a subject: who is who stands in subjects.tsv beside the key. A scan that fails is
    listed in failures.tsv and does not stop the rest; run again, only what is missing is done. Exit code 1 when every
    scan failed.

    For scans that lie on the atlas already, or to be quick: `--align header --strip none --bias none`.

    Example: `python -m data_prep preprocess work/manifest.tsv --output work/derivatives`
    """
    from data_prep.preprocess import preprocess_all
    from data_prep.recipe import Recipe, parse_shape

    recipe = Recipe(
        parse_shape(shape), spacing_mm, align.value, strip.value, bias.value, atlas.value, atlas_file, strip_command
    )
    outcomes = preprocess_all(manifest, output, recipe, workers, key_file)
    failed = sum(outcome.reason is not None for outcome in outcomes)
    out.print(f"{len(outcomes) - failed} volumes in {output}", soft_wrap=True, highlight=False)
    routes = Counter(outcome.align for outcome in outcomes if outcome.reason is None)
    out.print("routes: " + ", ".join(f"{name} {n}" for name, n in sorted(routes.items())), soft_wrap=True)
    flags = Counter(flag for outcome in outcomes for flag in outcome.flags)
    for flag, n in sorted(flags.items()):
        out.print(f"flagged: {n} {flag}, {FLAGS[flag]}", soft_wrap=True, highlight=False)
    if failed:
        print_failures(output / "failures.tsv")
    if failed == len(outcomes):
        raise typer.Exit(1)


def print_failures(path: Path, most: int = 20) -> None:
    """The first rows of failures.tsv as a table."""
    from rich.markup import escape
    from rich.table import Table

    from data_prep.manifest import read_table

    rows = read_table(path)
    table = Table(*rows[0], box=None, header_style="bold", title=f"{len(rows)} failed", title_justify="left")
    for row in rows[:most]:
        table.add_row(*map(escape, row.values()))
    out.print(table)
    out.print(f"{'' if len(rows) <= most else f'{len(rows) - most} more: '}{path}", soft_wrap=True, highlight=False)


@app.command()
def qc(
    derivatives: Annotated[Path, typer.Argument(help="Folder that preprocess wrote.")],
    output: Annotated[Path, typer.Option(help="Folder for index.html and its thumbnails.")] = Path("qc"),
    workers: Workers = None,
) -> None:
    """Write a page that shows every scan with the atlas outline, outliers first.

    Sort by any quality number, filter by cohort, modality, route and flag. Thumbnails lie beside the page and are loaded as
    one scrolls, so thousands of scans open at once. Run again after preprocess, only new ones are drawn.

    Example: `python -m data_prep qc work/derivatives --output work/qc`
    """
    from data_prep.qc import write_page

    count = write_page(derivatives, output, workers)
    out.print(f"{count} scans on {output / 'index.html'}", soft_wrap=True, highlight=False)


@app.command()
def pack(
    manifest: Annotated[Path, typer.Argument(help="manifest.tsv of preprocess.")],
    output: Annotated[Path, typer.Option(help="New folder for the shards.")],
    shape: Annotated[
        str | None, typer.Option(help="Crop or pad to these voxels. Default: 240,240,155 becomes 160,192,160.")
    ] = None,
    shard_mb: Annotated[
        float, typer.Option(help="Size of a shard in MiB; at least 16 shards if subjects allow.")
    ] = 256.0,
    seed: Annotated[int, typer.Option(help="Decides the order of subjects.")] = 0,
    allow_flagged: Annotated[
        str, typer.Option(help=f"Flags of preprocess to let in, e.g. overlap,contrast ({', '.join(FLAGS)}).")
    ] = "",
    allow_faces: Annotated[bool, typer.Option("--allow-faces", help="Let in heads whose skull is on.")] = False,
    commercial: Annotated[bool, typer.Option("--commercial", help="Only scans whose license allows it.")] = False,
    workers: Workers = None,
) -> None:
    """Pack preprocessed volumes into shards: tar files of compressed int16 volumes, and index.json.

    Nothing in the shards names a subject: preprocess made keyed hashes of the labels. What it flagged stays out unless
    allowed. The same volumes give the same shards byte for byte. Run again after an interruption, it goes on where it
    stopped.

    Example: `python -m data_prep pack work/derivatives/manifest.tsv --output work/shards`
    """
    from data_prep.pack import Packing, pack_all
    from data_prep.recipe import parse_shape

    allowed = tuple(flag.strip() for flag in allow_flagged.split(",") if flag.strip())
    if unknown := [flag for flag in allowed if flag not in FLAGS or flag == "skull"]:
        raise G3nError(
            f"--allow-flagged {unknown[0]} is not known; known: {', '.join(f for f in FLAGS if f != 'skull')}"
        )
    packing = Packing(parse_shape(shape) if shape else None, shard_mb, None, seed, allowed, allow_faces, commercial)
    index, left_out = pack_all(manifest, output, packing, workers)
    parts = [f"{split}: {sum(len(s['samples']) for s in shards)} in {len(shards)}" for split, shards in index.items()]
    out.print(f"samples in shards of {output}: {', '.join(parts)}", soft_wrap=True, highlight=False)
    for reason, n in left_out.items():
        out.print(
            f"left out: {n} {reason}, {FLAGS.get(reason, 'not open to commercial use')}",
            soft_wrap=True,
            highlight=False,
        )


@app.command()
def encode(
    tokenizer: Annotated[str, typer.Option(help="Run folder of the decoder task.")],
    shards: Annotated[str, typer.Option(help="Volume shards (folder or URL) to encode.")],
    output: Annotated[Path, typer.Option(help="New folder for the latent shards.")],
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: the GPU if there is one.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Volumes at once.")] = 8,
) -> None:
    """Encode volumes to the latents that the generator learns.

    Example: `python -m data_prep encode --tokenizer runs/decoder --shards work/shards --output work/latents`
    """
    from data_prep.encode import encode as encode_shards

    encode_shards(tokenizer, shards, output, device, batch)


@app.command()
def check(
    manifests: Annotated[list[Path], typer.Argument(help="One or more manifest.tsv of scan or preprocess.")],
    workers: Workers = None,
) -> None:
    """Look for what would spoil a training: every scan is read, every problem is a row of a table.

    Unreadable files, NaN, lost spacing, wrong axes, the same voxels under two names, a person in two splits (also across
    manifests), impossible ages, missing variables. Exit code 1 if any problem is fatal.

    Example: `python -m data_prep check ixi/manifest.tsv oasis1/manifest.tsv`
    """
    from rich.markup import escape
    from rich.table import Table

    from data_prep.check import check_all

    problems = check_all(manifests, workers)
    fatal = sum(problem.fatal for problem in problems)
    if problems:
        table = Table("", "kind", "where", "what", box=None, header_style="bold")
        for problem in problems:
            mark = "[red]fatal[/red]" if problem.fatal else "note"
            table.add_row(mark, problem.kind, escape(problem.where), escape(problem.what))
        out.print(table)
    out.print(f"{fatal} fatal, {len(problems) - fatal} to know of", highlight=False)
    if fatal:
        raise typer.Exit(1)


@app.command()
def verify(
    shards: Annotated[str, typer.Argument(help="Shards (folder or URL) of pack or encode.")],
    workers: Workers = None,
) -> None:
    """Read every shard again and name each damaged sample: shard, key, byte. Exit code 1 if there is any.

    Example: `python -m data_prep verify work/shards`
    """
    from data_prep.verify import verify_all

    found = verify_all(shards, workers)
    for line in found.problems:
        out.print(f"damaged: {line}", soft_wrap=True, highlight=False, markup=False)
    out.print(
        f"{found.samples} samples, {found.bytes / 1e6:,.1f} MB: {len(found.problems) or 'no'} problems",
        soft_wrap=True,
        highlight=False,
    )
    if found.problems:
        raise typer.Exit(1)


@app.command()
def scrub(
    folder: Annotated[Path, typer.Argument(help="Output of preprocess, pack, encode or qc.")],
    verify: Annotated[bool, typer.Option("--verify", help="Change nothing, only report.")] = False,
    names: Annotated[
        Path | None,
        typer.Option(help="Text with a name a line, or subjects.tsv beside the key: none of them may be found."),
    ] = None,
    workers: Workers = None,
) -> None:
    """Prove that an output folder names nobody. Exit code 1 if anything is found.

    Every file is read whole and held against a whitelist of fields and forms (data_prep/whitelist.py): NIfTI, gzip, tar,
    zstd, PNG and npy headers, sidecars, tables, index and page. Without --verify, NIfTI headers that hold more than
    shape, type, scale and affine are rewritten, voxels untouched; nothing else is changed.

    Example: `python -m data_prep scrub --verify work/shards --names work/subjects.tsv`
    """
    from data_prep.scrub import read_names
    from data_prep.scrub import scrub as scrub_folder

    done = scrub_folder(folder, verify, read_names(names) if names else (), workers)
    for path in done.rewritten:
        out.print(f"rewritten: {path}", soft_wrap=True, highlight=False, markup=False)
    for problem in done.problems[:200]:
        out.print(f"found: {problem}", soft_wrap=True, highlight=False, markup=False)
    out.print(f"{done.files} files, {len(done.problems) or 'no'} findings", highlight=False)
    if done.problems:
        raise typer.Exit(1)


def main() -> None:
    """Run a command; a user's mistake is one line on stderr and exit code 2."""
    try:
        app()
    except G3nError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
