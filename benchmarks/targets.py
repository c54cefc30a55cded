"""The figures of a report beside what they should be: ``python -m benchmarks.targets runs/demo/report --output docs/results/demo.md``.

Writes a page of one table: figure, target, what was found with its interval, on how many, and whether the target holds. Targets are
those of the phantom cohort in the setting named by ``--setting``: cpu is the demo's grid, gpu 2 mm or the published size. Sections that
people wrote below stay.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from g3n.config import G3nError

SECTION = "\n## "  # what people wrote below the table stays
Figure = Mapping[str, Any]  # value, low, high, n, subjects


@dataclass(frozen=True)
class Target:
    """``holds`` of the figure's value; ``text`` says it."""

    text: str
    holds: Callable[[float], bool]


def at_least(x: float) -> Target:
    return Target(f">= {x:g}", lambda value: value >= x)


POSITIVE = Target("> 0", lambda value: value > 0)
# (figure, path in report.json, target by setting)
FIGURES: tuple[tuple[str, str, dict[str, Target]], ...] = (
    ("reconstruction: PSNR over the mean volume, dB", "reconstruction/intervals/all/psnr_gain_db", {"cpu": at_least(7)}),
    ("reconstruction: PSNR, dB", "reconstruction/intervals/all/psnr_db", {"gpu": at_least(25)}),
    ("reconstruction: SSIM", "reconstruction/intervals/all/ssim", {"cpu": at_least(0.87), "gpu": at_least(0.92)}),
    ("reconstruction: MS-SSIM", "reconstruction/intervals/all/ms_ssim", {}),
    ("reconstruction: MAE, z-scores", "reconstruction/intervals/all/mae", {}),
    (
        "reconstruction: error above half of Nyquist, share of the energy there",
        "reconstruction/intervals/all/high_frequency_error",
        {},
    ),
    ("reconstruction: Dice of the brain mask", "reconstruction/intervals/all/dice", {}),
    ("ventricles against requested age: r", "generation/effects/age/r", {"cpu": at_least(0.9), "gpu": at_least(0.95)}),
    ("ventricles at the oldest over the youngest age", "generation/effects/age/ratio", {"cpu": at_least(1.5)}),
    ("ventricles against requested age: slope, mL a year", "generation/effects/age/slope_ml_a_year", {}),
    ("the same of training people and their age", "generation/guidance_choice/train_slope_ml_a_year", {}),
    (
        "same-noise age sweeps that are monotone",
        "generation/effects/age/monotone_share",
        {"cpu": at_least(0.8), "gpu": at_least(0.95)},
    ),
    ("men minus women: brain, mL", "generation/effects/sex/m_minus_f_brain_ml", {"cpu": POSITIVE, "gpu": POSITIVE}),
    (
        "AD minus healthy: ventricles, mL",
        "generation/effects/diagnosis/ad_minus_hc_ventricle_ml",
        {"cpu": POSITIVE, "gpu": POSITIVE},
    ),
    (
        "modality recognized, T1 and T1c as one",
        "generation/effects/modality/generated/share_right_t1_alike",
        {"cpu": at_least(0.95)},
    ),
    ("the same of real scans", "generation/effects/modality/real/share_right_t1_alike", {}),
    ("modality recognized, all four", "generation/effects/modality/generated/share_right", {"gpu": at_least(0.98)}),
    ("the same of real scans", "generation/effects/modality/real/share_right", {}),
    ("tumor asked for and found", "generation/effects/lesion/share_right_asked", {"gpu": at_least(0.95)}),
    ("no tumor asked for, none found", "generation/effects/lesion/share_right_not_asked", {"gpu": at_least(0.95)}),
    *(
        (f"{name} by a probe of latents: {what}, {kind}", f"generation/probes/{key}/{kind}/{figure}", {})
        for name, key, what, figure in (
            ("sex", "sex", "share right", "share_right"),
            ("diagnosis", "diagnosis", "share right", "share_right"),
            ("age", "age_years", "r", "r"),
        )
        for kind in ("generated", "real")
    ),
    *(
        (
            f"{distance}, {space.replace('_', ' ')}: {'generated to real' if kind == 'generated' else 'real to real'}",
            f"distances/{space}/{distance}/{kind}",
            {},
        )
        for space in ("mean_token", "latent")
        for distance in ("frechet", "kernel", "precision", "recall")
        for kind in ("generated", "real")
    ),
    ("MS-SSIM of pairs of strangers: generated", "distances/diversity/generated", {}),
    ("MS-SSIM of pairs of strangers: real", "distances/diversity/real", {}),
    *(
        (
            f"forecasts, {method.replace('_', ' ')}: {words}",
            f"forecasting/methods/{method}/{figure}",
            {},
        )
        for figure, words in (("ventricle_error_ml", "error of the ventricles' change, mL"), ("psnr_db", "PSNR, dB"), ("mae", "MAE"))
        for method in ("ours", "one_draw", "no_change", "mean_change", "regression")
    ),
    ("forecasts: share of baselines whose ventricles grow with every step in time", "forecasting/growth/monotone_share", {}),
    ("forecasts: change for 0 years, absolute, mL", "forecasting/growth/absolute_change_at_0_ml", {}),
)  # fmt: skip


