"""All tasks of configs/probes.yaml on made features of a whole cohort: ``python -m benchmarks.probing``.

35,309 scans with 1152 features each, as many scans and people a cohort as published (docs/data_preparation.md), labels with an
effect or without. Time is that of ``g3n probe`` without reading the file: folds, fits, intervals, tests, files, picture.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil

from benchmarks.measure import write_rows
from g3n.features import Features
from g3n.probing.align import align
from g3n.probing.run import Options, write_probes
from g3n.probing.tasks import read_tasks

ROOT = Path(__file__).parents[1]
# scans, people, modalities, of the published set
COHORTS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "adni": (10910, 2400, ("T1",)), "ppmi": (3908, 1400, ("T1", "T2", "FLAIR")), "nki": (2455, 1300, ("T1",)),
    "upenn_gbm": (2444, 611, ("T1", "T1c", "T2", "FLAIR")), "hcp_ya": (2226, 1113, ("T1", "T2")), "hbn": (2135, 2135, ("T1",)),
    "ucsf_pdgm": (1980, 495, ("T1", "T1c", "T2", "FLAIR")), "gsp": (1636, 1570, ("T1",)), "abide2": (1430, 1100, ("T1",)),
    "fcon1000": (1197, 1197, ("T1",)), "ixi": (1159, 580, ("T1", "T2")), "abide1": (984, 984, ("T1",)),
    "schizconnect": (670, 340, ("T1", "T2")), "adhd200": (598, 598, ("T1",)), "corr": (546, 400, ("T1",)),
    "oasis1": (436, 416, ("T1",)), "oasis2": (373, 150, ("T1",)), "nki2": (222, 222, ("T1",)),
}  # fmt: skip
DIAGNOSES = {
    "adni": ("HC", "MCI", "AD"), "ppmi": ("HC", "PD", "PD", "PRODROMAL"), "abide1": ("HC", "ASD"), "abide2": ("HC", "ASD"),
    "adhd200": ("HC", "ADHD"), "schizconnect": ("HC", "SCZ"), "upenn_gbm": ("GBM",), "ucsf_pdgm": ("GBM", "GLIOMA"),
    "hbn": ("PED_MIXED",),
}  # fmt: skip
SITES = {"abide1": 17, "abide2": 17, "adhd200": 8, "schizconnect": 4}
NUMBERS = {
    "mmse": (("adni", "oasis1", "oasis2"), 0, 30), "moca": (("adni", "ppmi"), 0, 30), "gds15": (("adni", "ppmi"), 0, 15),
    "mds_updrs_iii": (("ppmi",), 0, 132), "scopa_aut": (("ppmi",), 0, 69), "education_years": (("adni", "ppmi", "oasis2"), 6, 24),
}  # fmt: skip


def made(share: float, width: int, seed: int = 0) -> Features:
    """Features whose spectrum falls as 1/k, and a table of the columns that the tasks name."""
    rng = np.random.default_rng(seed)
    parts = []
    for cohort, (scans, people, modalities) in COHORTS.items():
        n, m = max(30, round(scans * share)), max(15, round(people * share))
        person = np.arange(n) % m
        traits = pd.DataFrame({
            "subject": [f"sub-{cohort}{i}" for i in range(m)], "cohort": cohort, "sex": rng.choice(["F", "M"], m),
            "age_years": rng.uniform(18, 90, m).round(1), "diagnosis": rng.choice(DIAGNOSES.get(cohort, ("HC",)), m),
            "site": [f"{cohort}{i}" for i in rng.integers(SITES.get(cohort, 1), size=m)], "apoe_e4_count": rng.choice([0.0, 1.0, 2.0], m),
            "cdr_global": rng.choice([0.0, 0.0, 0.5, 1.0], m), "updrs_state": "OFF", "idh": rng.choice(["wildtype", "mutant"], m, p=[0.8, 0.2]),
            "mgmt": rng.choice(["methylated", "unmethylated"], m), "who_grade": rng.choice([2.0, 3.0, 4.0], m, p=[0.1, 0.1, 0.8]),
        })  # fmt: skip
        for name, (cohorts, low, high) in NUMBERS.items():
            traits[name] = rng.integers(low, high, m).astype(float) if cohort in cohorts else np.nan
        rows = traits.iloc[person].reset_index(drop=True)
        rows["modality"] = np.asarray(modalities)[np.arange(n) // m % len(modalities)]
        parts.append(rows)
    table = pd.concat(parts, ignore_index=True)
    table.insert(0, "key", [f"scan{i}" for i in range(len(table))])
    array = rng.standard_normal((len(table), width), np.float32) * (np.arange(1, width + 1) ** -0.5).astype(np.float32)
    effects = [
        table["age_years"] / 20,
        (table["sex"] == "M") * 1.0,
        table["diagnosis"].isin(["AD", "PD", "ASD", "SCZ"]) * 0.5,
    ]
    array[:, : len(effects)] += np.stack(effects, axis=1).astype(np.float32)
    turn = np.linalg.qr(rng.standard_normal((width, width)))[0].astype(np.float32)
    return Features(table, {"mean": array @ turn}, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a tenth of the scans")
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--task", action="append", default=[], help="only these")
    parser.add_argument("--no-record", action="store_true", help="do not append to benchmarks/results")
    args = parser.parse_args()
    features = made(0.1 if args.small else 1.0, args.width)
    tasks = read_tasks(ROOT / "configs/probes.yaml", args.task)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        metrics = write_probes(align({"made": features}), tasks, Path(folder) / "out", Options(), mlflow=False)
        seconds = time.perf_counter() - begin
    row = {
        "scans": len(features), "width": args.width, "tasks": len(tasks), "ran": len(metrics["tasks"]),
        "cores": len(os.sched_getaffinity(0)), "threads": os.environ.get("OMP_NUM_THREADS", ""), "seconds": round(seconds, 1),
        "rss_gib": round(psutil.Process().memory_info().rss / 2**30, 2),
    }  # fmt: skip
    print(row, metrics["did_not_run"])
    if not args.no_record:
        print(write_rows("probing", [row]))


if __name__ == "__main__":
    main()
