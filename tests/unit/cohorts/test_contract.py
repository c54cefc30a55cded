"""Every cohort keeps the contract; floors of matches, shares of women and ranges are those known of the cohorts."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.cohorts import NAMES, load_cohort
from data_prep.cohorts.contract import Image, Row
from data_prep.cohorts.join import Report, join
from data_prep.schema import VALUES, valid
from g3n.config import G3nError

# The share of images with a diagnosis in the published table, rounded down from 100%, and the share of women.
FLOORS = {
    "adni": 0.99, "ppmi": 0.99, "oasis1": 0.99, "oasis2": 0.99, "ixi": 0.97, "hcp_ya": 0.99, "upenn_gbm": 0.99,
    "ucsf_pdgm": 0.99,
}  # fmt: skip
WOMEN = {"ixi": 0.55, "gsp": 0.58, "hcp_ya": 0.54, "upenn_gbm": 266 / 671, "ucsf_pdgm": 202 / 501}
LICENSES = {
    "adni": "dua", "ppmi": "dua", "oasis1": "dua", "oasis2": "dua", "hcp_ya": "dua", "ixi": "open", "upenn_gbm": "open",
    "ucsf_pdgm": "open", "gsp": "nc",
}  # fmt: skip


def test_every_cohort_keeps_the_contract() -> None:
    cohorts = [load_cohort(name) for name in NAMES]
    assert len(cohorts) == 18
    assert [c.name for c in cohorts] == list(NAMES)
    assert {c.license for c in cohorts} <= {"open", "nc", "dua"}
    assert all(0.3 < c.min_match <= 1 for c in cohorts)
    assert {name: load_cohort(name).license for name in LICENSES} == LICENSES
    with pytest.raises(G3nError, match="cohort 'brats' is not known"):
        load_cohort("brats")


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_without_tables_or_images_is_named(name: str, tmp_path: Path) -> None:
    cohort = load_cohort(name)
    assert cohort.discover(tmp_path) == []
    if name != "adni":  # its tables are many, none of them always there
        with pytest.raises(G3nError, match="has no table"):
            cohort.phenotypes(tmp_path, "clean")


@pytest.mark.parametrize("name", FLOORS)
def test_too_few_matches_are_refused(name: str) -> None:
    people = [Image(str(i), str(i), "T1") for i in range(1000)]
    enough = [Row(str(i), {"diagnosis": "HC", "family": "x"}) for i in range(round(FLOORS[name] * 1000))]
    join(load_cohort(name), people, enough, Report())
    with pytest.raises(G3nError, match=f"{name}: only"):
        join(load_cohort(name), people, enough[1:], Report())


@pytest.mark.parametrize("name", WOMEN)
def test_inverted_sexes_of_a_cohort_are_noticed(name: str) -> None:
    people = [Image(str(i), str(i), "T1") for i in range(1000)]
    for women, warnings in ((WOMEN[name], 0), (WOMEN[name] + 0.04, 0), (WOMEN[name] - 0.06, 1), (1 - WOMEN[name], 1)):
        report = Report()
        rows = [Row(str(i), {"sex": "F" if i < women * 1000 else "M", "family": f"{i}"}) for i in range(1000)]
        join(load_cohort(name), people, rows, report)
        assert len(report.warnings) == warnings


def test_relatives_count_one_by_one() -> None:
    """A family of many is not one sex."""
    people = [Image(str(i), str(i), "T1") for i in range(1000)]
    rows = [Row(str(i), {"sex": "F" if i < 540 else "M", "family": f"{i // 2 % 100}"}) for i in range(1000)]
    report = Report()
    join(load_cohort("hcp_ya"), people, rows, report)
    assert report.warnings == []


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("mmse", 0, 30), ("moca", 0, 30), ("gds15", 0, 15), ("mds_updrs_iii", 0, 132), ("scopa_aut", 0, 69), ("cdr_global", 0, 3),
        ("cdr_sb", 0, 18), ("mgmt_index", 0, 17), ("kps", 0, 100), ("education_years", 0, 30), ("apoe_e4_count", 0, 2),
    ],
)  # fmt: skip
def test_values_out_of_range_are_missing_with_a_note(name: str, low: float, high: float) -> None:
    assert [valid(name, v) for v in (low - 1, low, high, high + 1)] == [False, True, True, False]
    report = Report()
    rows = [Row("1", {"family": "x", name: float(high + 1)})]
    [found] = join(load_cohort("hcp_ya"), [Image("a", "1", "T1")], rows, report)
    assert name not in found.values
    assert any(f"{name} is" in note for note in report.notes)
    assert set(VALUES) > {name}


def test_contradicting_diagnoses_leave_no_source() -> None:
    rows = [Row("1", {"diagnosis": dx, "diagnosis_source": "visit"}) for dx in ("HC", "MCI")]
    [found] = join(load_cohort("adni"), [Image("a", "1", "T1")], rows, Report())
    assert found.values == {}
