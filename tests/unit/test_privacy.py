"""The privacy audit: distances against scikit-learn, planted copies, planted memorizers, and the command on a nano run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import norm
from sklearn.metrics import roc_auc_score
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

from g3n.config import G3nError
from g3n.evaluate import neighbors, privacy
from g3n.evaluate.membership import attack_auc, flow_losses
from g3n.evaluate.neighbors import Neighbors, best_matches, nearest
from g3n.flow import Velocity
from g3n.generate import open_generator
from tests import untrained


def normal(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()


@pytest.mark.parametrize("block", [7, 64, 1000])
def test_nearest_agrees_with_scikit_learn(block: int) -> None:
    queries, references = normal(0, 50, 24), normal(1, 333, 24)
    found = nearest(queries, references, block=block)
    distance, index = (
        NearestNeighbors(n_neighbors=1, algorithm="brute").fit(references.double()).kneighbors(queries.double())
    )
    np.testing.assert_array_equal(found.index, index[:, 0])
    np.testing.assert_allclose(found.distance, distance[:, 0], rtol=1e-12)


def test_one_person_is_no_neighbor_of_themselves() -> None:
    points = normal(2, 120, 5)
    subjects = torch.arange(120) // 4
    found = nearest(points, points, (subjects, subjects), block=50)
    for i in range(0, 120, 11):
        others = [j for j in range(120) if j // 4 != i // 4]
        distance = (points[i].double() - points[others].double()).norm(dim=1)
        assert found.index[i] == others[int(distance.argmin())]
        assert found.distance[i] == pytest.approx(float(distance.min()), rel=1e-12)
    with pytest.raises(ValueError, match="two subjects"):
        nearest(points, points, (subjects * 0, subjects * 0))


def test_rounding_of_float32_hides_nobody() -> None:
    """Far from the origin the products cancel: float32 alone would name a wrong neighbor at a wrong distance."""
    rng = np.random.default_rng(3)
    references = torch.from_numpy(1000 + rng.standard_normal((400, 64)) * 1e-2)
    queries = torch.from_numpy(1000 + rng.standard_normal((20, 64)) * 1e-2)
    squared = (
        queries.float().square().sum(1, keepdim=True)
        + references.float().square().sum(1)
        - 2 * queries.float() @ references.float().T
    )
    exact = torch.cdist(queries, references, compute_mode="donot_use_mm_for_euclid_dist")
    assert (squared.argmin(1) != exact.argmin(1)).any()
    found = nearest(queries, references, block=90)
    np.testing.assert_array_equal(found.index, exact.argmin(1))
    np.testing.assert_allclose(found.distance, exact.min(1).values, rtol=1e-12)


def smooth(seed: int, count: int, size: int = 16) -> Tensor:
    """Brains: one shape for all, and folds of one's own."""
    x = torch.nn.functional.avg_pool3d(normal(seed, count, 1, size, size, size), 3, stride=1, padding=1)[:, 0]
    axes = torch.meshgrid(*(torch.arange(size) - (size - 1) / 2,) * 3, indexing="ij")
    radius = sum(a**2 for a in axes) ** 0.5  # type: ignore[operator]
    return torch.where(radius < size / 2 - 2.5, 3 * torch.sin(radius) + 4 * x, 0)


def test_planted_copies_are_found() -> None:
    real, fresh = smooth(0, 30), smooth(1, 5)
    kinds = ["T1"] * 15 + ["T2"] * 15
    real[15:] *= -1
    noise = 0.1 * normal(9, 16, 16, 16)
    planted = [
        (real[3], 3, False, (0, 0, 0)),
        (real[7].flip(0), 7, True, (0, 0, 0)),
        (torch.roll(real[20], (2, -1, 1), (0, 1, 2)), 20, False, (-2, 1, -1)),
        (torch.roll(real[28].flip(0), (1, 2, -2), (0, 1, 2)) + noise, 28, True, (1, -2, 2)),
        (real[5] + noise, 5, False, (0, 0, 0)),
    ]
    found = best_matches(torch.cat([torch.stack([p[0] for p in planted]), fresh]), real, kinds, block=8)
    for i, (_, row, flipped, shift) in enumerate(planted):
        assert found.correlation[i] > privacy.COPY, i
        assert (found.index[i], found.flipped[i], tuple(found.shift[i])) == (row, flipped, shift)
    assert found.correlation[0] == pytest.approx(1, abs=1e-5)
    assert (found.correlation[5:] < 0.8).all()


def test_the_correlation_is_that_of_numpy() -> None:
    """Of what differs from the mean scan of the modality."""
    real, other = smooth(0, 6), smooth(1, 2)
    real[3:] += 5 * smooth(2, 1)
    other[1] = real[4] + 0.5 * normal(3, 16, 16, 16)
    found = best_matches(other, real, ["T1"] * 3 + ["T2"] * 3)
    assert (found.index[0] < 3, found.index[1] >= 3) == (True, True)
    for i, mean in enumerate((real[:3].mean(0), real[3:].mean(0))):
        moved = other[i].flip(0) if found.flipped[i] else other[i]
        moved = torch.roll(moved, tuple(int(s) for s in found.shift[i]), (0, 1, 2))
        expected = np.corrcoef((moved - mean).flatten(), (real[found.index[i]] - mean).flatten())[0, 1]
        assert found.correlation[i] == pytest.approx(expected, abs=1e-5)


