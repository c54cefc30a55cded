"""One small file a cohort; data_prep/cohorts/contract.py says what it holds."""

from __future__ import annotations

import importlib

from data_prep.cohorts.contract import Cohort
from g3n.config import G3nError

NAMES = (
    "adni", "ppmi", "nki", "upenn_gbm", "hcp_ya", "hbn", "ucsf_pdgm", "gsp", "abide2", "fcon1000", "ixi", "abide1",
    "schizconnect", "adhd200", "corr", "oasis1", "oasis2", "nki2",
)  # fmt: skip


def load_cohort(name: str) -> Cohort:
    """Raises G3nError for a name that is none of NAMES."""
    if name not in NAMES:
        raise G3nError(
            f"cohort '{name}' is not known; known: {', '.join(sorted(NAMES))}, or 'bids' for any BIDS folder"
        )
    cohort: Cohort = importlib.import_module(f"data_prep.cohorts.{name}").COHORT
    return cohort
