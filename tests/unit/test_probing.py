"""g3n probe: folds that leak nobody, tasks that say why they cannot run, and results on a cohort with planted effects and nulls."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm
from statsmodels.stats.multitest import multipletests

from benchmarks.probing import made
from data_prep import cohorts, schema
from data_prep.manifest import MODALITIES
from data_prep.phantom import draw_subject
from g3n.cli import app
from g3n.config import G3nError
from g3n.features import Features, write_features
from g3n.probing import run
from g3n.probing.align import align
from g3n.probing.folds import components, plan_folds, read_folds, write_folds
from g3n.probing.foreign import read_any, read_targets, understood
from g3n.probing.tasks import CannotRun, Task, left_out_column, read_tasks, select

ROOT = Path(__file__).resolve().parents[2]
MANY, MORE, TINY = (ROOT / "configs" / name for name in ("probes.yaml", "probes_more.yaml", "tiny/probes.yaml"))


def g3n(*words: object) -> None:
    app([str(word) for word in words], standalone_mode=False)


# --- folds


def test_scans_that_share_anything_are_one_group() -> None:
    """1 and 2 by subject, 2 and 3 by family, 3 and 5 by duplicate; a missing value links nobody."""
    table = pd.DataFrame({
        "subject": ["a", "a", "b", "c", "d", "e"],
        "family": [None, "f", "f", None, None, "g"],
        "duplicate": [None, None, "x", None, "x", None],
    })  # fmt: skip
    groups = components(table, ["subject", "family", "duplicate"])
    assert [set(np.flatnonzero(groups == g)) for g in np.unique(groups)] == [{0, 1, 2, 4}, {3}, {5}]


def test_folds_keep_groups_whole_test_one_scan_a_subject_and_are_alike_in_classes() -> None:
    rng = np.random.default_rng(0)
    subject = rng.integers(0, 100, 400)
    group = subject // 2  # two siblings each
    label = (group % 4 == 0).astype(int)
    folds = plan_folds(group, subject, label, 5, 3, seed=0)
    people = len(np.unique(subject))
    for fold, judged in zip(folds.fold_RN, folds.judged_RN, strict=True):
        assert all(len(np.unique(fold[group == g])) == 1 for g in np.unique(group))
        assert judged.sum() == people == len(np.unique(subject[judged]))
        positive = [len(np.unique(group[(fold == f) & (label == 1)])) for f in range(5)]
        assert max(positive) - min(positive) <= 1
    assert not np.array_equal(folds.fold_RN[0], folds.fold_RN[1])
    assert not np.array_equal(folds.judged_RN[0], folds.judged_RN[1])
    again = plan_folds(group, subject, label, 5, 3, seed=0)
    np.testing.assert_array_equal(folds.fold_RN, again.fold_RN)
    with pytest.raises(ValueError, match="3 groups for 5 folds"):
        plan_folds(np.arange(3), np.arange(3), np.zeros(3), 5, 1, 0)


def test_sites_stay_whole() -> None:
    site = np.repeat([0, 1, 2, 3, 4, 5], [50, 40, 10, 10, 10, 5])
    folds = plan_folds(np.arange(125), np.arange(125), np.zeros(125), 3, 2, 0, whole_N=site)
    for fold in folds.fold_RN:
        assert all(len(np.unique(fold[site == s])) == 1 for s in range(6))
        assert sorted(np.bincount(fold)) == [35, 40, 50]


def test_folds_on_disk_are_those_that_were_drawn(tmp_path: Path) -> None:
    group = np.arange(30) // 3
    keys = [f"scan{i}" for i in range(30)]
    folds = plan_folds(group, np.arange(30) // 3, np.zeros(30), 5, 2, 0)
    path = tmp_path / "folds.csv"
    write_folds(path, keys, folds)
    order = np.random.default_rng(0).permutation(30)
    again = read_folds(path, [keys[i] for i in order], group[order])
    np.testing.assert_array_equal(again.fold_RN, folds.fold_RN[:, order])
    np.testing.assert_array_equal(again.judged_RN, folds.judged_RN[:, order])
    with pytest.raises(G3nError, match=r"lack 1 of the 31 scans"):
        read_folds(path, [*keys, "another"], np.append(group, 99))
    with pytest.raises(G3nError, match="in two folds"):
        read_folds(path, keys, np.zeros(30, np.int64))
    path.write_text("key,fold_0\nscan0,no\n")
    with pytest.raises(G3nError, match=r"cannot be read|lack"):
        read_folds(path, ["scan0"], group[:1])


# --- tasks


def test_the_table_has_15_and_8_tasks_of_names_that_data_prep_knows() -> None:
    tasks = read_tasks(MANY)
    assert [sum(bool(t.classes) is kind for t in tasks.values()) for kind in (True, False)] == [15, 8]
    more = read_tasks(MORE)
    assert not set(tasks) & set(more)
    columns = {**schema.VALUES, "modality": MODALITIES, "cohort": cohorts.NAMES}
    for name, task in [*tasks.items(), *more.items()]:
        assert set(task.cohorts) <= set(cohorts.NAMES), name
        assert task.cohorts, name
        assert set(task.modalities) <= set(MODALITIES), name
        assert task.target in columns, name
        assert task.leave_out in (None, "cohort", "site"), name
        asked = [(task.target, values) for values in task.levels.values()] + list(task.where.items())
        for column, values in asked:
            for value in values:
                known = value in MODALITIES if column == "modality" else schema.valid(column, value)
                assert known, f"{name}: {column} {value}"
        if not task.classes:
            assert isinstance(schema.VALUES[task.target], schema.Number), name


def test_all_tasks_run_where_all_cohorts_are() -> None:
    """On the made cohorts of the benchmark, which have the published numbers of people (here a tenth)."""
    scans = align({"made": made(0.1, 4)})
    for task in read_tasks(MANY).values():
        for modality in task.modalities:
            selection = select(task, scans.table, modality, scans.group_N, 5)
            assert len(selection.rows) >= 15
            if task.leave_out is not None:
                assert len(np.unique(left_out_column(task, scans.table, selection))) >= 3


def test_the_tiny_table_is_of_the_phantom() -> None:
    people = [draw_subject(0, i) for i in range(60)]
    levels = {
        "sex": {p.sex for p in people},
        "diagnosis": {p.diagnosis for p in people},
        "cohort": {p.cohort.name for p in people},
        "modality": set(MODALITIES),
    }
    for task in read_tasks(TINY).values():
        if task.target in levels:
            assert {v for values in task.levels.values() for v in values} <= levels[task.target]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tasks: {a: {target: sex, clases: [F, M]}}", r"tasks.a.clases.*did you mean 'classes'"),
        ("tasks: {a: {target: sex, classes: [F]}}", "one class"),
        ("tasks: {a: {target: sex, classes: [F, M], metric: mae}}", "does not fit"),
        ("tasks: {a: {target: x, classes: {low: [0, 1], high: [3, 2]}}}", r"'high'.*from low to high"),
        ("tasks: {a: {target: x, where: {age_years: [1, b]}}}", r"'age_years'"),
        ("tasks: {}", "no tasks"),
        ("probes: {}", "key 'probes'"),
    ],
)
def test_wrong_tables_of_tasks_are_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "tasks.yaml"
    path.write_text(text)
    with pytest.raises(G3nError, match=words):
        read_tasks(path)


def test_an_unknown_task_is_named() -> None:
    with pytest.raises(G3nError, match=r"'age_'.*did you mean 'age'"):
        read_tasks(TINY, ["age_"])


def table(n: int = 60) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame({
        "key": [f"k{i}" for i in range(n)], "subject": [f"s{i}" for i in range(n)], "cohort": "one", "modality": "T1",
        "site": [f"site{i % 4}" for i in range(n)], "split": ["train" if i % 3 else "val" for i in range(n)],
        "age_years": rng.uniform(20, 80, n), "sex": rng.choice(["F", "M"], n), "mmse": np.where(np.arange(n) < 8, 29.0, np.nan),
        "diagnosis": ["AD" if i < 3 else "HC" for i in range(n)], "copy": [f"s{i}" for i in range(n)],
        "scanner": [f"scanner {i % 4}" for i in range(n)], "other_split": ["a" if i % 3 else "b" for i in range(n)], "same": 3.0,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("task", "why"),
    [
        (Task("sex", cohorts=("adni",), classes=("F", "M")), "no scan of adni"),
        (Task("mmse_total"), "no column 'mmse_total'"),
        (Task("mmse"), "8 people with 'mmse'; 5 folds take 10"),
        (Task("diagnosis", classes=("HC", "AD")), "too few people: 3 of AD; 5 folds take 5"),
        (Task("sex", classes=("F", "M"), where={"age_years": (90, 99)}), "no scan where age_years is 90 to 99"),
        (Task("same"), "3 in every scan"),
        (Task("subject", classes=("s1", "s2")), "refused: 'subject'"),
        (Task("split", classes=("train", "val")), "refused: 'split'"),
        (Task("site", classes=("site0", "site1")), "refused: 'site'"),
        (Task("scanner", classes=("scanner 0", "scanner 1")), "refused: 'scanner' is the column 'site'"),
        (Task("other_split", classes=("a", "b")), "refused: 'other_split' is the column 'split'"),
    ],
)
def test_why_a_task_cannot_run(task: Task, why: str) -> None:
    with pytest.raises(CannotRun, match=why):
        select(task, table(), None, np.arange(60), 5)


def test_a_number_that_is_the_id_is_refused() -> None:
    numbered = table().assign(subject=[str(i) for i in range(60)], number=range(60))
    with pytest.raises(CannotRun, match="refused: 'number' is the column 'subject'"):
        select(Task("number"), numbered, None, np.arange(60), 5)


def test_scans_of_a_task() -> None:
    found = select(
        Task("age_years", classes={"young": (20, 40), "old": (60, 80)}, where={"sex": ("F",)}),
        table(),
        "T1",
        np.arange(60),
        3,
    )
    t = table().iloc[found.rows]
    assert set(t["sex"]) == {"F"}
    assert (t["age_years"][found.y_N == 1] >= 60).all()
    assert (t["age_years"][found.y_N == 0] <= 40).all()
    assert found.names == ("young", "old")


def test_a_target_that_is_the_same_within_each_site_is_not_tested_across_sites() -> None:
    t = table().assign(vendor=lambda t: t["site"].map({"site0": "A", "site1": "A", "site2": "B", "site3": "B"}))
    task = Task("vendor", classes=("A", "B"), leave_out="site")
    selection = select(task, t, None, np.arange(60), 5)
    with pytest.raises(CannotRun, match="same within each site"):
        left_out_column(task, t, selection)
    cohort = Task("cohort", classes=("one", "two"), leave_out="cohort")
    with pytest.raises(CannotRun, match="what is left out"):
        left_out_column(cohort, t, selection)
    two_sites = t.assign(site=["a", "b"] * 30)
    with pytest.raises(CannotRun, match="2 sites"):
        left_out_column(task, two_sites, selection)


def test_a_shuffled_task_keeps_labels_and_forgets_whose_they_are() -> None:
    t = table()
    true, dealt = (select(Task("age_years", shuffled=s), t, None, np.arange(60), 5).y_N for s in (False, True))
    assert sorted(true) == sorted(dealt)
    assert abs(np.corrcoef(true, dealt)[0, 1]) < 0.3


# --- anyone's features


def test_features_of_anyone(tmp_path: Path) -> None:
    ids, array = np.array(["a", "b", "c"]), np.arange(6.0).reshape(3, 2)
    np.savez(tmp_path / "a.npz", features=array, ids=ids)
    pd.DataFrame({"scan": ids, "x": array[:, 0], "y": array[:, 1], "word": "w"}).to_parquet(tmp_path / "b.parquet")
    pd.DataFrame({"ids": ids, "features": list(array)}).to_parquet(tmp_path / "c.parquet")
    for name in ("a.npz", "b.parquet", "c.parquet"):
        features = read_any(tmp_path / name, "scan")
        assert list(features.table["key"]) == list(ids)
        np.testing.assert_array_equal(features.array("features"), array)


def test_features_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "f.npz"
    cases: list[tuple[dict[str, np.ndarray], str]] = [
        ({"features": np.ones((3, 2)), "ids": np.array([{}, [], 1], object)}, "no npz of plain arrays"),
        ({"features": np.ones((3, 2))}, "lack the array ids"),
        ({"features": np.ones((3, 2)), "ids": np.arange(4)}, r"\[4, d\]"),
        ({"features": np.ones(3), "ids": np.arange(3)}, r"\[3, d\]"),
        ({"features": np.array([["a"]]), "ids": np.arange(1)}, "expected numbers"),
        ({"features": np.ones((3, 2)), "ids": np.array(["a", "a", "b"])}, "1 ids more than once"),
        ({"features": np.array([[1.0], [np.nan]]), "ids": np.arange(2)}, "1 of 2 rows with NaN"),
    ]
    for arrays, words in cases:
        np.savez(path, **arrays)  # type: ignore[arg-type]
        with pytest.raises(G3nError, match=words):
            read_any(path, "id")
    np.savez(path, features=np.ones((30, 20)), ids=np.arange(30))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(G3nError, match="no npz"):
        read_any(path, "id")
    path.with_suffix(".parquet").write_text("x")
    with pytest.raises(G3nError, match="no Parquet"):
        read_any(path.with_suffix(".parquet"), "id")
    with pytest.raises(G3nError, match="do not exist"):
        read_any(tmp_path / "missing.npz", "id")


def test_an_npz_that_unpacks_to_more_than_the_limit_is_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "f.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("features.npy", bytes(1 << 20))
    monkeypatch.setattr("g3n.probing.foreign.MAX_BYTES", 1 << 19)
    with pytest.raises(G3nError, match="larger than"):
        read_any(tmp_path / "f.npz", "id")


def test_how_a_column_of_targets_is_understood() -> None:
    task, why = understood("score", pd.Series([1.5, 2.0, 3.25]), 5)
    assert task == Task("score")
    assert why == "number"
    task, _ = understood("stage", pd.Series([1.0, 2.0, 4.0, None]), 5)
    assert task is not None
    assert list(task.levels) == ["1", "2", "4"]
    assert understood("count", pd.Series(np.arange(30.0)), 5)[0] == Task("count")
    task, why = understood("dx", pd.Series(["a"] * 9 + ["b"] * 9 + ["c"]), 5)
    assert task == Task("dx", classes=("a", "b"))
    assert "rarer than 5: c" in why
    task, why = understood("name", pd.Series([f"n{i}" for i in range(30)]), 5)
    assert task is None
    assert "30 different words" in why


def test_targets_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    cases = [
        ("id,x\na,1\na,2\n", "id", "1 ids more than once"),
        ("id,x\na,1\n", "idd", "did you mean 'id'"),
        ("", "id", "cannot be read"),
        ("id,x\na,1,2,3\nb,1\n", "id", "cannot be read"),
    ]
    for text, column, words in cases:
        path.write_text(text)
        with pytest.raises(G3nError, match=words):
            read_targets(path, column, 5)
    with pytest.raises(G3nError, match="cannot be read"):
        read_targets(tmp_path / "missing.csv", "id", 5)


# --- the whole


def phantom(people: int = 90) -> pd.DataFrame:
    rows = []
    for i in range(people):
        p = draw_subject(0, i)
        for v, visit in enumerate(p.visits[:2]):
            for m in p.modalities:
                facts = {
                    "sex": p.sex,
                    "diagnosis": p.diagnosis,
                    "cohort": p.cohort.name,
                    "field_strength_t": p.field_strength_t,
                }
                name = f"sub-{i:016x}"
                key = {"key": f"{name}_ses-{v + 1:02d}_{m}", "subject": name, "split": "train", "modality": m}
                rows.append({**key, "age_years": visit.age_years, **facts})
    return pd.DataFrame(rows)


def encoded(t: pd.DataFrame, noise: float, seed: int) -> np.ndarray:
    """Features with every variable of the phantom in them, and ``noise``."""
    words = [t["diagnosis"] == "AD", t["diagnosis"] == "glioma", *(t["modality"] == m for m in MODALITIES)]
    words += [t["cohort"] == c for c in ("PhantomA", "PhantomB")]
    numbers = [(t["age_years"] - 50) / 20, (t["sex"] == "M") * 2.0, t["field_strength_t"] * 1.5]
    signal = np.stack([*(w.to_numpy() * 2.5 for w in words), *numbers], axis=1)
    rng = np.random.default_rng(seed)
    turn = np.random.default_rng(1).standard_normal((signal.shape[1], 24)) * 0.6
    return (signal @ turn + noise * rng.standard_normal((len(t), 24))).astype(np.float32)


def results(output: Path, name: str = "results") -> pd.DataFrame:
    return pd.read_csv(output / f"{name}.csv")


def test_the_phantom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every variable is found, the nulls are not, the better encoder is, baselines stand beside; the same command goes on."""
    t = phantom()
    for seed, (name, noise) in enumerate({"sharp": 0.7, "blurred": 4.0}.items()):
        array = encoded(t, noise, seed)
        write_features(tmp_path / f"{name}.parquet", Features(t, {"mean": array, "cls": array[:, :3]}, {}))
    words: Sequence[object] = (
        "probe", "--features", tmp_path / "sharp.parquet", "--features", tmp_path / "blurred.parquet", "--tasks", TINY,
        "--repeats", 2, "--no-mlflow",
    )  # fmt: skip
    out = tmp_path / "out"
    g3n(*words, "--output", out)
    printed = capsys.readouterr().out
    assert "age + sex" in printed
    found = results(out)
    tests = found[(found["scheme"] == "folds") & found["p"].notna()].set_index(["encoder", "task"])
    for task in read_tasks(TINY):
        p, q = tests.loc[("sharp", task), ["p_holm", "q_bh"]]
        assert p >= q
        assert (q < 0.05) == (not task.startswith("null")), f"{task}: q {q}"
    of = found[found["scheme"] == "folds"].set_index(["encoder", "task", "metric"])
    assert of.loc[("sharp", "modality", "auroc"), "value"] > 0.95
    assert of.loc[("sharp", "age", "r"), "value"] > 0.8
    assert of.loc[("majority", "sex", "auroc"), "value"] == 0.5
    assert of.loc[("mean predictor", "age", "r2"), "value"] == pytest.approx(0, abs=1e-6)
    age_sex = of.loc[("age + sex", "ad_vs_hc", "auroc")]
    assert age_sex["low"] <= age_sex["value"] <= age_sex["high"]
    assert "age" not in found[found["encoder"] == "age + sex"]["task"].tolist()  # it is the target there
    counts = of.loc[("sharp", "sex", "auroc")]
    assert (counts["n_scans"], counts["n_subjects"]) == (len(t), 90)
    of_sex = t.groupby("sex")["subject"].nunique()
    assert counts["classes"] == f"F:{of_sex['F']} M:{of_sex['M']}"
    left = found[found["scheme"] == "leave-cohort-out"]
    assert set(left["task"]) == {"age"}
    assert left["p"].isna().all()

    pairs = results(out, "comparisons").set_index(["encoder", "other", "task"])
    better = pairs.loc[("sharp", "blurred", "age")]
    assert better["difference"] > 0
    assert better["low"] > 0
    assert better["q_bh"] < 0.05
    assert pairs.loc[("sharp", "blurred", "null_age"), "p"] > 0.05
    assert ("sharp", "age + sex", "glioma_vs_hc") in pairs.index

    assert pairs["p"].to_numpy() == pytest.approx(2 * norm.sf(np.abs(pairs["z"])))
    for _, family in [*tests.reset_index().groupby(["encoder"]), *pairs.reset_index().groupby(["encoder", "other"])]:
        for column, method in (("p_holm", "holm"), ("q_bh", "fdr_bh")):
            assert family[column].to_numpy() == pytest.approx(multipletests(family["p"], method=method)[1])

    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["did_not_run"] == {}
    page = (out / "index.html").read_text()
    assert "glioma_vs_hc" in page
    assert "data:image/png" in page
    assert metrics["tasks"]["sex all"]["folds"]["sharp mean"]["auroc"]["subjects"] == 90
    assert (out / "probe.png").stat().st_size > 10_000
    splits = pd.read_csv(out / "splits" / "sex-all.csv")
    whose = splits["key"].str.split("_").str[0]
    assert (splits.groupby(whose)["fold_0"].nunique() == 1).all()
    assert (splits.groupby(whose)["tested_0"].sum() == 1).all()

    # the same command, with all but one task done
    before = (out / "results.csv").read_bytes()
    (out / "tasks" / "sex-all.json").unlink()
    ran = []
    true = run.run_task
    monkeypatch.setattr(run, "run_task", lambda name, *rest: [ran.append(name), true(name, *rest)][1])
    g3n(*words, "--output", out)
    assert ran == ["sex"]
    assert (out / "results.csv").read_bytes() == before
    with pytest.raises(G3nError, match="something else"):
        g3n(*words, "--output", out, "--seed", 1)

    # folds of an earlier call, for other features: another seed does not matter any more
    more = tmp_path / "more"
    g3n("probe", "--features", tmp_path / "sharp.parquet", "--tasks", TINY, "--task", "sex", "--task", "age", "--kind", "cls",
        "--kind", "mean", "--repeats", 2, "--no-mlflow", "--output", more, "--splits", out / "splits", "--seed", 5)  # fmt: skip
    again = results(more).set_index(["encoder", "kind", "scheme", "task", "metric"])["value"]
    known = found.set_index(["encoder", "kind", "scheme", "task", "metric"])["value"]
    for at in (("sharp", "mean", "folds", "sex", "auroc"), ("sharp", "mean", "folds", "age", "mae")):
        assert again[at] == known[at]
    assert (
        again["sharp", "mean", "leave-cohort-out", "age", "mae"]
        == known["sharp", "mean", "leave-cohort-out", "age", "mae"]
    )
    with pytest.raises(G3nError, match=r"lack|cannot be read"):
        g3n("probe", "--features", tmp_path / "sharp.parquet", "--tasks", TINY, "--splits", tmp_path, "--no-mlflow",
            "--output", tmp_path / "no")  # fmt: skip
    assert again["sharp", "cls", "folds", "age", "mae"] > again["sharp", "mean", "folds", "age", "mae"]


