"""Real scans by the default recipe: each kind of input takes its route and lies on the atlas; lost spacing is flagged."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from data_prep.bids import scan_bids
from data_prep.check import check_all
from data_prep.manifest import read_manifest, write_manifest
from data_prep.pack import Packing, choose
from data_prep.preprocess import preprocess_all
from data_prep.qc import write_page
from data_prep.recipe import Recipe
from data_prep.scan import Shares

pytest.importorskip("ants", reason="needs antspyx (pip install 'g3n[prep]')")
pytest.importorskip("deepbet", reason="needs deepbet (pip install 'g3n[prep]')")
REAL = Path(os.environ.get("G3N_REAL_DATA", "") or "/nowhere")
pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(not REAL.is_dir(), reason="G3N_REAL_DATA names no folder of real scans"),
]
HEAD, STRIPPED, COARSE, THICK, MNI, SRI24, LOST = "ASL01", "DEP01", "IXI012", "MSL01", "MSX07", "TCGADU7294", "BTP01"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """One session of each; the sidecars of each subject, T1 first."""
    root = tmp_path_factory.mktemp("real")
    scan_bids(REAL, root / "all.tsv", Shares(0.2, 0, 0))
    wanted = (HEAD, STRIPPED, COARSE, THICK, MNI, SRI24, LOST)
    scans = [s for s in read_manifest(root / "all.tsv").scans if s.subject in wanted and s.session == "01"]
    write_manifest(root / "manifest.tsv", REAL, scans, {})
    preprocess_all(root / "manifest.tsv", root / "d", Recipe((240, 240, 155), 1.0, "affine", "deepbet", "n4"), 2)
    found: dict[str, list[dict[str, Any]]] = {}
    rows = [line.split("\t") for line in (root / "subjects.tsv").read_text().splitlines()[1:]]
    hashes = {label: hashed for label, _, _, hashed, _ in rows}
    for label in wanted:
        paths = sorted((root / "d" / f"sub-{hashes[label]}").rglob("*.json"))
        found[label] = sorted((json.loads(p.read_text()) for p in paths), key=lambda a: not a["center"])
    return root, found


def test_each_kind_reaches_the_atlas_by_its_route(work: tuple[Path, dict[str, list[dict[str, Any]]]]) -> None:
    _, found = work
    routes = {HEAD: ("deepbet", 1), STRIPPED: ("as it came", 1), COARSE: ("deepbet", 1), THICK: ("deepbet", 3)}
    routes |= {MNI: ("as it came", 4), SRI24: ("as it came", 4)}
    for label, (strip, count) in routes.items():
        assert len(found[label]) == count
        for about in found[label]:
            assert (about["strip"], about["flags"]) == (strip, []), label
            assert about["quality"]["dice_atlas"] >= 0.93, label
    assert [a["align"] for a in found[MNI]] == ["affine"] * 4
    # its header says MNI, but it was only moved there, not scaled: its own word is not taken
    assert 0.6 < found[MNI][0]["quality"]["dice_header"] < 0.88


def test_lost_spacing_is_flagged_and_not_packed(work: tuple[Path, dict[str, list[dict[str, Any]]]]) -> None:
    root, found = work
    assert "spacing" in found[LOST][0]["flags"]
    chosen, left_out = choose(read_manifest(root / "d/manifest.tsv").scans, Packing())
    assert len(chosen) == 14
    assert left_out["spacing"] == 1
    fatal = [p for p in check_all([root / "manifest.tsv"], 2) if p.fatal]
    assert [(p.kind, LOST in p.where) for p in fatal] == [("spacing", True)]


def test_the_page_shows_them(work: tuple[Path, dict[str, list[dict[str, Any]]]]) -> None:
    root, _ = work
    assert write_page(root / "d", root / "qc", 1) == 15
    assert len(list((root / "qc/thumbs").glob("*.png"))) == 15
