"""Is it useful? Predictors trained on generated latents and tested on real people, and generated people for a rare group.

Train on synthetic, test on real (Esteban 2017, arXiv 1706.02633).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from g3n.evaluate import intervals
from g3n.evaluate.effects import correlation
from g3n.evaluate.probes import CLASSES, NUMBERS, Pooled, agreement, fit_probe, known, truth

Draw = Callable[[Sequence[Mapping[str, Any]], Sequence[str]], Pooled]  # variables and subjects of rows -> made latents
MOST_SCANS = 1024  # train scans that are generated again


def joined(a: Pooled, b: Pooled) -> Pooled:
    return Pooled(np.concatenate([a.latent_PC, b.latent_PC]), a.variables + b.variables, a.subjects + b.subjects)


def train_on_synthetic(train: Pooled, made: Pooled, test: Pooled) -> dict[str, Any]:
    """For each variable: a predictor trained on ``train``, one trained on ``made`` (generated under the same variables),
    both on ``test``, and the paired difference of share right or r. Variables without two values are not there."""
    found = {}
    for name in (*CLASSES, *NUMBERS):
        on_real, on_made, rows = fit_probe(train, name), fit_probe(made, name), known(test, name)
        if on_real is None or on_made is None or not rows:
            continue
        y, subjects = truth(test, name), [test.subjects[i] for i in rows]
        a, b = on_made(test.latent_PC[rows]), on_real(test.latent_PC[rows])
        if name in NUMBERS:
            less = intervals.bootstrap(
                lambda t, p, q: correlation(t, p) - correlation(t, q), y, a, b, subjects=subjects
            )
        else:
            less = intervals.mean((a == y).astype(float) - (b == y), subjects)
        found[name] = {
            "real": agreement(on_real, test, name),
            "synthetic": agreement(on_made, test, name),
            "synthetic_minus_real": asdict(less),
        }
    return found


def rare_group(train: Pooled, test: Pooled, draw: Draw, name: str = "diagnosis") -> dict[str, Any]:
    """The rarest level of a variable (that ``test`` has too): does a classifier find it more often when generated people
    make it as frequent in training as the commonest? Recall of the group and share right over all, real + synthetic
    against real. ``left_out`` says why where there are no two levels."""
    counts = Counter(truth(train, name).tolist())
    shared = [level for level in counts if level in set(truth(test, name).tolist())]
    if len(counts) < 2 or not shared:
        return {"left_out": f"the latents have fewer than two levels of {name}"}
    level = min(shared, key=lambda x: (counts[x], x))
    source = [i for i in known(train, name) if str(train.variables[i][name]) == level]
    more = [source[k % len(source)] for k in range(max(counts.values()) - counts[level])]
    if not more:
        return {"left_out": f"every level of {name} is as frequent as the others"}
    made = draw([train.variables[i] for i in more], [train.subjects[i] for i in more])
    before, after = fit_probe(train, name), fit_probe(joined(train, made), name)
    assert before is not None
    assert after is not None
    rows = known(test, name)
    y, subjects = truth(test, name), np.array([test.subjects[i] for i in rows])
    right_before, right_after = ((p(test.latent_PC[rows]) == y).astype(float) for p in (before, after))
    group = y == level

    def figures(chosen: np.ndarray) -> dict[str, Any]:
        a, b, who = right_after[chosen], right_before[chosen], subjects[chosen].tolist()
        return {
            "real": asdict(intervals.mean(b, who)),
            "real_and_synthetic": asdict(intervals.mean(a, who)),
            "difference": asdict(intervals.mean(a - b, who)),
        }

    about = {"variable": name, "level": level, "train_scans": counts[level], "synthetic_scans": len(more)}
    return {**about, "recall": figures(group), "share_right": figures(np.ones(len(y), bool))}
