"""Step times by share of steps, and the rank that holds up the others."""

from __future__ import annotations

import time

import torch

from g3n.meters import Meter, OwnTime, Report, memory, over_ranks, slow_rank
from g3n.system import System


def test_percentiles_are_by_nearest_rank() -> None:
    meter = Meter(8)
    assert meter.step_seconds_at(0.5) == 0.0
    meter.steps.extend((float(s), 0.0) for s in (5, 1, 4, 2, 3))
    assert [meter.step_seconds_at(share) for share in (0.2, 0.5, 0.95)] == [1.0, 3.0, 5.0]


def test_own_time_is_data_and_forward_since_the_last_question() -> None:
    own = OwnTime(gpu=False)
    own.waited(2.0)
    with own.forward():
        time.sleep(0.01)
    assert 2.01 <= own.take() < 2.5
    assert own.take() == 0.0


def test_a_slow_rank_is_one_that_takes_half_again_as_long_as_the_others() -> None:
    assert slow_rank([1.0]) is None
    assert slow_rank([1.0, 1.4]) is None
    assert slow_rank([1.0, 1.6]) == 1
    assert slow_rank([1.0, 1.1, 5.0, 0.9]) == 2
    assert slow_rank([0.01, 0.03]) is None  # chance


def test_reports_of_ranks_make_one_row() -> None:
    reports = [
        Report(1.0, 0.1, 2, {"rss_gib": 3.0}, {"voxel_by_modality/T1": (2.0, 4.0)}),
        Report(1.0, 0.5, 3, {"rss_gib": 1.0}, {"voxel_by_modality/T1": (1.0, 1.0), "voxel_by_modality/T2": (9.0, 3.0)}),
    ]
    assert over_ranks(reports) == {
        "speed/data_wait_share": 0.3,
        "speed/data_wait_share_max": 0.5,
        "data/damaged": 5,
        "train/voxel_by_modality/T1": 0.6,
        "train/voxel_by_modality/T2": 3.0,
        "system/rank0/rss_gib": 3.0,
        "system/rank1/rss_gib": 1.0,
    }
    assert memory(reports) == 3.0


def test_a_process_sees_its_own_memory_load_and_files() -> None:
    system = System(torch.device("cpu"))
    before = system.read()
    kept = torch.ones(2**26)  # 256 MiB
    with open(__file__), open(__file__):
        after = system.read()
    assert kept[-1] == 1
    assert 0.24 < after["rss_gib"] - before["rss_gib"] < 0.5
    assert after["open_files"] == before["open_files"] + 2
    assert after["cpu_percent"] > 0
