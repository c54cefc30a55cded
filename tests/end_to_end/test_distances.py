"""Distances of a small trained generator, and the figures of its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep.encode import encode
from g3n import cli
from g3n.config import G3nError
from g3n.evaluate import distances
from g3n.generate import Generator, open_generator
from g3n.stream.index import load_index
from g3n.stream.lanes import eval_batches
from tests import nano, ranks

FIGURES = ("frechet", "kernel", "precision", "recall", "density", "coverage")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MAE, decoder and DiT of 20 steps; 10 validation subjects of two visits."""
    root = tmp_path_factory.mktemp("distances")
    nano.shards(root / "shards", val=10)
    configs = nano.configs(root)
    for task in ("mae", "decoder", "dit"):
        ranks.run(1, ["--config", str(configs[task])])
        if task == "decoder":
            encode(f"{root}/runs/decoder", f"{root}/shards", root / "latents", "cpu", 8)
    return root


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr("sys.argv", ["g3n", "evaluate", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code


def test_distances_of_a_generator(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--run", f"{work}/runs/dit", "--latents", f"{work}/latents", "--count", "22", "--steps", "2")
    run(monkeypatch, "distances", *words, "--output", f"{work}/a", "--device", "cpu")
    found = json.loads((work / "a/metrics.json").read_text())
    assert (found["generated"], found["real"], found["subjects"], found["n"]) == (22, 20, 10, 9)
    for space, width in (("mean_token", 48), ("latent", 31)):  # 2 x 2 x 2 tokens of 4; 32 training latents span 31
        assert found[space]["dimensions"] == width
        for name in FIGURES:
            for part in (found[space][name][whose] for whose in ("generated", "real")):
                assert part["low"] <= part["value"] <= part["high"]
                assert (part["n"], part["subjects"]) == (9, 10)
        frechet = found[space]["frechet"]
        bias = found[space]["size_bias"]
        assert list(bias) == ["2", "4", "9"]
        assert bias["9"]["frechet"] == frechet["real"]
        assert bias["2"]["frechet"]["value"] > bias["9"]["frechet"]["value"]
    assert found["latent"]["pca"]["train_latents"] == 32
    assert 0 < found["diversity"]["pairs"] <= 5
    assert 0 < found["diversity"]["real"]["value"] < 1
    run(monkeypatch, "distances", *words, "--output", f"{work}/b", "--device", "cpu", "--batch", "5")
    again = json.loads((work / "b/metrics.json").read_text())
    for space in distances.SPACES:  # a volume depends on its seed, not on its batch
        for name in ("frechet", "kernel"):
            assert again[space][name]["generated"]["value"] == pytest.approx(
                found[space][name]["generated"]["value"], rel=1e-3
            )


def test_a_generator_of_real_volumes_is_at_the_floor(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives each condition the real volume it was taken from: the same figures. Half as bright, they are not real."""
    generator = open_generator(work / "runs/dit", "cpu")
    batches = eval_batches(load_index(f"{work}/latents"), None, "latent", "val", 20, rank=0, world=1, seed=0)
    batch = next(batches)
    volumes = generator.space.decode(generator.space.standardize(batch.tensors["latent"])).numpy()
    brightness = 1.0

    def sample(_: Generator, conditions: Sequence[Mapping[str, Any]], *__: Any) -> Iterator[np.ndarray]:
        assert conditions == batch.variables
        yield from brightness * volumes

    monkeypatch.setattr(distances, "sample", sample)
    found = distances.evaluate_distances(generator, f"{work}/latents", tmp_path, count=20)
    parts = [found["diversity"], *(found[space][name] for space in distances.SPACES for name in FIGURES)]
    for part in parts:
        assert part["generated"].value == pytest.approx(part["real"].value, rel=1e-4, abs=1e-4)
        assert part["generated"].high == pytest.approx(part["real"].high, rel=1e-4, abs=1e-4)
    brightness = 0.5
    found = distances.evaluate_distances(generator, f"{work}/latents", tmp_path, count=20)
    for space in distances.SPACES:
        for name in ("frechet", "kernel"):
            assert found[space][name]["generated"].low > found[space][name]["real"].high


def test_a_generator_that_has_diverged_is_named(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = open_generator(work / "runs/dit", "cpu")
    nan = np.full(nano.SHAPE, np.nan, np.float32)
    monkeypatch.setattr(distances, "sample", lambda _, conditions, *__: (nan for _ in conditions))
    with pytest.raises(G3nError, match="20 of 20 generated volumes are not finite, the first has seed 3"):
        distances.evaluate_distances(generator, f"{work}/latents", tmp_path / "out", count=20, seed=3)
    assert not (tmp_path / "out").exists()


def test_mistakes(work: Path, tmp_path: Path) -> None:
    generator = open_generator(work / "runs/dit", "cpu")
    with pytest.raises(G3nError, match="are not latents of the tokenizer"):
        distances.evaluate_distances(generator, f"{work}/shards", tmp_path)
    with pytest.raises(G3nError, match=r"7 volumes of . subjects in split 'val' give halves of 3, expected at least 4"):
        distances.evaluate_distances(generator, f"{work}/latents", tmp_path, count=7)
    with pytest.raises(G3nError, match="no split 'test'; known: train, val"):
        distances.evaluate_distances(generator, f"{work}/latents", tmp_path, split="test")


def test_reconstruction_has_intervals_beside_its_means(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--run", f"{work}/runs/decoder", "--shards", f"{work}/shards", "--device", "cpu")
    run(monkeypatch, "reconstruction", *words, "--output", f"{work}/reconstruction")
    found = json.loads((work / "reconstruction/metrics.json").read_text())
    assert (found["volumes"], found["subjects"], found["ms_ssim_scales"]) == (20, 10, 1)
    assert found["high_frequency_above_per_mm"] == 0.25  # half of Nyquist at 1 mm
    for name in ("psnr_db", "psnr_gain_db", "ssim", "ms_ssim", "mae", "high_frequency_error", "dice"):
        for mean, interval in (
            (found[name], found["intervals"]["all"][name]),
            (found["by_modality"]["T1"][name], found["intervals"]["by_modality"]["T1"][name]),
            (found["by_cohort"]["None"][name], found["intervals"]["by_cohort"]["None"][name]),
        ):
            assert interval["low"] < interval["value"] < interval["high"]
            assert interval["value"] == mean
            assert (interval["n"], interval["subjects"]) == (20, 10)
    assert 0 < found["dice"] <= 1
