"""The template is a cohort that works, is short, and is what docs/adding_a_cohort.md walks through."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from data_prep.cohorts import template
from data_prep.cohorts.join import Report, join
from g3n.config import G3nError
from tests.launch import ROOT
from tests.unit.cohorts.fixtures import table, touch

HEADER = "id,visit_date,sex,age,dx,mmse"


def test_it_works(tmp_path: Path) -> None:
    touch(
        tmp_path, "raw/NL0012/20200105/T1.nii.gz", "raw/NL0012/20200105/FLAIR.nii.gz", "raw/NL0012/20220105/T1c.nii.gz"
    )
    table(tmp_path / "northlake_visits_2023.csv", HEADER, "12,2020-02-01,2,70.1,0,30", "12,2021-12-20,2,72.0,2,-99")
    images = template.discover(tmp_path)
    assert sorted(i.modality for i in images) == ["FLAIR", "T1", "T1c"]
    joined = join(template.COHORT, images, template.phenotypes(tmp_path, "clean"), Report())
    found = {j.image.path: j for j in joined}
    first, later = (found[f"raw/NL0012/{name}.nii.gz"] for name in ("20200105/T1", "20220105/T1c"))
    assert (first.values["diagnosis"], first.values["age_years"], first.values["mmse"], first.delay_days) == (
        "HC",
        70.1,
        30,
        27,
    )
    assert (later.values["diagnosis"], later.values["sex"], later.values.get("mmse"), later.delay_days) == (
        "AD",
        "F",
        None,
        16,
    )
    table(tmp_path / "northlake_visits_2023.csv", HEADER, "12,2020-02-01,3,70,0,30")
    with pytest.raises(G3nError, match="sex has the code '3'"):
        template.phenotypes(tmp_path, "clean")


def test_it_is_short_and_the_page_names_what_is_there() -> None:
    source = Path(template.__file__).read_text()
    assert len(source.splitlines()) < 60
    page = (ROOT / "docs/adding_a_cohort.md").read_text()
    for module, names in (("contract", r"`(Image|Row|Plan|Cohort)`"), ("tables", r"`(\w+)\(\)`")):
        found = set(re.findall(names, page))
        assert found
        assert all(hasattr(importlib.import_module(f"data_prep.cohorts.{module}"), name) for name in found), found
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        assert block.strip() in source
