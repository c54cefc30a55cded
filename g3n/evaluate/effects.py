"""What was asked for against what was made: the plan of a sweep over variables, and its effects on anatomy.

Every value of a variable is generated from the same noises, so a difference is that of one made-up person changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from g3n.evaluate import intervals
from g3n.evaluate.anatomy import LESION_PRESENT_ML
from g3n.models.conditioning import VariableSet

HEALTHY = "HC"
WIDER_VENTRICLES = "AD"
WITH_LESION = ("glioma", "Glioma", "GBM", "LGG")
Rows = Sequence[Mapping[str, Any]]


def lesion_level(variables: VariableSet) -> str | None:
    """The diagnosis of the run's table that has a lesion, if any."""
    known = variables.levels.get("diagnosis", ())
    return next((level for level in WITH_LESION if level in known), None)


def plan(
    variables: VariableSet, ages: Sequence[float], fixed: Mapping[str, Any]
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """(conditions of each sweep, why others are left out). Sweeps other than that of age are at the middle age."""
    middle = {**fixed, "age_years": sorted(map(float, ages))[len(ages) // 2]}
    sweeps = {"age_years": [{**fixed, "age_years": float(age)} for age in ages]}
    left_out: dict[str, str] = {}
    known = variables.levels
    if {"F", "M"} <= set(known.get("sex", ())):
        sweeps["sex"] = [{**middle, "sex": sex} for sex in ("F", "M")]
    else:
        left_out["sex"] = "the run's table has no sex with levels F and M"
    levels = known.get("diagnosis", ())
    lesion = lesion_level(variables)
    wanted = [level for level in (HEALTHY, WIDER_VENTRICLES, lesion) if level in levels]
    if HEALTHY in wanted and len(wanted) > 1:
        sweeps["diagnosis"] = [{**middle, "diagnosis": level} for level in wanted]
    if not {HEALTHY, WIDER_VENTRICLES} <= set(levels):
        left_out["diagnosis"] = f"the run's table has no diagnosis with levels {HEALTHY} and {WIDER_VENTRICLES}"
    if HEALTHY not in levels or lesion is None:
        left_out["lesion"] = f"the run's table has no diagnosis with {HEALTHY} and one of {', '.join(WITH_LESION)}"
    if len(known.get("modality", ())) > 1:
        sweeps["modality"] = [{**middle, "modality": level} for level in known["modality"]]
    else:
        left_out["modality"] = "the run's table has fewer than two modalities"
    return sweeps, left_out


def slope(x: np.ndarray, y: np.ndarray) -> float:
    """Of the least-squares line; NaN where x is constant."""
    return float(np.polyfit(x, y, 1)[0]) if np.ptp(x) > 0 else float("nan")


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's r; NaN where either is constant."""
    return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) > 0 and np.ptp(y) > 0 else float("nan")


def by_seed(rows: Rows, variable: str, value: Any, figure: str) -> dict[int, float]:
    return {row["seed"]: float(row[figure]) for row in rows if row[variable] == value}


def paired(rows: Rows, variable: str, high: Any, low: Any, figure: str) -> dict[str, Any]:
    """Mean difference of ``figure`` between two values of a variable from the same noise, interval over noises."""
    a, b = by_seed(rows, variable, high, figure), by_seed(rows, variable, low, figure)
    return asdict(intervals.mean([a[seed] - b[seed] for seed in a]))


def age_effect(rows: Rows) -> dict[str, Any]:
    """Ventricle volume over the age asked for: slope (mL a year), r, oldest / youngest, share of noises under which every
    step in age widens the ventricles."""
    age, ml = (np.array([row[k] for row in rows]) for k in ("age_years", "ventricle_ml"))
    seeds = [row["seed"] for row in rows]
    order = sorted(set(age.tolist()))
    of = np.array([list(by_seed(rows, "age_years", a, "ventricle_ml").values()) for a in order])  # [ages, noises]

    def ratio(young: np.ndarray, old: np.ndarray) -> float:
        return float(old.mean() / young.mean()) if young.mean() > 0 else float("nan")

    grows = (np.diff(of, axis=0) > 0).all(axis=0)
    return {
        "slope_ml_a_year": asdict(intervals.bootstrap(slope, age, ml, subjects=seeds)),
        "r": asdict(intervals.bootstrap(correlation, age, ml, subjects=seeds)),
        "ratio": asdict(intervals.bootstrap(ratio, of[0], of[-1])),
        "monotone_share": asdict(intervals.mean(grows.astype(float))),
    }


def lesion_effect(rows: Rows, level: str, modality: str) -> dict[str, Any]:
    """How often a lesion is there that was asked for, and none that was not."""
    asked = by_seed(rows, "diagnosis", level, "lesion_present")
    spared = by_seed(rows, "diagnosis", HEALTHY, "lesion_present")
    right = [*asked.values(), *(1 - v for v in spared.values())]
    return {
        "level": level,
        "present_above_ml": LESION_PRESENT_ML.get(modality, LESION_PRESENT_ML["T1"]),
        "share_right": asdict(intervals.mean(right, [*asked, *spared])),
        "share_right_asked": asdict(intervals.mean(list(asked.values()))),
        "share_right_not_asked": asdict(intervals.mean([1 - v for v in spared.values()])),
        "lesion_ml": paired(rows, "diagnosis", level, HEALTHY, "lesion_ml"),
    }


def effects(sweeps: Mapping[str, Rows], variables: VariableSet, modality: str) -> dict[str, Any]:
    """Effects of the sweeps of ``plan`` on measured anatomy; each figure with value, low, high, n and subjects (noises)."""
    found: dict[str, Any] = {"age": age_effect(sweeps["age_years"])}
    if "sex" in sweeps:
        found["sex"] = {
            f"m_minus_f_{f}": paired(sweeps["sex"], "sex", "M", "F", f) for f in ("ventricle_ml", "brain_ml")
        }
    if "diagnosis" in sweeps:
        rows, levels = sweeps["diagnosis"], {row["diagnosis"] for row in sweeps["diagnosis"]}
        if WIDER_VENTRICLES in levels:
            difference = paired(rows, "diagnosis", WIDER_VENTRICLES, HEALTHY, "ventricle_ml")
            found["diagnosis"] = {"ad_minus_hc_ventricle_ml": difference}
        lesion = lesion_level(variables)
        if lesion in levels:
            found["lesion"] = lesion_effect(rows, str(lesion), modality)
    return found