def test_a_scan_matches_no_scan_of_the_same_person() -> None:
    real = smooth(0, 8)
    real[1] = real[0]
    subjects = torch.tensor([0, 0, 1, 2, 3, 4, 5, 6])
    assert best_matches(real[:1], real, ["T1"] * 8).correlation[0] == pytest.approx(1, abs=1e-5)
    assert best_matches(real[:1], real, ["T1"] * 8, (subjects[:1], subjects)).index[0] > 1


def test_the_papers_rule_counts_what_lies_under_the_percentile() -> None:
    real = Neighbors(np.arange(1.0, 101.0), np.zeros(100, int))  # the 5th percentile of 1..100 is 5.95
    generated = Neighbors(np.array([5.94, 5.96, 2.0, 50.0]), np.zeros(4, int))
    found = privacy.too_close(generated, real, [str(i) for i in range(100)])
    assert found["threshold"]["value"] == pytest.approx(5.95)
    assert found["threshold"]["low"] < 5.95 < found["threshold"]["high"]
    assert (found["under"], found["of"], found["share"]) == (2, 4, 0.5)
    z, n, p = float(norm.ppf(0.975)), 4, 0.5  # Wilson (1927)
    center, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    expected = ((center - half) / (1 + z * z / n), (center + half) / (1 + z * z / n))
    assert (found["share_low"], found["share_high"]) == pytest.approx(expected)
    assert "held_out" not in found
    new = Neighbors(np.array([5.0, 6.0, 7.0]), np.zeros(3, int))
    held_out = privacy.too_close(generated, real, [str(i) for i in range(100)], new)["held_out"]
    assert (held_out["under"], held_out["of"]) == (1, 3)
    assert held_out["to_real"] == {"min": 5.0, "median": 6.0, "max": 7.0}


def test_new_people_lie_under_the_percentile_as_often_as_it_says() -> None:
    real, new = normal(0, 600, 8), normal(1, 600, 8)
    subjects = torch.arange(600)
    found = privacy.too_close(nearest(new, real), nearest(real, real, (subjects, subjects)), list(map(str, range(600))))
    assert found["share_low"] < 0.05 < found["share_high"]
    copied = nearest(real[:100] + 0.01 * normal(2, 100, 8), real)
    assert (
        privacy.too_close(copied, nearest(real, real, (subjects, subjects)), list(map(str, range(600))))["under"] == 100
    )


def test_the_attacks_area_is_that_of_two_normals() -> None:
    """AUC of N(d, 1) against N(0, 1) is Phi(d / sqrt 2)."""
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(1, 1, 400), rng.normal(0, 1, 400)])
    found = attack_auc(scores, [True] * 400 + [False] * 400, [str(i) for i in range(800)])
    assert found.low < norm.cdf(1 / math.sqrt(2)) < found.high
    ties = np.round(scores)
    assert attack_auc(ties, [True] * 400 + [False] * 400, [str(i) for i in range(800)]).value == pytest.approx(
        roc_auc_score([1] * 400 + [0] * 400, ties)
    )
    with pytest.raises(ValueError, match="trained on"):
        attack_auc([1.0, 2.0], [True, True], ["a", "b"])