def test_tasks_that_cannot_run_are_listed_and_a_named_one_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    t = phantom(40)
    write_features(tmp_path / "f.parquet", Features(t.drop(columns="field_strength_t"), {"mean": encoded(t, 1, 0)}, {}))
    (tmp_path / "t.yaml").write_text(
        "tasks: {sex: {target: sex, classes: [F, M]}, tesla: {target: field_strength_t}, adni: {target: sex, classes: [F, M], cohorts: [adni]}}"
    )
    words = (
        "probe",
        "--features",
        tmp_path / "f.parquet",
        "--tasks",
        tmp_path / "t.yaml",
        "--no-mlflow",
        "--repeats",
        1,
    )
    g3n(*words, "--output", tmp_path / "out")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["did_not_run"] == {
        "tesla all": "the features have no column 'field_strength_t'",
        "adni all": "no scan of adni",
    }
    assert "not run: tesla" in capsys.readouterr().out
    with pytest.raises(G3nError, match=r"'tesla' cannot run: .*field_strength_t"):
        g3n(*words, "--output", tmp_path / "two", "--task", "tesla")
    with pytest.raises(G3nError, match="none of 2 tasks can run"):
        g3n(*words, "--output", tmp_path / "three", "--task", "tesla", "--task", "adni")
    with pytest.raises(G3nError, match=r"'meen'.*did you mean 'mean'"):
        g3n(*words, "--output", tmp_path / "four", "--kind", "meen")
    with pytest.raises(G3nError, match="no folder"):
        g3n(*words, "--output", tmp_path / "five", "--splits", tmp_path / "nowhere")


