"""The page of an evaluation: every figure of the tree is in it, with its interval, and nothing outside of it is needed."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from g3n.evaluate.montage import write_montage
from g3n.evaluate.page import Line, Part, lines, write_page


def test_lines_of_a_tree() -> None:
    tree = {
        "psnr_db": {"value": 27.12345, "low": 26.5, "high": 27.9, "n": 40, "subjects": 10},
        "alone": {"value": 1.0, "low": None, "high": None, "n": 1, "subjects": 1},
        "seed": 3,
        "by_modality": {"T1": {"n": 5, "psnr_db": 20.0}},
        "ages": [25.0, 85.0],
        "undefined": None,
        "empty": {},
    }
    assert list(lines(tree)) == [
        Line("psnr db", 0, "27.12", "26.5 to 27.9", "40 of 10 subjects"),
        Line("alone", 0, "1", "", "1"),
        Line("seed", 0, "3"),
        Line("by modality", 0, None),
        Line("T1", 1, None),
        Line("n", 2, "5"),
        Line("psnr db", 2, "20"),
        Line("ages", 0, "25, 85"),
        Line("undefined", 0, "not defined"),
    ]


def test_a_page_stands_alone_and_shows_what_it_is_given(tmp_path: Path) -> None:
    write_montage(tmp_path / "a.png", [("<b>", np.random.default_rng(0).normal(size=(8, 8, 8)))])
    part = Part(
        "Reconstruction <x>", 'g3n evaluate reconstruction --run "a & b"', {"<script>": 1}, [tmp_path / "a.png"], "val"
    )
    write_page(tmp_path / "report" / "index.html", "demo", {"run": "runs/<demo>"}, [part, part])
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "&lt;script&gt;" in page
    assert "<script" not in page
    assert "--run &quot;a &amp; b&quot;" in page
    assert "runs/&lt;demo&gt;" in page
    assert re.findall(r'href="(?!#)|src="(?!data:)|url\(|@import', page) == []
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == ["index.html"]
