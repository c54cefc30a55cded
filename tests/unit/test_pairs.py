"""Which visits a sample uses, and what a pair of them says."""

from __future__ import annotations

import math
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from g3n.stream.index import ShardIndex
from g3n.stream.lanes import StreamConfig, TrainStream, eval_batches
from g3n.stream.order import sample_seed
from g3n.stream.pairs import Kind, draw_visits, fixed_visits
from tests import shards

VISITS = (1, 2, 4, 3, 1, 2)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    samples = [shards.latent_sample(i, n) for i, n in enumerate(VISITS)]
    halves = [samples[:3], samples[3:]]
    return shards.write(tmp_path_factory.mktemp("latents"), "latent", train=halves, val=[[shards.latent_sample(9, 3)]])


def tokens(number: int, visit: int) -> torch.Tensor:
    return torch.from_numpy(shards.latent_sample(number, VISITS[number]).array[visit].astype(np.float32))


@pytest.mark.parametrize(("kind", "choices"), [("latent", 4), ("pair", 6)])
def test_every_visit_and_every_pair_is_equally_likely(kind: Kind, choices: int) -> None:
    drawn = Counter(draw_visits(kind, 4, sample_seed(0, lane, p)) for lane in range(4) for p in range(1500))
    assert len(drawn) == choices
    assert stats.chisquare(list(drawn.values())).pvalue > 1e-3
    assert all(list(visits) == sorted(set(visits)) for visits in drawn)  # in time order
    assert draw_visits("volume", 1, 0) == ()
    assert draw_visits("pair", 2, 12345) == (0, 1)


def test_one_visit_or_one_pair_is_drawn_independently_of_the_sample_before() -> None:
    drawn = [draw_visits("pair", 3, sample_seed(0, 0, p)) for p in range(3000)]
    table = Counter(zip(drawn, drawn[1:], strict=False))
    counts = [[table[a, b] for b in ((0, 1), (0, 2), (1, 2))] for a in ((0, 1), (0, 2), (1, 2))]
    assert stats.chi2_contingency(counts).pvalue > 1e-3


def test_pairs_are_of_one_subject_with_the_years_between_and_the_targets_variables(index: ShardIndex) -> None:
    with closing(TrainStream(index, StreamConfig(index.url, 2), "pair", 8, 0, 1, 5)) as stream:
        batches = [next(stream) for _ in range(12)]
    seen = Counter()
    for batch in batches:
        assert batch.tensors["baseline"].shape == (8, shards.TOKENS, shards.CHANNELS)
        for b, key in enumerate(batch.keys):
            subject, visits = key.split("_visit-")
            number = int(subject.removeprefix("sub-").removesuffix("_T1"), 16)
            i, j = (int(v) - 1 for v in visits.split("-"))
            assert torch.equal(batch.tensors["baseline"][b], tokens(number, i))
            assert torch.equal(batch.tensors["target"][b], tokens(number, j))
            assert batch.tensors["elapsed_years"][b].item() == pytest.approx(j - i, abs=3e-3)
            assert batch.variables[b]["age_years"] == 50.0 + j
            seen[number] += 1
    assert set(seen) == {1, 2, 3, 5}  # those with two visits or more
    assert max(seen.values()) - min(seen.values()) <= 1  # 96 samples, each of the four 24 times up to where it stopped


def test_latents_give_one_visit_of_each_sample(index: ShardIndex) -> None:
    with closing(TrainStream(index, StreamConfig(index.url, 1), "latent", 6, 0, 1, 5)) as stream:
        for _ in range(5):
            batch = next(stream)
            numbers = []
            for b, key in enumerate(batch.keys):
                subject, visit = key.split("_visit-")
                numbers.append(int(subject.removeprefix("sub-").removesuffix("_T1"), 16))
                assert torch.equal(batch.tensors["latent"][b], tokens(numbers[-1], int(visit) - 1))
                assert batch.variables[b]["age_years"] == 49.0 + int(visit)
            assert sorted(numbers) == list(range(6))


def test_evaluation_takes_every_visit_and_the_widest_pair(index: ShardIndex) -> None:
    def keys(kind: Kind, split: str) -> list[str]:
        return sorted(k for b in eval_batches(index, None, kind, split, 1, 0, 1, 0) for k in b.keys)

    subject = f"sub-{9:016x}_T1"
    assert keys("latent", "val") == [f"{subject}_visit-0{i}" for i in (1, 2, 3)]
    assert keys("pair", "val") == [f"{subject}_visit-01-03"]
    assert len(keys("latent", "train")) == sum(VISITS)
    assert len(keys("pair", "train")) == 4
    assert fixed_visits("volume", 1) == [()]


def test_a_missing_date_gives_unknown_years(tmp_path: Path) -> None:
    index = shards.write(tmp_path, "latent", train=[[shards.latent_sample(0, 2, dated=False)]])
    batch = next(eval_batches(index, None, "pair", "train", 1, 0, 1, 0))
    assert math.isnan(batch.tensors["elapsed_years"].item())


def test_history_is_the_visits_just_before_the_baseline(index: ShardIndex) -> None:
    """The same pairs as without it; earlier visits from the latest to the oldest, what is missing NaN and 0."""
    with closing(TrainStream(index, StreamConfig(index.url, 2), "pair", 8, 0, 1, 5)) as stream:
        plain = [next(stream) for _ in range(6)]
    with closing(TrainStream(index, StreamConfig(index.url, 2), "pair", 8, 0, 1, 5, history=3)) as stream:
        batches = [next(stream) for _ in range(6)]
    found = set()
    for batch, without in zip(batches, plain, strict=True):
        assert "earlier" not in without.tensors
        for name in ("baseline", "target", "elapsed_years"):
            assert torch.equal(batch.tensors[name], without.tensors[name])
        assert batch.tensors["earlier"].shape == (8, 2, shards.TOKENS, shards.CHANNELS)
        for b, key in enumerate(batch.keys):
            subject, visits = key.split("_visit-")
            number = int(subject.removeprefix("sub-").removesuffix("_T1"), 16)
            *before, baseline, _ = (int(v) - 1 for v in visits.split("-"))
            assert before == list(range(max(0, baseline - 2), baseline))
            found.add(len(before))
            for k in range(2):
                years = batch.tensors["earlier_years"][b, k].item()
                if k < len(before):
                    assert years == pytest.approx(k + 1, abs=3e-3)
                    assert torch.equal(batch.tensors["earlier"][b, k], tokens(number, baseline - 1 - k))
                else:
                    assert math.isnan(years)
                    assert not batch.tensors["earlier"][b, k].any()
    assert found == {0, 1, 2}


@pytest.mark.parametrize(
    ("visits", "history", "expected"),
    [(5, 1, (0, 4)), (5, 2, (0, 1, 4)), (5, 3, (0, 1, 2, 4)), (3, 3, (-1, 0, 1, 2)), (2, 3, (-1, -1, 0, 1))],
)
def test_evaluation_gives_a_baseline_its_history(visits: int, history: int, expected: tuple[int, ...]) -> None:
    assert fixed_visits("pair", visits, history) == [expected]
