"""Phantom to generated volumes: every command once, and what it leaves behind."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from g3n.config import G3nError
from g3n.nifti import atlas_grid, read_volume
from tests.chain import prepare, run, train

GRID = atlas_grid((40, 48, 40), 4.0)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chain")
    run("python", "-m", "data_prep", "phantom", "--output", f"{root}/bids", "--subjects", "14", "--spacing-mm", "4")
    prepare(root / "bids", root, "--val", "0.3", "--test", "0")
    train("mae", root, 6, "tracking.mlflow=false")
    train("decoder", root, 30, "tracking.mlflow=false")
    run(
        "python", "-m", "data_prep", "encode", "--tokenizer", f"{root}/decoder", "--shards", f"{root}/shards",
        "--output", f"{root}/latents",
    )  # fmt: skip
    train("dit", root, 4, "tracking.mlflow=false")
    train("forecast", root, 4)
    return root


def test_outputs_hold_nothing_but_the_whitelist(work: Path) -> None:
    for folder in ("derivatives", "shards", "latents"):
        run("python", "-m", "data_prep", "scrub", "--verify", f"{work}/{folder}", "--names", f"{work}/subjects.tsv")
    for folder in ("shards", "latents"):
        assert "no problems" in run("python", "-m", "data_prep", "verify", f"{work}/{folder}")


def on_the_grid(path: Path) -> np.ndarray:
    """The volume, after checking what a viewer would see of its place: affine, LPS, 4 mm, millimeters."""
    image = nib.load(path)
    assert np.array_equal(image.affine, GRID.matrix)
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
    assert image.header.get_xyzt_units()[0] == "mm"
    assert image.header.get_zooms()[:3] == (4.0, 4.0, 4.0)
    volume, _ = read_volume(path)
    assert volume.shape == GRID.shape
    return volume


def test_sample_by_options(work: Path) -> None:
    words = ("g3n", "sample", "--run", f"{work}/dit", "--modality", "T1", "--age", "70", "--sex", "F", "--count", "3")
    words += ("--steps", "3", "--seed", "5")
    run(*words, "--output", f"{work}/a", "--batch", "2")
    run(*words, "--output", f"{work}/b", "--batch", "1")
    record = json.loads((work / "a/samples.json").read_text())
    assert [v["seed"] for v in record["volumes"]] == [5, 6, 7]
    assert record["volumes"][0]["conditions"] == {"modality": "T1", "age_years": 70.0, "sex": "F"}
    assert (record["steps"], record["guidance"], record["sampler"], record["step"]) == (3, 2.0, "heun", 4)
    volumes = [on_the_grid(work / f"a/volume-{i:05d}.nii.gz") for i in range(3)]
    assert all(v.min() == 0 and v.max() > 500 for v in volumes)
    assert not np.array_equal(volumes[0], volumes[1])
    for i, volume in enumerate(volumes):  # a volume depends on its seed, not on its batch
        assert np.allclose(volume, read_volume(work / f"b/volume-{i:05d}.nii.gz")[0], atol=0.1)
    assert (work / "a/montage.png").stat().st_size > 5000


def test_sample_goes_on_where_it_stopped(work: Path) -> None:
    words = ("g3n", "sample", "--run", f"{work}/dit", "--age", "40", "--count", "2", "--steps", "2")
    run(*words, "--output", f"{work}/resumed")
    first, second = (work / f"resumed/volume-0000{i}.nii.gz" for i in range(2))
    before, kept = read_volume(second)[0], first.stat().st_mtime_ns
    second.unlink()
    run(*words, "--output", f"{work}/resumed")
    assert np.allclose(read_volume(second)[0], before, atol=0.1)
    assert first.stat().st_mtime_ns == kept


def test_sample_from_a_table(work: Path) -> None:
    (work / "table.csv").write_text("modality,age_years,diagnosis\nT1,25,HC\nT2,,glioma\nFLAIR,n/a,\n")
    run("g3n", "sample", "--run", f"{work}/dit", "--conditions", f"{work}/table.csv", "--steps", "2", "--output",
        f"{work}/table")  # fmt: skip
    made = json.loads((work / "table/samples.json").read_text())["volumes"]
    assert [m["conditions"] for m in made] == [
        {"modality": "T1", "age_years": "25", "diagnosis": "HC"},
        {"modality": "T2", "diagnosis": "glioma"},
        {"modality": "FLAIR"},
    ]


def test_forecast_of_a_scan_in_any_orientation(work: Path) -> None:
    """The same brain as RAS and as stored: the same forecast."""
    with open(work / "manifest.tsv") as file:
        scan = next(r for r in csv.DictReader(file, delimiter="\t") if r["split"] == "val" and r["modality"] == "T1")
    stored = work / "bids" / scan["path"]
    nib.save(nib.as_closest_canonical(nib.load(stored)), work / "ras.nii.gz")
    age = float(scan["age_years"])
    made = {}
    for name, path in (("stored", stored), ("ras", work / "ras.nii.gz")):
        run("g3n", "forecast", "--run", f"{work}/forecast", "--baseline", str(path), "--age", str(age), "--modality",
            "T1", "--target-age", str(age + 1), "--target-age", str(age + 3), "--steps", "2", "--output",
            f"{work}/forecast-{name}")  # fmt: skip
        folder = work / f"forecast-{name}"
        made[name] = [
            on_the_grid(folder / f) for f in ("baseline.nii.gz", "volume-00000.nii.gz", "volume-00001.nii.gz")
        ]
    for a, b in zip(made["stored"], made["ras"], strict=True):
        assert np.abs(a - b).max() < 0.02 * a.max()
    record = json.loads((work / "forecast-ras/forecast.json").read_text())
    assert [v["target_age_years"] for v in record["volumes"]] == [age + 1, age + 3]
    text = (work / "forecast-ras/forecast.json").read_text()
    assert "ras.nii" not in text  # names of files may be names of people


def test_evaluations(work: Path) -> None:
    run("g3n", "evaluate", "reconstruction", "--run", f"{work}/decoder", "--shards", f"{work}/shards", "--output",
        f"{work}/rec")  # fmt: skip
    metrics = json.loads((work / "rec/metrics.json").read_text())
    with open(work / "rec/volumes.csv") as file:
        rows = list(csv.DictReader(file))
    assert metrics["volumes"] == len(rows) > 0
    assert metrics["psnr_gain_db"] == pytest.approx(np.mean([float(r["psnr_gain_db"]) for r in rows]), abs=1e-5)
    assert metrics["psnr_gain_db"] > 0  # even a tokenizer of 30 steps knows more than the mean
    assert (work / "rec/reconstruction.png").is_file()

    words = ("g3n", "evaluate", "generation", "--run", f"{work}/dit", "--ages", "25,85", "--count", "2", "--steps", "2")
    run(*words, "--output", f"{work}/gen")
    metrics = json.loads((work / "gen/metrics.json").read_text())
    assert set(metrics["ventricle_ml_by_age"]) == {"25", "85"}
    assert {"age", "sex", "diagnosis", "lesion"} == set(metrics["effects"])
    run(*words, "--latents", f"{work}/latents", "--utility", "--output", f"{work}/gen-probed")
    metrics = json.loads((work / "gen-probed/metrics.json").read_text())
    assert 0 <= metrics["probes"]["sex"]["real"]["share_right"]["value"] <= 1
    assert {"train_on_synthetic", "rare_group"} <= set(metrics["utility"])

    run("g3n", "evaluate", "forecasting", "--run", f"{work}/forecast", "--latents", f"{work}/latents", "--steps", "2",
        "--output", f"{work}/fore")  # fmt: skip
    metrics = json.loads((work / "fore/metrics.json").read_text())
    assert metrics["pairs"] > 0
    assert set(metrics["methods"]) == {"ours", "one_draw", "no_change", "mean_change", "regression"}
    assert metrics["growth"]["years"] == [0, 1, 2, 5, 10]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "--run", "{0}/dit", "--age", "170"], "error: age_years is 170; allowed range is 0 to 110"),
        (
            ["sample", "--run", "{0}/dit", "--set", "agee=1"],
            "error: unknown variable 'agee'; did you mean 'age_years'?",
        ),
        (["sample", "--run", "{0}/mae"], "error: '{0}/mae' is a checkpoint of task 'mae', expected task 'dit'"),
        (["sample", "--run", "{0}/dit", "--device", "gpu7"], "error: device 'gpu7' cannot be used"),
        (["sample", "--run", "{0}/nothing"], "error: '{0}/nothing' holds no finished checkpoint"),
        (
            ["forecast", "--run", "{0}/forecast", "--baseline", "{0}/cut.nii.gz", "--age", "50", "--target-age", "51"],
            "error: '{0}/cut.nii.gz' is truncated",
        ),
        (
            ["forecast", "--run", "{0}/forecast", "--baseline", "{0}/x.nii.gz", "--age", "50", "--target-age", "49"],
            "error: target age 49 is before the baseline's age 50",
        ),
        (
            ["evaluate", "reconstruction", "--run", "{0}/decoder", "--shards", "{0}/latents"],
            "error: shards '{0}/latents' are latents",
        ),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    work: Path, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from g3n import cli

    whole = next((work / "bids").rglob("*_T1w.nii.gz")).read_bytes()
    (work / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    output = work / "never"
    monkeypatch.setattr("sys.argv", ["g3n", *(w.format(work) for w in words), "--output", str(output)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert errors[0].startswith(message.format(work))
    assert not output.exists()


def test_a_bad_table_is_named(work: Path, tmp_path: Path) -> None:
    from g3n.generate import open_generator
    from g3n.outputs import read_conditions

    variables = open_generator(work / "dit", "cpu").variables
    (tmp_path / "t.csv").write_text("modality,age_years\nT1,30\nT1,300\n")
    with pytest.raises(G3nError, match=r"line 3: age_years is 300; allowed range is 0 to 110"):
        read_conditions(tmp_path / "t.csv", variables)
    (tmp_path / "t.csv").write_text("modality,agee_years\nT1,30\n")
    with pytest.raises(G3nError, match=r"has the column 'agee_years'; did you mean 'age_years'\?"):
        read_conditions(tmp_path / "t.csv", variables)
