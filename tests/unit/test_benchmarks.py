"""Counts of bytes, rows, verdicts and the page. Rows here are made up and live in these tests alone."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import attention, embedding, kernels, measure, report, stream, tune
from g3n.features import read_features

ROOT = Path(__file__).parents[2]


# --- bytes


def test_bytes_of_adaln_by_hand():
    case = kernels.Case("adaln_modulate", 16, 1200, 1152, torch.bfloat16, "sample")
    x, m = 16 * 1200 * 1152 * 2, 16 * 1152 * 2
    assert kernels.adaln_bytes(case, "forward") == x + 2 * m + x  # x, shift, scale; y
    assert kernels.adaln_bytes(case, "backward") == 2 * x + m + x + 2 * m  # dy, x, scale; dx, d shift, d scale
    token = kernels.Case("adaln_modulate", 2, 10, 8, torch.float32, "token")
    assert kernels.adaln_bytes(token, "backward") == 5 * 2 * 10 * 8 * 4  # dy, x, scale; dx, d scale; d shift is dy


def test_bytes_of_the_gated_ops_and_the_loss_by_hand():
    gated = kernels.Case("gate_residual_adaln", 2, 10, 8, torch.float32, "sample")
    x, m = 2 * 10 * 8 * 4, 2 * 8 * 4
    assert kernels.gated_adaln_bytes(gated, "forward") == 4 * x + 3 * m
    assert kernels.gated_adaln_bytes(gated, "backward") == 6 * x + 5 * m
    assert kernels.gate_bytes(gated, "backward") == 3 * x + 2 * m
    loss = kernels.Case("masked_patch_loss", 2, 10, 8, torch.float32, shape=(4, 4, 4))
    voxels = 2 * 10 * 8
    assert kernels.loss_bytes(loss, "no_grad") == voxels * (4 + 2) + 2 * (10 * 8 + 8)
    assert kernels.loss_bytes(loss, "forward") == voxels * (4 + 2 + 4) + 2 * (10 * 8 + 8)


def test_the_published_shape_comes_first_and_no_case_twice(monkeypatch):
    monkeypatch.setattr(kernels, "device", lambda: "cuda")
    cases = kernels.cases(small=False)
    assert cases[0].published
    assert len(cases) == len(set(cases))
    shapes = {(c.B, c.T, c.D) for c in cases if c.modulation == "sample" and c.dtype == torch.bfloat16}
    assert shapes == {(B, T, D) for B in kernels.BATCHES for T in kernels.TOKENS for D in kernels.WIDTHS}


# --- rows


def test_rows_are_appended_and_columns_united(tmp_path):
    measure.write_rows("x", [{"a": 1}], tmp_path)
    path = measure.write_rows("x", [{"a": 2, "b": 3}], tmp_path)
    rows = measure.read_rows(path)
    assert [(r["a"], r["b"]) for r in rows] == [("1", ""), ("2", "3")]
    assert {"device", "torch", "git", "date"} <= set(rows[0])
    assert [p.name for p in tmp_path.iterdir()] == ["x.csv"]


def test_a_kill_while_rows_are_written_loses_none_of_the_old(tmp_path, monkeypatch):
    path = measure.write_rows("x", [{"a": 1}], tmp_path)
    before = path.read_bytes()

    def killed(self, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        measure.write_rows("x", [{"a": 2}], tmp_path)
    assert path.read_bytes() == before


def test_rows_of_before_stay_readable(tmp_path):
    old = ROOT / "benchmarks/results/cpu-x86_64/data.csv"
    (tmp_path / "data.csv").write_bytes(old.read_bytes())
    before = measure.read_rows(old)
    row = {"part": "scan", "case": "c", "what": "w", "value": 1.0, "unit": "s"}
    after = measure.read_rows(measure.write_rows("data", [row], tmp_path))
    assert len(after) == len(before) + 1
    assert all({c: a[c] for c in b} == b for a, b in zip(after, before, strict=False))
    assert after[-1]["unit"] == "s"


# --- measuring


def test_relative_error_is_that_of_the_worst_output():
    one = torch.ones(4)
    assert measure.relative_error([one, 1.1 * one], [one, one]) == pytest.approx(0.1, rel=1e-5)
    assert math.isnan(measure.relative_error([one * float("nan"), 1.1 * one], [one, one]))


@pytest.mark.parametrize("name", list(kernels.OPS))
def test_eager_and_g3n_agree_with_float64_in_every_pass(name):
    case = next(c for c in kernels.cases(small=True) if c.op == name)
    tensors = kernels.OPS[name].draw(case)
    exact = kernels.Exact(case, tensors)
    for pass_ in kernels.OPS[name].passes:
        for implementation in (kernels.OPS[name].ours, kernels.OPS[name].eager):
            assert exact.error("eager", implementation, pass_) < 1e-6


def test_kernels_run_end_to_end(tmp_path, capsys):
    kernels.main(["--small", "--only", "g3n", "eager", "--output", str(tmp_path)])
    rows = measure.read_rows(tmp_path / "kernels.csv")
    assert {r["op"] for r in rows} == set(kernels.OPS)
    assert {r["impl"] for r in rows} == {"g3n", "eager"}
    assert all(float(r["error"]) < 1e-6 and float(r["ms"]) > 0 for r in rows)
    assert "all cases measured" in capsys.readouterr().out


def test_an_implementation_that_fails_is_a_line_and_no_row(tmp_path, capsys, monkeypatch):
    def broken(*tensors):
        raise RuntimeError("out of everything")

    op = kernels.OPS["gate_residual"]
    monkeypatch.setitem(
        kernels.OPS, "gate_residual", kernels.Op(op.draw, broken, op.eager, op.exact, op.count, op.passes, 3)
    )
    case = kernels.Case("gate_residual", 1, 4, 8, torch.float32, "sample")
    rows = list(kernels.measure_case(case, ("g3n", "eager")))
    assert {r["impl"] for r in rows} == {"eager"}
    assert (
        "gate_residual 1x4x8 float32 sample forward g3n: failed, RuntimeError: out of everything"
        in capsys.readouterr().out
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler on a CPU")
def test_one_compilation_serves_every_batch():
    torch._dynamo.utils.counters.clear()
    for B in (4, 2, 3):
        case = kernels.Case("gate_residual", B, 6, 8, torch.float32, "sample")
        function = kernels.implementation("compile", case, torch.empty(0))
        tensors = kernels.OPS[case.op].draw(case)
        assert kernels.Exact(case, tensors).error("compile", function, "forward") < 1e-6
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_no_time_leaves_all_cases_unmeasured(tmp_path, capsys):
    kernels.main(["--small", "--minutes", "0", "--output", str(tmp_path)])
    assert f"{len(kernels.cases(True))} cases left unmeasured" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_attention_runs_end_to_end(tmp_path):
    attention.main(["--small", "--output", str(tmp_path)])
    rows = measure.read_rows(tmp_path / "attention.csv")
    assert {r["pass"] for r in rows} == {"forward", "backward"}
    assert all(float(r["error"]) < 1e-5 for r in rows)
    auto = [r for r in rows if r["backend"] == "auto"]
    assert auto
    assert all(r["chosen"] in attention.BACKENDS and r["behind_best_percent"] for r in auto)


def test_tune_needs_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    assert capsys.readouterr().out == "tuning needs a GPU: nothing was run\n"


SWEEP = """
import torch
from benchmarks import kernels, measure, tune
from kernels import adaln
tune.LANES, tune.REGISTERS, tune.STAGES, tune.SLICES, tune.KEPT = (8,), (96,), (1,), (2,), 1
tune.BLOCKS, tune.WARPS = (512,), (2,)
tune.quick_seconds = lambda call, flush=True: measure.seconds(call, repeats=2, warmup=0)
before = adaln.FORWARD, adaln.BACKWARD, adaln.SLICE, adaln.STAGES
case = kernels.Case("gate_residual_adaln", 1, 5, 24, torch.float32, "sample")
patches = kernels.patch_cases(1, (16, 16, 16), 8, torch.float32)[:2]
rows = [r for sweep in tune.sweeps([case], patches, measure.Deadline(1)) for r in sweep]
assert before == (adaln.FORWARD, adaln.BACKWARD, adaln.SLICE, adaln.STAGES)
print("|".join(r["candidate"] for r in rows))
"""


def test_every_sweep_of_tune_runs_in_the_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", SWEEP], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    tile = "lanes 8 registers 96"
    assert done.stdout.splitlines()[-1] == f"{tile}|{tile}|{tile} stages 1 slice 2|block 512|warps 2"


# --- the page


def kernel_row(**row: object) -> dict[str, object]:
    case = {"dtype": "bfloat16", "B": 16, "T": 1200, "D": 1152, "shape": "", "modulation": "sample", "option": ""}
    rest = {
        "flush": True,
        "ms_20": 1,
        "ms_80": 1,
        "bytes": 88_473_600,
        "gb_per_s": 1000,
        "copy_gb_per_s": 4000,
        "error": 1e-3,
        "mix_order": "",
        "peak_mib": 1,
        "memory_ratio": "",
        "host_us": "",
        "graph_us": "",
    }
    return {**case, **rest, **row}


def attention_row(**row: object) -> dict[str, object]:
    rest = {
        "chosen": "",
        "dtype": "bfloat16",
        "B": 16,
        "T": 1200,
        "H": 16,
        "K": 72,
        "flush": True,
        "ms": 1,
        "ms_20": 1,
        "ms_80": 1,
        "tflop_per_s": 300,
        "error": 1e-3,
        "behind_best_percent": "",
    }
    return {**rest, **row}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results/nvidia-h200"
    rows = []
    for pass_, share in (("forward", 0.91), ("backward", 0.70)):
        case = {"op": "adaln_modulate", "pass": pass_, "impl": "g3n"}
        rows.append(kernel_row(**case, ms=9.0, share_of_copy=0.10))  # measured again below
        rows.append(kernel_row(**case, ms=0.9, share_of_copy=0.95, flush=False))
        rows.append(kernel_row(**case, ms=1.0, share_of_copy=share))
        rows.append(kernel_row(**{**case, "impl": "compile"}, ms=2.0, share_of_copy=0.5))
        rows.append(kernel_row(**{**case, "impl": "compile", "mix_order": "1"}, ms=1.7, share_of_copy=0.5))
        rows.append(kernel_row(**{**case, "impl": "eager"}, ms=4.0, share_of_copy=0.2, error=9e-4))
    for pass_, ratio in (("forward", 1.4), ("no_grad", 1.01)):
        patches = {
            "T": 840,
            "D": 4096,
            "shape": "160x192x160",
            "modulation": "",
            "impl": "g3n",
            "ms": 1.0,
            "pass": pass_,
        }
        rows.append(kernel_row(op="masked_patch_loss", share_of_copy=0.8, memory_ratio=ratio, **patches))
    measure.write_rows("kernels", rows, folder)
    some = [
        attention_row(backend="auto", K=k, chosen="sdpa-cudnn", behind_best_percent=1.0, **{"pass": p})
        for k in (64, 72, 96)
        for p in ("forward", "backward")
    ]
    some += [
        attention_row(backend="sdpa-cudnn", K=k, **{"pass": p}) for k in (64, 72, 96) for p in ("forward", "backward")
    ]
    measure.write_rows("attention", some, folder)
    return tmp_path / "results"


def test_the_page_says_what_was_held_missed_and_not_measured(results, tmp_path):
    page = report.report(results, tmp_path / "docs").read_text()
    section = page.split("## Goals")[1].split("## Measured")[0]
    goals = dict(line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| "))
    assert goals["LN + modulate, forward: 85 % of copy bandwidth"] == "**held**: 91.0 %"
    assert goals["LN + modulate, backward: 75 % of copy bandwidth"] == "**missed**: 70.0 %"
    assert goals["LN + modulate, backward: 1.8x torch.compile"] == "**missed**: 1.70x"
    assert goals["gate + residual + LN + modulate, forward: 85 % of copy bandwidth"] == "not measured"
    assert goals["gather of visible patches: 3x einops + index"] == "not measured"
    assert goals["never slower than torch.compile where x has 4 MB or more"].startswith(
        "**held**: slower in 0 of 2 cases"
    )
    assert goals["masked loss, forward with slope: at most 1.4x the time of its bytes"] == "**held**: 1.25x"
    assert (
        goals["masked loss, forward with slope: at most 1.1x the memory of prediction + volume"] == "**missed**: 1.40x"
    )
    assert goals["auto attention within 3 % of the best backend in 95 % of cases"].startswith("**held**: 6 of 6")
    assert goals["error against float64 at most eager torch's, within 2 %"].startswith(
        "**missed**: above in 2 of 2 cases"
    )


def test_the_page_names_gpus_without_rows(results, tmp_path):
    page = report.report(results, tmp_path / "docs").read_text()
    for name in ("A100", "H100", "B200", "L40S", "RTX 4090"):
        assert f"- {name}: no rows: run `make bench-gpu` there and send the CSV" in page
    assert "- H200: no rows" not in page


def test_the_same_rows_give_the_same_bytes_and_old_pictures_go(results, tmp_path):
    docs = tmp_path / "docs"
    (docs / "benchmarks").mkdir(parents=True)
    (docs / "benchmarks/gone.svg").write_text("old")
    files = []
    for _ in range(2):
        report.report(results, docs)
        files.append({p.relative_to(docs): p.read_bytes() for p in docs.rglob("*") if p.is_file()})
    assert files[0] == files[1]
    assert sorted(p.name for p in files[0]) == [
        "benchmarks.md",
        "nvidia-h200-attention.svg",
        "nvidia-h200-roofline.svg",
    ]


def test_rows_of_a_cpu_are_listed_as_proof_of_the_path_alone(results, tmp_path):
    row = kernel_row(op="adaln_modulate", impl="g3n", ms=1.0, share_of_copy=0.99, flush="", **{"pass": "forward"})
    measure.write_rows("kernels", [row], results / "cpu-x86_64")
    page = report.report(results, tmp_path / "docs").read_text()
    assert "these rows prove the path and say nothing about" in page
    assert "| goal | H200 |" in page


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("nvidia-h200", "H200"),
        ("nvidia-gh200-480gb", "nvidia-gh200-480gb"),
        ("nvidia-a100-sxm4-80gb", "A100"),
        ("nvidia-geforce-rtx-4090", "RTX 4090"),
    ],
)
def test_names_of_gpus(folder, name):
    assert report.Machine(folder, {}).name == name


# --- features


def test_features_from_shards_are_those_by_monai_from_files(tmp_path: Path) -> None:
    stream.made_shards(tmp_path / "shards", 8, (32, 32, 32))
    paths = embedding.write_files(tmp_path / "shards", tmp_path / "files")
    encoder = embedding.encoder_of("tiny", (32, 32, 32))
    assert embedding.from_shards(tmp_path / "shards", encoder, 3, tmp_path / "ours.parquet") > 0
    embedding.from_files(paths, encoder, 2, 0, tmp_path / "theirs.parquet")
    ours, theirs = (read_features(tmp_path / f"{who}.parquet").array("mean") for who in ("ours", "theirs"))
    assert ours.shape == (8, 192)
    np.testing.assert_allclose(theirs, ours[2:], atol=1e-4)  # the first batch of MONAI's is before the clock starts
    assert np.abs(ours[0] - ours[1]).max() > 1e-3