def at(tree: Any, path: str) -> Figure | None:
    """The figure at a path of a report; None where it is not there."""
    for name in path.split("/"):
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree if isinstance(tree, Mapping) and tree.get("value") is not None else None


def derived(report: Mapping[str, Any]) -> Iterator[tuple[str, Figure, dict[str, Target]]]:
    """Figures that stand in no single place of the report."""
    ours, still = (at(report, f"forecasting/methods/{m}/ventricle_error_ml") for m in ("ours", "no_change"))
    if ours and still and still["value"] > 0:
        share = {"value": 1 - ours["value"] / still["value"], "subjects": ours["subjects"]}
        targets = {"cpu": at_least(0.2), "gpu": at_least(0.4)}
        yield "forecasts: error of the ventricles' change, share less than no change", share, targets
    none = Target("0", lambda value: value == 0)
    for space, part in report.get("audit", {}).get("nearest", {}).items():
        figure = {"value": part["share"], "low": part["share_low"], "high": part["share_high"], "subjects": part["of"]}
        yield (
            f"audit, {space}: share of samples under the 5th percentile of real to real",
            figure,
            {"cpu": none, "gpu": none},
        )
        if new := part.get("held_out"):
            of_new = {"value": new["share"], "low": new["share_low"], "high": new["share_high"], "subjects": new["of"]}
            yield f"audit, {space}: the same of people held out", of_new, {}
    for attack in ("distance", "loss"):
        if auc := at(report, f"audit/membership/auc_by_{attack}"):
            yield f"audit: AUC of membership by {attack}", auc, {}


def row(name: str, figure: Figure, target: Target | None) -> str:
    value = float(figure["value"])
    found = f"{value:.3g}"
    if figure.get("low") is not None and figure.get("high") is not None:
        found += f" [{figure['low']:.3g}, {figure['high']:.3g}]"
    holds = "" if target is None else ("yes" if target.holds(value) else "**no**")
    return f"| {name} | {'' if target is None else target.text} | {found} | {figure.get('subjects', '')} | {holds} |"


def page(report: Mapping[str, Any], setting: str, title: str, how: Sequence[str], picture: str | None) -> str:
    """Markdown."""
    about = report["about"]
    lines = [f"# {title}", "", "```bash", *how, about["command"], "```", ""]
    lines.append(
        f"Setting *{setting.upper()}* of the targets; seed {about['seed']}, {about['count']} volumes in distances and audit, generator at step "
        f"{about['step']}, code at {about['git'][:7]}. Intervals are 95 %: bootstraps over people or noises (n), of the audit's shares Wilson's, of distances "
        "the middle of draws of halves."
    )
    if picture:
        lines += ["", f"![real, reconstructed, generated, forecast]({picture})"]
    lines += ["", "| figure | target | found | n | holds |", "|---|---|---|---:|---|"]
    for name, path, targets in FIGURES:
        if (figure := at(report, path)) is not None:
            lines.append(row(name, figure, targets.get(setting)))
    lines += [row(name, figure, targets.get(setting)) for name, figure, targets in derived(report)]
    if "audit" in report and "verdict" in report["audit"]:
        lines += ["", f"The audit's verdict: {report['audit']['verdict']}"]
    return "\n".join(lines) + "\n"


def write_page(path: Path, text: str) -> None:
    """``text``, and the sections that people wrote below an earlier one."""
    before = path.read_text() if path.is_file() else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + before[before.index(SECTION) :] if SECTION in before else text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="folder that g3n report wrote")
    parser.add_argument("--output", type=Path, required=True, help="the .md to write")
    parser.add_argument("--setting", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--title", default="The demo's figures")
    parser.add_argument("--how", action="append", default=[], help="a command before the report's; repeatable")
    parser.add_argument("--picture", help="beside the page")
    args = parser.parse_args(argv)
    try:
        file = args.report / "report.json"
        if not file.is_file():
            raise G3nError(f"'{file}' does not exist; run g3n report first")
        text = page(json.loads(file.read_text()), args.setting, args.title, args.how, args.picture)
    except G3nError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_page(args.output, text)
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
