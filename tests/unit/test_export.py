"""Exported models: the same volumes bit for bit, and one line for every folder that is not what it says."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import g3n
from g3n import generate
from g3n.cli import app
from g3n.config import G3nError, read_yaml
from g3n.export import export, model_card, read_audit, training_data
from g3n.exported import MAX_CONFIG_BYTES, read_config
from g3n.models.pretrained import fingerprint
from g3n.nifti import atlas_grid
from tests import nano, untrained
from tests.launch import ROOT, environment

CONDITION = {"modality": "T1", "age_years": 61.0, "sex": "F"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained.chain(tmp_path_factory.mktemp("export"), train=4, val=2)


@pytest.fixture(scope="module")
def exported(root: Path) -> Path:
    return export(root / "runs/dit", root / "model", forecaster=root / "runs/forecast", without_audit=True)


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def scan() -> np.ndarray:
    return nano.volume(50, seed=99).astype(np.float32)


def test_a_loaded_model_gives_the_runs_volumes_bit_for_bit(root: Path, exported: Path) -> None:
    model = g3n.load(exported, "cpu")
    run = generate.open_generator(root / "runs/dit", "cpu")
    expected = next(generate.sample(run, [CONDITION], [7], steps=3, guidance=2.0))
    assert np.abs(expected).max() > 0
    np.testing.assert_array_equal(model.sample(seed=7, steps=3, **CONDITION), expected)
    assert not np.array_equal(model.sample(seed=8, steps=3, **CONDITION), expected)

    expected_NC = generate.encode_scan(run.space, scan())[0].numpy()
    latents = model.encode(scan(), np.array(nano.AFFINE))
    np.testing.assert_array_equal(latents, expected_NC)
    np.testing.assert_array_equal(model.decode(latents), run.space.decode(torch.from_numpy(expected_NC)[None])[0])

    forecaster = generate.open_forecaster(root / "runs/forecast", "cpu")
    follow_up = next(generate.forecast(forecaster, scan(), CONDITION, [{"age_years": 64}], [3], [5], steps=3))
    made = model.forecast(scan(), np.array(nano.AFFINE), target_age_years=64, seed=5, steps=3, **CONDITION)
    np.testing.assert_array_equal(made, follow_up)


def test_a_scan_of_any_orientation_is_encoded_alike(exported: Path) -> None:
    model, affine = g3n.load(exported, "cpu"), np.array(nano.AFFINE)
    turned = affine.copy()
    turned[:, 0] *= -1
    turned[:3, 3] += affine[:3, 0] * 15
    np.testing.assert_allclose(model.encode(scan()[::-1], turned), model.encode(scan(), affine), atol=1e-4)


def test_the_folder_says_what_it_is(root: Path, exported: Path) -> None:
    names = {p.relative_to(exported).as_posix() for p in exported.rglob("*") if p.is_file()}
    parts = {f"{part}/model.safetensors" for part in ("encoder", "tokenizer", "generator", "forecaster")}
    assert names == parts | {"config.json", "README.md"}
    config = read_config(exported)
    assert config.generator.step == 20
    assert config.training == {"tokenizer": {"scans": 8, "subjects": 4}, "generator": {"scans": 8, "subjects": 4}}
    weights = load_file(exported / "generator/model.safetensors")
    assert fingerprint(weights) == config.fingerprints.generator
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlicense: other\n")
    for words in ("No privacy audit was made", "8 scans of 4 subjects", "licenses: not known", "Not a medical device"):
        assert words in card
    assert str(root) not in card + (exported / "config.json").read_text()  # no path of this machine


def test_the_card_counts_licenses(root: Path, exported: Path) -> None:
    index = root / "shards/index.json"
    before = index.read_text()
    index.write_text(json.dumps({**json.loads(before), "licenses": {"open": 9, "dua": 3}}))
    try:
        configs = (read_yaml(root / "runs" / run / "ckpt/step_00000020/config.yaml") for run in ("dit", "decoder"))
        training = training_data(*configs)
    finally:
        index.write_text(before)
    card = model_card(dataclasses.replace(read_config(exported), training=training), None, [])
    assert "scans of all splits by license: 3 under a data use agreement, 9 open" in card
    gone = model_card(dataclasses.replace(read_config(exported), training={}), None, [])
    assert "counts are not known" in gone
    (root / "front.yaml").write_text(card.split("---")[1])
    assert "brain-mri" in read_yaml(root / "front.yaml")["tags"]


def test_an_export_needs_the_audit_of_its_weights(root: Path, tmp_path: Path) -> None:
    run = root / "runs/dit"
    with pytest.raises(G3nError, match="--without-audit"):
        export(run, tmp_path / "m")
    prints = read_config(export(run, tmp_path / "plain", without_audit=True)).fingerprints
    verdict = "Of 9 volumes none is a copy."
    audit = {"format": "g3n-audit-1", "generator": prints.generator, "tokenizer": prints.tokenizer, "verdict": verdict}
    (tmp_path / "audit.json").write_text(json.dumps({**audit, "generator": "0" * 16}))
    with pytest.raises(G3nError, match="run g3n audit on this run"):
        export(run, tmp_path / "m", audit=tmp_path / "audit.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["audit.json", "plain"]
    (tmp_path / "audit.json").write_text(json.dumps(audit))
    (tmp_path / "reconstruction").mkdir()
    figures = {"run": "/home/somebody/runs", "psnr_db": 27.25, "volumes": 12, "by_modality": {}, "seed": 7}
    figures["effects"] = {"age": {"value": 0.97712, "low": 0.9, "high": None}, "r": {"value": 1.5, "low": 1, "high": 2}}
    (tmp_path / "reconstruction/metrics.json").write_text(json.dumps(figures))
    metrics = [tmp_path / "reconstruction/metrics.json"]
    card = (export(run, tmp_path / "m", audit=tmp_path / "audit.json", metrics=metrics) / "README.md").read_text()
    assert verdict in card
    assert "| psnr db | 27.25 |" in card
    assert "| effects/age | 0.9771 |" in card
    assert "| effects/r | 1.5 [1, 2] |" in card
    assert "seed |" not in card
    assert "somebody" not in card
    assert json.loads((tmp_path / "m/audit.json").read_text()) == audit
    for text in ("[]", "{", '{"format": "g3n-audit-1"}', "[" * 100_000):
        (tmp_path / "audit.json").write_text(text)
        with pytest.raises(G3nError):
            read_audit(tmp_path / "audit.json", prints)


def test_the_commands(root: Path, tmp_path: Path) -> None:
    audit = ["audit", "--run", f"{root}/runs/dit", "--latents", f"{root}/latents", "--output", f"{tmp_path}/a"]
    done = CliRunner().invoke(app, [*audit, "--count", "4", "--steps", "1", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    words = ["export", "--run", f"{root}/runs/dit", "--output", f"{tmp_path}/m", "--audit", f"{tmp_path}/a/audit.json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "Of 4 volumes" in (tmp_path / "m/README.md").read_text()


def test_nothing_is_overwritten_and_nothing_half_written(root: Path, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/mine.txt").write_text("x")
    with pytest.raises(G3nError, match="holds something already"):
        export(root / "runs/dit", tmp_path / "m", without_audit=True)
    (tmp_path / "m/mine.txt").unlink()
    (tmp_path / ".m.part").mkdir()  # what a stopped export left
    (tmp_path / ".m.part/old").write_text("x")
    export(root / "runs/dit", tmp_path / "m", without_audit=True)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    assert not (tmp_path / "m/old").exists()


def test_weights_that_are_not_finite_are_not_exported(root: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(root / "runs/dit", tmp_path / "dit"))
    file = run / "ckpt/step_00000020/ema.safetensors"
    weights = load_file(file)
    weights["predict.weight"][0, 0] = torch.nan
    save_file(weights, file)
    with pytest.raises(G3nError, match=r"predict\.weight"):
        export(run, tmp_path / "m", without_audit=True)
    assert not (tmp_path / "m").exists()


def changed(folder: Path, **values: Any) -> None:
    tree = json.loads((folder / "config.json").read_text())
    for path, value in values.items():
        node = tree
        *parents, last = path.split("__")
        for name in parents:
            node = node[name]
        node[last] = value
    (folder / "config.json").write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"format": "g3n-model-9"}, "this version reads"),
        ({"encoder__width": 96}, "the config asks for"),
        ({"encoder__depth": 10**9}, "depth is 1000000000"),
        ({"encoder__heads": 0}, "heads is 0"),
        ({"encoder__patch": 4}, "tokens and channels"),
        ({"tokenizer__decoder_channels": [16, 8]}, "stages"),
        ({"generator__net__channels": 5}, "tokens and channels"),
        ({"generator__net__variables__sex": {"levels": ["F"]}}, "the config asks for"),
        ({"generator__net__variables__age_years": {"low": 0, "high": 1e999}}, "not finite"),
        ({"grid__shape": [16, 16, 32]}, "the grid is"),
        ({"fingerprints__generator": "0" * 16}, "fingerprint"),
        ({"fingerprints__tokenizer": "0" * 16}, "fingerprint"),
        ({"fingerprints__forecaster": None}, "come together"),
        ({"odd": 1}, "unknown config key"),
        ({"encoder": [[]] * 999}, "config"),
    ],
)
def test_a_changed_config_is_refused(copy: Path, values: dict[str, Any], words: str) -> None:
    changed(copy, **values)
    with pytest.raises(G3nError, match=words) as refused:
        g3n.load(copy, "cpu")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000


def test_changed_weights_are_refused(copy: Path) -> None:
    file = copy / "generator/model.safetensors"
    good = load_file(file)

    def refused(words: str) -> None:
        with pytest.raises(G3nError, match=words) as error:
            g3n.load(copy, "cpu")
        assert "\n" not in str(error.value)

    save_file({**good, "predict.bias": good["predict.bias"] + 1e-6}, file)
    refused("fingerprint")
    save_file({**good, "predict.bias": good["predict.bias"] * torch.nan}, file)
    refused("not finite")
    save_file({**good, "predict.bias": good["predict.bias"][:-1].contiguous()}, file)
    refused("predict.bias")
    save_file({**good, "predict.bias": good["predict.bias"].half()}, file)
    refused("F16")
    save_file({name: tensor for name, tensor in good.items() if name != "predict.bias"}, file)
    refused("missing")
    save_file({**good, "more": torch.zeros(1)}, file)
    refused("no such tensor")
    whole = (copy / "encoder/model.safetensors").read_bytes()
    file.write_bytes((1 << 40).to_bytes(8, "little") + whole[8:])
    refused("header of 1099511627776 bytes")
    file.write_bytes(whole[: len(whole) // 2])
    refused("cannot be read")
    file.write_bytes(b"")
    refused("header|cannot be read")
    file.unlink()
    refused("cannot be read")
    (copy / "config.json").write_bytes(b" " * (MAX_CONFIG_BYTES + 1))
    refused("larger than")
    (copy / "config.json").write_text("[" * 100_000)
    refused("no g3n-model-1 config")
    (copy / "config.json").unlink()
    refused("g3n export wrote")


def test_tokenizer_weights_are_checked_too(copy: Path) -> None:
    file = copy / "tokenizer/model.safetensors"
    save_file({name: tensor + 1e-6 for name, tensor in load_file(file).items()}, file)
    with pytest.raises(G3nError, match="encoder and tokenizer"):
        g3n.load(copy, "cpu")


def test_wrong_use_is_one_line(root: Path, tmp_path: Path, exported: Path) -> None:
    model, affine = g3n.load(exported, "cpu"), np.array(nano.AFFINE)
    for call, words in (
        (lambda: model.sample(agee_years=3), "did you mean"),
        (lambda: model.sample(age_years=300), "allowed range"),
        (lambda: model.decode(np.zeros((3, 3))), "expected"),
        (lambda: model.encode(np.zeros((16, 16)), affine), "expected"),
        (lambda: model.encode(np.zeros((16, 16, 16)), affine), "empty"),
        (lambda: model.encode(np.full((16, 16, 16), np.nan), affine), "not finite"),
        (lambda: model.forecast(scan(), affine, age_years=60, target_age_years=50), "elapsed_years"),
    ):
        with pytest.raises(G3nError, match=words):
            call()
    alone = g3n.load(export(root / "runs/dit", tmp_path / "m", without_audit=True), "cpu")
    with pytest.raises(G3nError, match="no forecaster"):
        alone.forecast(scan(), affine, age_years=60, target_age_years=63)


def test_a_grid_of_the_atlas_survives_json(tmp_path: Path) -> None:
    grid = atlas_grid((40, 48, 40), 4.0)
    assert json.loads(json.dumps(grid.affine)) == [list(row) for row in grid.affine]


def test_importing_g3n_is_light() -> None:
    code = (
        "import sys, g3n; assert callable(g3n.load); assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_notebook_runs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code cells in order, as jupyter would run them."""
    monkeypatch.setenv("G3N_RUN", str(root / "runs/dit"))
    notebook = json.loads((ROOT / "examples/load.ipynb").read_text())
    assert notebook["nbformat"] == 4
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    for number, source in enumerate(cells):
        exec(compile(source, f"load.ipynb cell {number}", "exec"), names)
    assert names["volume"].shape == nano.SHAPE
    assert names["latents"].shape == (8, 4)
    assert (names["folder"].parent / "sample.png").is_file()
    shutil.rmtree(names["folder"].parent)
