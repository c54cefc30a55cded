"""Reading tables: encodings, delimiters, spaces in names, words that are not missing, dates, genotypes."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from data_prep.cohorts.tables import code, day, e4_count, find_table, number, read_table
from g3n.config import G3nError


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1"])
@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("tsv", "\t"), ("tsv", ","), ("csv", ";")])
def test_any_encoding_and_delimiter(encoding: str, suffix: str, delimiter: str, tmp_path: Path) -> None:
    text = "\n".join(delimiter.join(row) for row in (["ID", "AGE ", "PsP"], [" 007", "9.5", "NA"], ["é", "", "x"]))
    (tmp_path / f"t.{suffix}").write_bytes(text.encode(encoding))
    rows = read_table(tmp_path / f"t.{suffix}", ["ID", "AGE"])
    assert rows == [{"ID": "007", "AGE": "9.5", "PsP": "NA"}, {"ID": "é", "AGE": "", "PsP": "x"}]  # all text, NA too


@pytest.mark.parametrize(
    ("names", "newest"),
    [
        (["MMSE_02Jan2020.csv", "MMSE_01Jan2026.csv", "MMSE_31Dec2019.csv"], "MMSE_01Jan2026.csv"),
        (["MMSE_01Feb2025.csv", "MMSE_01Apr2025.csv"], "MMSE_01Apr2025.csv"),
        (["MMSE_20250101.csv", "MMSE_20260101.csv", "MMSE_ALL.csv"], "MMSE_20260101.csv"),
        (["MMSE_v2.csv", "MMSE_v5.csv"], "MMSE_v5.csv"),
    ],
)
def test_the_newest_table_is_taken(names: list[str], newest: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).touch()
    found = find_table(tmp_path, "MMSE_*.csv")
    assert found is not None
    assert found.name == newest


@pytest.mark.parametrize(
    ("text", "count"),
    [("E3/E4", 1), ("e4/e4", 2), ("34", 1), ("34.0", 1), ("3.0/4.0", 1), ("22", 0), ("", None), ("-4", None)],
)
def test_genotypes(text: str, count: float | None) -> None:
    assert e4_count(text, "APOE", ["-4"]) == count


@pytest.mark.parametrize("text", ["4", "3", "1/4", "E3", "E3/E4/E4", "unknown", "-1"])
def test_what_is_no_genotype_is_refused(text: str) -> None:
    with pytest.raises(G3nError, match="APOE has the genotype"):
        e4_count(text, "APOE", ["-4"])


def test_dates() -> None:
    written = ("2026-03-09", "2026-03-09 10:00:00.0", "20260309", "03/09/2026", "09Mar2026")
    assert {day(text) for text in written} == {datetime.date(2026, 3, 9)}
    assert day("03/2026") == datetime.date(2026, 3, 1)
    assert [day(text) for text in ("", "-4", "2026", "ALL", "31Feb2026")] == [None] * 5


def test_codes_and_numbers() -> None:
    assert (code("1.0", {"1": "M"}, "SEX"), code(" male", {"Male": "M"}, "SEX"), code("n/a", {}, "SEX")) == (
        "M",
        "M",
        None,
    )
    assert (number("-4.0", ["-4"]), number("N/A"), number("2.50")) == (None, None, 2.5)
    with pytest.raises(G3nError, match="MMSE is 'high'"):
        number("high", what="MMSE")