def test_a_generator_that_memorizes_is_told_by_distance() -> None:
    train, held_out = normal(0, 60, 40), normal(1, 60, 40)
    both, member = torch.cat([train, held_out]), [True] * 60 + [False] * 60
    subjects = [str(i // 2) for i in range(120)]
    memorized = nearest(both, train + 0.1 * normal(2, 60, 40)).distance
    assert attack_auc(-memorized, member, subjects).low > 0.99
    ignorant = attack_auc(-nearest(both, normal(3, 60, 40)).distance, member, subjects)
    assert ignorant.low < 0.5 < ignorant.high


def memorizer(points_PNC: Tensor) -> Callable[[Tensor], Velocity]:
    """The best velocity for data that are these points: towards each, as likely as it is (closed form)."""

    def velocity(x_BNC: Tensor, t_B: Tensor) -> Tensor:
        t = float(t_B[0])
        squared_BP = torch.cdist(x_BNC.flatten(1), t * points_PNC.flatten(1)).square()
        weight_BP = torch.softmax(-squared_BP / (2 * (1 - t) ** 2), dim=1)
        return (torch.einsum("bp,pnc->bnc", weight_BP, points_PNC) - x_BNC) / (1 - t)

    return lambda cond_BV: velocity


def test_a_generator_that_memorizes_is_told_by_its_loss() -> None:
    train, held_out = normal(0, 50, 6, 3), normal(1, 50, 6, 3)
    both, member = torch.cat([train, held_out]), [True] * 50 + [False] * 50
    subjects, seeds, cond = [str(i) for i in range(100)], list(range(100)), torch.zeros(100, 1)
    told = attack_auc(-flow_losses(memorizer(train), both, cond, seeds), member, subjects)
    assert told.low > 0.99
    blind = attack_auc(-flow_losses(lambda c: lambda x, t: torch.zeros_like(x), both, cond, seeds), member, subjects)
    assert blind.low < 0.5 < blind.high


def test_a_loss_depends_on_its_own_seed_alone() -> None:
    x, cond = normal(0, 4, 6, 3), torch.zeros(4, 1)
    together = flow_losses(memorizer(normal(1, 9, 6, 3)), x, cond, [5, 6, 7, 8])
    alone = flow_losses(memorizer(normal(1, 9, 6, 3)), x[2:3], cond[2:3], [7])
    assert together[2] == pytest.approx(alone[0], rel=1e-6)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained.chain(tmp_path_factory.mktemp("privacy"))


def test_the_audit_of_a_run(root: Path, tmp_path: Path) -> None:
    generator = open_generator(root / "runs/dit", "cpu")
    arguments = {"count": 6, "steps": 2, "batch": 4}
    found = privacy.audit(generator, [str(root / "latents")], tmp_path / "a", **arguments)
    assert (found["training"], found["held_out"]) == ({"volumes": 16, "subjects": 8}, {"volumes": 8, "subjects": 4})
    assert set(found["nearest"]) == {"latent", "voxel", "feature"}
    assert [found["nearest"][space]["held_out"]["of"] for space in privacy.SPACES] == [8, 8, 8]
    assert 0 <= found["membership"]["auc_by_loss"]["value"] <= 1
    assert "Of 6 volumes" in found["verdict"]
    assert "AUC" in found["verdict"]
    saved = json.loads((tmp_path / "a/audit.json").read_text())
    assert saved["verdict"] == found["verdict"]
    assert (tmp_path / "a/closest.png").is_file()
    assert len((tmp_path / "a/volumes.csv").read_text().splitlines()) == 7
    text = (tmp_path / "a/audit.json").read_text() + (tmp_path / "a/volumes.csv").read_text()
    assert str(root) not in text  # no path of this machine

    # one block is lost, and the batch is another one: the same audit
    before = (tmp_path / "a/volumes.csv").read_text()
    (tmp_path / "a/generated/block-00000.safetensors").write_bytes(b"cut")
    privacy.audit(generator, [str(root / "latents")], tmp_path / "a", **{**arguments, "batch": 5})
    again = json.loads((tmp_path / "a/audit.json").read_text())
    assert again["nearest"]["latent"]["under"] == saved["nearest"]["latent"]["under"]
    assert again["nearest"]["latent"]["threshold"]["value"] == saved["nearest"]["latent"]["threshold"]["value"]
    assert len(before.splitlines()) == 7
    with pytest.raises(G3nError, match="something else"):
        privacy.audit(generator, [str(root / "latents")], tmp_path / "a", **{**arguments, "seed": 1})


def test_a_run_that_repeats_its_training_scans_is_caught(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sampler gives training latents back."""
    generator = open_generator(root / "runs/dit", "cpu")
    with privacy.progress_bar() as progress:
        scans = privacy.read_scans(
            generator, privacy.open_training_latents(generator, [str(root / "latents")]), 8, progress
        )
    train = scans.latents_RNC[[i for i, m in enumerate(scans.member) if m]]
    monkeypatch.setattr(privacy, "sample_latents", lambda *a, **k: iter([train + 1e-3 * normal(0, *train.shape)]))
    found = privacy.audit(generator, [str(root / "latents")], tmp_path / "a", count=len(train), steps=1)
    assert found["nearest"]["latent"]["share"] == 1
    assert found["copies"]["generated"]["count"] == len(train)
    assert found["membership"]["auc_by_distance"]["low"] > 0.99
    assert "too many in latent, voxel, feature space" in found["verdict"]


def test_latents_of_another_run_are_refused(root: Path, tmp_path: Path) -> None:
    generator = open_generator(root / "runs/dit", "cpu")
    with pytest.raises(G3nError, match="was trained on latents"):
        privacy.audit(generator, [str(root / "shards")], tmp_path / "a", count=4)
    assert not (tmp_path / "a").exists()
    with pytest.raises(G3nError, match="too few"):
        privacy.audit(generator, [str(root / "latents")], tmp_path / "a", count=1)


def test_conditions_are_drawn_from_their_own_seed() -> None:
    table = [{"age_years": float(i)} for i in range(50)]
    assert privacy.draw_conditions(table, 10, 3) == privacy.draw_conditions(table, 20, 3)[:10]
    assert privacy.draw_conditions(table, 10, 3) != privacy.draw_conditions(table, 10, 4)
    assert neighbors.SHIFT == 2
