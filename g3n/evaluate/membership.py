"""Membership inference: can one tell from a generator who was in its training set? 0.5 is chance, 1 is certainty."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from g3n.evaluate.intervals import Interval, bootstrap
from g3n.flow import Velocity, path
from g3n.tasks.base import sample_generator

TIMES = 8  # of the flow at which a loss is measured, each with its own noise


def attack_auc(scores: Sequence[float] | np.ndarray, member: Sequence[bool], subjects: Sequence[str]) -> Interval:
    """Area under the ROC curve of ``scores`` (higher: more likely trained on), with its interval over subjects.

    Scores are minus the distance to the nearest generated volume (GAN-Leaks, Chen 2020, arXiv 1909.03935) or minus the
    model's own loss (Carlini 2023, arXiv 2301.13188). Raises ValueError where there are only members or only others.
    """
    if len(set(map(bool, member))) < 2:
        raise ValueError("membership needs volumes that were trained on and others")

    return bootstrap(_auc, np.asarray(member, dtype=bool), np.asarray(scores, dtype=np.float64), subjects=subjects)


def _auc(is_member: np.ndarray, score: np.ndarray) -> float:
    """By ranks (Mann & Whitney 1947): a bootstrap asks a thousand times, and scikit-learn's takes a millisecond each."""
    n, others = int(is_member.sum()), int((~is_member).sum())
    if not n or not others:
        return float("nan")
    return float((rankdata(score)[is_member].sum() - n * (n + 1) / 2) / (n * others))


@torch.no_grad()
def flow_losses(
    velocity: Callable[[Tensor], Velocity], latents_BNC: Tensor, cond_BV: Tensor, seeds: Sequence[int]
) -> np.ndarray:
    """Squared velocity error of each latent, float64 [B]: the mean over ``TIMES`` times, the noises drawn from its seed.

    ``velocity(cond)`` is the flow under conditions [B', V]; latents are standardized float32 on the model's device.
    """
    times_T = (torch.arange(TIMES, device=latents_BNC.device) + 0.5) / TIMES
    noise_BTNC = torch.stack(
        [torch.randn((TIMES, *latents_BNC.shape[1:]), generator=sample_generator(seed)) for seed in seeds]
    )
    total_B = torch.zeros(len(latents_BNC), dtype=torch.float64)
    flow = velocity(cond_BV)
    for k in range(TIMES):
        t_B = times_T[k].expand(len(latents_BNC))
        xt_BNC, target_BNC = path(noise_BTNC[:, k].to(latents_BNC.device), latents_BNC, t_B)
        total_B += (flow(xt_BNC, t_B) - target_BNC).square().mean(dim=(1, 2)).double().cpu()
    return (total_B / TIMES).numpy()
