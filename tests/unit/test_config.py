"""A user's mistakes in a config: one line that names the key and what was meant."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from g3n.config import G3nError, build, read_yaml, to_plain, write_yaml
from g3n.engine.trainer import check
from g3n.train import load_config

ROOT = Path(__file__).resolve().parents[2]
MAE = ROOT / "configs/tiny/mae.yaml"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.learning_rate=1", r"unknown config key 'optim.learning_rate'"),
        ("optim.l=1", r"unknown config key 'optim.l'; did you mean 'lr'\?"),
        ("model.mask_ration=0.5", r"'model.mask_ration'; did you mean 'mask_ratio'\?"),
        ("model.mask_ratio=1.5", r"config key 'model': mask_ratio 1.5 must lie in \(0, 1\)"),
        ("trainer.precision=fp8", r"'trainer.precision' is 'fp8'; allowed: "),
        ("trainer.steps=many", r"'trainer.steps' is 'many'; expected int"),
        ("model.net.heads=0", r"config key 'model.net': volume_shape, patch, widths and heads must be at least 1"),
        ("model.net.patch=-8", "must be at least 1"),
        (f"optim.lr=1{'0' * 400}", "config key 'optim.lr' is a whole number too large for a float"),
        ("task=mea", r"config key 'task' is 'mea'; did you mean 'mae'\?"),
        ("trainer.steps", r"override 'trainer.steps' has no '='"),
    ],
)
def test_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(G3nError, match=message) as error:
        load_config(MAE, [override])
    assert "\n" not in str(error.value)


def test_batches_that_do_not_divide() -> None:
    with pytest.raises(G3nError, match="global_batch"):
        check(load_config(MAE, ["trainer.global_batch=12"]), world=1)


def test_a_missing_key_and_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("task: decoder\nname: x\ndata: {shards: s}\ntrainer: {steps: 1}\n")
    with pytest.raises(G3nError, match="missing config key"):
        load_config(tmp_path / "a.yaml")
    with pytest.raises(G3nError, match="does not exist; shipped ones are under configs/"):
        load_config(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_text("task: [mae\n")
    with pytest.raises(G3nError, match="not valid YAML"):
        load_config(tmp_path / "c.yaml")


def test_written_configs_read_back_the_same(tmp_path: Path) -> None:
    config = load_config(MAE, ["optim.lr=3e-4"])
    (tmp_path / "config.yaml").write_text(write_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config
    assert read_yaml(tmp_path / "config.yaml") == to_plain(config)


def test_numbers_like_1e4_are_numbers() -> None:
    assert load_config(MAE, ["optim.lr=1e-4"]).optim.lr == 1e-4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model.mask_ration=0.5"], "error: unknown config key 'model.mask_ration'; did you mean 'mask_ratio'?"),
        (["data.shards=/nowhere"], "error: shards '/nowhere' have no readable index.json"),
    ],
)
def test_train_py_says_it_in_one_line_and_exits_2(words: list[str], message: str) -> None:
    line = [sys.executable, "g3n/train.py", "--config", str(MAE), *words]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    errors = [text for text in done.stderr.splitlines() if text.startswith("error")]
    assert done.returncode == 2
    assert len(errors) == 1
    assert errors[0].startswith(message)
    assert "Traceback" not in done.stderr


def test_build_wants_a_mapping() -> None:
    from g3n.nifti import Grid

    with pytest.raises(G3nError, match="config key 'grid' must be a mapping of Grid"):
        build(Grid, [1], "grid")