def test_files_that_do_not_go_together() -> None:
    t = phantom(20)
    one = Features(t, {"mean": encoded(t, 1, 0)}, {})
    with pytest.raises(G3nError, match="no scan in common"):
        align({"a": one, "b": Features(t.assign(key=[f"x{i}" for i in range(len(t))]), one.arrays, {})})
    with pytest.raises(G3nError, match=r"a and b differ in 'age_years' of \d+ of"):
        align({"a": one, "b": Features(t.assign(age_years=t["age_years"] + 1), one.arrays, {})})
    with pytest.raises(G3nError, match="b has no features mean; give --kind, known: cls, pca"):
        align({"a": one, "b": Features(t, {"cls": one.array("mean"), "pca": one.array("mean")}, {})})
    order = np.random.default_rng(0).permutation(len(t))[5:]
    part = Features(t.iloc[order].reset_index(drop=True), {"pca": one.array("mean")[order]}, {})
    both = align({"a": one, "b": part})
    assert len(both.table) == len(t) - 5
    np.testing.assert_array_equal(both.encoders[0].array, both.encoders[1].array)  # the same rows, and b's only kind
    assert "5 scans of a" in both.notes[0]
    two = Features(t, {"mean": one.array("mean"), "latent": one.array("mean")}, {})
    assert [e.kind for e in align({"a": two, "b": part}, ["mean", "latent"]).encoders] == ["mean", "latent", "pca"]


