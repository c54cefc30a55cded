"""A cohort's folder to a manifest: one row an image, families in one split, days instead of dates."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from data_prep import cohort_scan
from data_prep.cohort_scan import scan_cohort
from data_prep.cohorts.contract import Cohort, Image, Row
from data_prep.cohorts.join import Report, join
from data_prep.manifest import read_manifest
from data_prep.pack import Packing, choose
from data_prep.scan import Shares
from g3n.config import G3nError

DAY = datetime.date(2020, 1, 1)


def made_up(images: list[Image], rows: list[Row], **more: object) -> Cohort:
    return Cohort("toy", "open", lambda root: images, lambda root, mode: rows, **more)  # type: ignore[arg-type]


def later(days: int) -> datetime.date:
    return DAY + datetime.timedelta(days)


def test_manifest_of_a_cohort(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [
        Image("a/1.nii", "S-01", "T1", "bl", date=DAY),
        Image("a/2.nii", "S-01", "T1", "m12", date=later(400)),
        Image("a/3.nii", "S-01", "T1", "m12", run=2, date=later(400)),
        Image("b/1.nii", "S-02", "T1", "bl", acq="x", date=DAY, space="native_stripped", mask="b/m.nii"),
    ]
    rows = [Row(s, {"birth_date": datetime.date(1950, 1, 1), "sex": "F", "family": "fam7"}) for s in ("S-01", "S-02")]
    rows += [
        Row("S-01", {"mmse": 28.0, "diagnosis": "HC"}, date=later(-20)),
        Row("S-01", {"mmse": 24.0, "diagnosis": "AD"}, date=later(390)),
        Row("S-01", {"mmse": 77.0, "diagnosis": "MCI"}, date=later(900)),
    ]
    monkeypatch.setattr(cohort_scan, "load_cohort", lambda name: made_up(images, rows))
    scan_cohort(tmp_path, "toy", tmp_path / "m.tsv", "clean", Shares(0.3, 0.3, 0))
    scans = read_manifest(tmp_path / "m.tsv").scans
    assert [(s.subject, s.session, s.run, s.days_from_baseline) for s in scans] == [
        ("S01", "bl", 1, 0.0), ("S01", "m12", 1, 400.0), ("S01", "m12", 2, 400.0), ("S02", "bl", 1, 0.0)
    ]  # fmt: skip
    assert [s.diagnosis for s in scans] == ["HC", "AD", "AD", None]
    assert [s.phenotypes.get("mmse") for s in scans] == [28.0, 24.0, 24.0, None]
    assert scans[0].phenotypes["score_delay_days"] == 20
    assert scans[1].age_years == pytest.approx(71.09, abs=0.01)
    assert {s.split for s in scans} == {scans[0].split}
    assert {s.group for s in scans} == {"toy:family:fam7"}
    assert "2020" not in (tmp_path / "m.tsv").read_text()


def test_a_split_stays_when_others_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = [Image(f"{i}.nii", f"{i:03d}", "T1", person=f"nki:{i}") for i in range(60)]
    found = {}
    for name, some in (("all", images), ("half", images[::2])):
        monkeypatch.setattr(cohort_scan, "load_cohort", lambda n, some=some: made_up(some, []))
        scan_cohort(tmp_path, "toy", tmp_path / f"{name}.tsv", "clean", Shares(0.2, 0.2, 3))
        found[name] = {s.subject: s.split for s in read_manifest(tmp_path / f"{name}.tsv").scans}
    assert all(found["all"][s] == split for s, split in found["half"].items())
    assert set(found["all"].values()) == {"train", "val", "test"}


def test_join_prefers_the_session_then_the_nearest_date_within_180_days() -> None:
    image = Image("a", "1", "T1", "v2", date=DAY)
    rows = [
        Row("1", {"mmse": 10.0}, session="v2", date=later(170)),
        Row("1", {"mmse": 11.0}, session="v1", date=later(1)),
        Row("1", {"moca": 20.0}, session="v1", date=later(-181)),
        Row("1", {"gds15": 3.0}, session="v1", date=later(-100)),
        Row("1", {"gds15": 5.0}, session="v3", date=later(101)),
        Row("1", {"sex": "F"}),
    ]
    [found] = join(made_up([], []), [image], rows, Report())
    assert found.values == {"mmse": 10.0, "gds15": 3.0, "sex": "F"}
    assert found.delay_days == 170


def test_ids_of_two_sites_are_two_people() -> None:
    images = [Image("a", "7", "T1", site="X"), Image("b", "7", "T1", site="Y")]
    rows = [Row("7", {"sex": "F"}, site="X"), Row("7", {"sex": "M"}, site="Y")]
    found = join(made_up([], [], ids_unique_within="site"), images, rows, Report())
    assert [j.values["sex"] for j in found] == ["F", "M"]
    assert found[0].group != found[1].group


def test_inverted_sexes_are_noticed() -> None:
    """Over all who have images; of a site over the whole table, whoever is imaged: 0.05 off warns, 0.15 may stop."""
    images = [Image(str(i), str(i), "T1") for i in range(60)]
    rows = [Row(str(i), {"sex": "F" if i < 25 else "M", "site": "UM_1"}) for i in range(100)]
    rows += [Row(f"x{i}", {"sex": "M", "site": "UMass"}) for i in range(50)]
    report = Report()
    join(made_up([], [], female_share=0.3), images, rows, report)
    assert "42% of 60 subjects are women, expected about 30%" in report.warnings[0]
    assert "right way round" in report.warnings[0]
    for expected, warnings in ((0.3, 0), (0.31, 1), (0.38, 1)):
        report = Report()
        cohort = made_up([], [], site_female_share={"UM": expected}, sites_must_pass=True)
        join(cohort, images[:2], rows, report)
        assert len(report.warnings) == warnings
    with pytest.raises(G3nError, match="site UM: 25% of 100 subjects are women, expected about 72%"):
        join(made_up([], [], site_female_share={"UM": 0.72}, sites_must_pass=True), images[:2], rows, Report())
    report = Report()
    join(made_up([], [], site_female_share={"UM": 0.72}), images[:2], rows, report)
    assert "site UM: 25% of 100" in report.warnings[0]


def test_people_who_allow_commercial_use_are_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As HBN asks each family; the cohort's own tag holds for whoever did not say yes."""
    answers = {"a": "yes", "b": "no", "c": None}
    images = [Image(f"{s}/1.nii", s, "T1") for s in answers]
    rows = [Row(s, {"commercial_use": answer}) for s, answer in answers.items()]
    cohort = Cohort("toy", "nc", lambda root: images, lambda root, mode: rows)
    monkeypatch.setattr(cohort_scan, "load_cohort", lambda name: cohort)
    scan_cohort(tmp_path, "toy", tmp_path / "m.tsv", "clean", Shares(0, 0, 0))
    scans = read_manifest(tmp_path / "m.tsv").scans
    assert [s.license for s in scans] == ["open", "nc", "nc"]
    chosen, left_out = choose(scans, Packing(commercial=True))
    assert [s.subject for s in chosen] == ["a"]
    assert left_out == {"license": 2}