def test_anyones_features_and_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ids in another order, an id without features, missing values; runs reach MLflow, where somebody would look."""
    from mlflow.tracking import MlflowClient

    rng = np.random.default_rng(0)
    n = 80
    x, ids = rng.standard_normal((n, 6)), np.array([f"p{i:03d}" for i in range(n)])
    np.savez(tmp_path / "mine.npz", features=x, ids=ids)
    known = pd.DataFrame(
        {"scan": ids, "score": x[:, 0] * 10 + rng.standard_normal(n), "dx": np.where(x[:, 1] > 0, "sick", "well")}
    )
    known["stage"] = rng.integers(1, 4, n)  # a null
    known.loc[3, "score"] = None
    known = pd.concat([known, pd.DataFrame({"scan": ["p999"], "score": [1.0], "dx": ["well"], "stage": [1]})])
    known.sample(frac=1, random_state=0).to_csv(tmp_path / "t.tsv", sep="\t", index=False, na_rep="n/a")
    words = ("probe", "--features", tmp_path / "mine.npz", "--repeats", 2, "--output", tmp_path / "out")
    g3n(*words, "--targets", tmp_path / "t.tsv", "--id", "scan")
    found = results(tmp_path / "out").set_index(["encoder", "task", "metric"])
    assert found.loc[("mine", "score", "r"), "value"] > 0.95
    assert found.loc[("mine", "score", "r"), "n_scans"] == n - 1
    assert found.loc[("mine", "dx", "auroc"), "q_bh"] < 0.01
    assert found.loc[("mine", "stage", "auroc"), "p"] > 0.05
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["about"]["understood"]["stage"] == "classes: 3 whole numbers"
    assert any("person of its own" in note for note in metrics["about"]["notes"])
    client = MlflowClient(f"sqlite:///{tmp_path / 'out' / 'runs' / 'mlflow.db'}")
    (entry,) = client.search_runs([client.get_experiment_by_name("g3n-probe").experiment_id])
    assert entry.data.metrics["score-all/folds/r"] == pytest.approx(found.loc[("mine", "score", "r"), "value"])
    assert entry.data.params["encoder"] == "mine"
    assert {"probe.png", "results.csv"} <= {f.path for f in client.list_artifacts(entry.info.run_id)}
    capsys.readouterr()
    with pytest.raises(G3nError, match="go together"):
        g3n(*words, "--targets", tmp_path / "t.tsv")
    with pytest.raises(G3nError, match="give --targets"):
        g3n(*words)
    (tmp_path / "other.csv").write_text("scan,x\nq,1\n")
    with pytest.raises(G3nError, match="no id of the targets"):
        g3n(*words, "--targets", tmp_path / "other.csv", "--id", "scan")


def test_a_name_of_a_column_is_no_path() -> None:
    assert run.plain("age_years") == "age_years"
    assert "/" not in run.plain("../../etc/passwd")
    assert run.plain("a/b") != run.plain("a_b") != run.plain("a:b")
