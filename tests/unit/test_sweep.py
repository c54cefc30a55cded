"""Sweeps: what is refused, what Optuna is asked, and what is left after a kill. Trainings are stood in for by tests/sweeps.py."""

from __future__ import annotations

import csv
import json
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import TrialState

from g3n.config import G3nError, write_yaml
from g3n.sweep import drive as drive_module
from g3n.sweep import process, results, study
from g3n.sweep.drive import run_sweep
from g3n.sweep.plan import load_sweep, make_plan
from g3n.sweep.process import Process, Tail
from g3n.sweep.space import Dimension, corners
from g3n.train import load_config
from tests import nano, sweeps

LR = {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}
DECAY = {"type": "categorical", "values": [0.0, 0.1, 0.3]}
BASE: dict[str, Any] = {
    "name": "study", "metric": "val/masked", "trials": 6, "gpus": 0, "sampler": {"kind": "tpe", "startup": 3},
    "overrides": ["trainer.steps=8", "trainer.eval_every=2", "trainer.save_every=2"],
    "space": {"optim.lr": LR, "optim.weight_decay": DECAY},
}  # fmt: skip
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep")
    nano.shards(root / "shards", train=4, val=1)
    nano.configs(root)
    return root


@pytest.fixture(autouse=True)
def haste(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Look often and draw nothing but in the test of pictures. Whatever machine this is, no trial asks for its GPU."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(drive_module, "_POLL_SECONDS", 0.02)
    if "best_trial" not in request.node.name:
        monkeypatch.setattr(results, "draw", lambda _, sweep: sweep.folder / "study.csv")
        monkeypatch.setattr(results, "_optuna_pictures", lambda *_: [])


@pytest.fixture
def make(cohort: Path, tmp_path: Path) -> Make:
    """A sweep's YAML with keys changed; its study lies in ``tmp_path/study``."""

    def write(**changes: Any) -> Path:
        path = tmp_path / "sweep.yaml"
        path.write_text(write_yaml({**BASE, "config": f"{cohort}/mae.yaml", "runs": str(tmp_path), **changes}))
        return path

    return write


def sweep(path: Path, *words: str) -> int:
    return run_sweep(load_sweep(path, words), "again", sweeps.stand_in)


def table(tmp_path: Path) -> list[dict[str, str]]:
    with open(tmp_path / "study" / "study.csv") as file:
        return list(csv.DictReader(file))


def outcome(rows: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """What must not depend on who was killed."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "deaths", "run")} for row in rows]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {"optim.lrr": LR}}, "space key 'optim.lrr' is no config key; did you mean 'optim.lr'?"),
        ({"space": {"model.nett.width": LR}}, "did you mean 'model.net.width'?"),
        ({"space": {"model.net": LR}}, "is a section; name a key in it"),
        ({"space": {"runs": DECAY}}, "is the same for all trials"),
        ({"space": {"tracking.uri": DECAY}}, "is the same for all trials"),
        ({"spaces": {}}, "unknown config key 'spaces'; did you mean 'space'?"),
        ({"space": {}}, "space is empty"),
        ({"space": {"optim.lr": {**LR, "low": 1}}}, "config key 'space.optim.lr': low 1 must be below high 0.01"),
        ({"space": {"optim.lr": {**LR, "low": -1}}}, "must be above 0 where log is true"),
        ({"space": {"optim.lr": {**DECAY, "values": [1, 1]}}}, "has one twice"),
        ({"space": {"optim.lr": {**LR, "values": [1]}}}, "has low and high, and no values"),
        ({"space": {"optim.warmup_steps": {"type": "int", "low": 0.5, "high": 3}}}, "must be whole"),
        ({"space": {"optim.lr": {**LR, "type": "flaot"}}}, "allowed: float, int, categorical; did you mean 'float'?"),
        ({"space": {"optim.lr": {"type": "float", "low": -1, "high": 1}}}, "space allows optim.lr=-1.0, but config key 'optim': lr -1.0"),
        ({"space": {"model.net.heads": {"type": "categorical", "values": [2, 5]}}}, "space allows model.net.heads=5, but config key"),
        ({"space": {"optim.lr": {"type": "categorical", "values": ["fast"]}}}, "expected float"),
        ({"space": {"trainer.micro_batch": {"type": "int", "low": 1, "high": 4}}}, "trainer.micro_batch=3, but trainer.global_batch 8"),
        ({"metric": "train/loss"}, "must be a figure of validation"),
        ({"trials": None}, "never ends by itself"),
        ({"sampler": {"kind": "grid"}}, "a grid has no end along 'optim.lr'"),
        ({"sampler": {"kind": "grid"}, "space": {"optim.weight_decay": DECAY}, "trials": 4}, "more than the grid's 3 points"),
        ({"pruner": {"kind": "asha"}}, "min_steps 0 must be >= 1"),
        ({"pruner": {"kind": "asha", "min_steps": 2}, "overrides": []}, "sees nothing before the end"),
        ({"gpus": 3}, "trainer.global_batch 8 is not divisible by micro_batch 2 x 3 ranks"),
        ({"gpus": 4}, "gpus 4 a trial, but 0 are visible"),
        ({"overrides": ["trainer.step=3"]}, "unknown config key 'trainer.step'"),
        ({"overrides": ["data.shards=nowhere"]}, "no readable index.json"),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_anything_starts(
    make: Make, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(G3nError) as caught:
        sweep(make(**changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("name", ["dit", "decoder", "mae", "tiny/dit"])
def test_shipped_sweeps_vary_keys_that_exist_within_what_a_config_allows(name: str) -> None:
    from g3n.config import to_plain
    from g3n.engine.checkpoint import flat
    from g3n.sweep import plan

    loaded = load_sweep(f"configs/sweeps/{name}.yaml")
    config = load_config(loaded.config, loaded.overrides)
    base = json.loads(json.dumps(to_plain(config)))
    assert set(loaded.space) <= set(flat(base))
    for chosen in corners(loaded.space):
        plan.trial_config(loaded, base, 0, chosen)
    assert config.trainer.eval_every <= max(loaded.pruner.min_steps, 1) < config.trainer.steps


def test_dimensions_give_their_points_and_corners() -> None:
    steps = Dimension("int", 5, 30, step=5)
    assert steps.points() == steps.corners() == [5, 10, 15, 20, 25, 30]
    assert Dimension("int", 1, 1000).corners() == [1, 1000]
    assert Dimension("float", 0.0, 0.3, step=0.1).points() == pytest.approx([0, 0.1, 0.2, 0.3])
    assert Dimension("float", 0.1, 0.3).points() is None
    lists = Dimension("categorical", values=((8, 4), (16, 8), "none"))
    assert lists.value(lists.corners()[1]) == (16, 8)
    assert len(list(corners({"a": steps, "b": lists}))) == 18
    many = {str(i): Dimension("int", 1, 16) for i in range(5)}
    assert len(list(corners(many))) == 2048


def test_proposals_are_a_function_of_seed_number_and_history(make: Make) -> None:
    plan = make_plan(load_sweep(make()))
    distributions = {key: dimension.distribution() for key, dimension in plan.sweep.space.items()}

    def history(values: Sequence[float]) -> list[Any]:
        trials = []
        for number, value in enumerate(values):
            chosen = study.propose(plan.sweep, trials, number)
            trials.append(optuna.trial.create_trial(params=chosen, distributions=distributions, value=value))
        return trials

    first, second = history([3.0, 1.0, 2.0, 4.0, 0.5]), history([3.0, 1.0, 2.0, 4.0, 0.5])
    assert [t.params for t in first] == [t.params for t in second]
    assert len({t.params["optim.lr"] for t in first}) == 5
    other = history([1.0, 3.0, 0.1, 4.0, 0.5])
    assert [t.params for t in other[:3]] == [t.params for t in first[:3]]  # drawn at random
    assert [t.params for t in other[3:]] != [t.params for t in first[3:]]  # tpe looks
    running = optuna.trial.create_trial(state=TrialState.RUNNING, params=first[0].params, distributions=distributions)
    assert study.propose(plan.sweep, [*first, running], 6) == study.propose(plan.sweep, first, 6)


def test_a_sweep_ends_with_its_best_trial_as_a_config(make: Make, tmp_path: Path) -> None:
    assert sweep(make(parallel=2, trials=5)) == 0
    rows = table(tmp_path)
    assert [row["state"] for row in rows] == ["complete"] * 5
    for row in rows:  # the law of the stand-in at its last step
        expected = abs(np.log10(float(row["optim.lr"])) + 3) + float(row["optim.weight_decay"]) + 1 / 8
        assert float(row["value"]) == pytest.approx(expected)
        assert (row["step"], row["deaths"]) == ("8", "0")
    best = min(rows, key=lambda row: float(row["value"]))
    config = load_config(tmp_path / "study" / "best.yaml")
    assert config.optim.lr == float(best["optim.lr"])
    assert config.optim.weight_decay == float(best["optim.weight_decay"])
    assert config.trainer.steps == 8
    assert config.folder.name == "study-best"
    for name in ("sweep.png", "parallel_coordinates.png", "importance.png"):
        assert (tmp_path / "study" / name).stat().st_size > 5000
    starts = [(tmp_path / "study" / f"trial_{i:04d}" / "starts").read_text() for i in range(5)]
    assert starts == ["x"] * 5
    assert sweep(make(parallel=2, trials=5)) == 0  # nothing is left to do
    assert outcome(table(tmp_path)) == outcome(rows)


def test_a_grid_is_walked_once_through(make: Make, tmp_path: Path) -> None:
    space = {"optim.weight_decay": DECAY, "optim.warmup_steps": {"type": "int", "low": 1, "high": 3, "step": 2}}
    assert sweep(make(space=space, sampler={"kind": "grid"}, trials=None)) == 0
    found = [(float(row["optim.weight_decay"]), int(row["optim.warmup_steps"])) for row in table(tmp_path)]
    assert found == [(d, w) for d in (0.0, 0.1, 0.3) for w in (1, 3)]


PRUNED = {"pruner": {"kind": "asha", "min_steps": 2, "factor": 2}, "sampler": {"kind": "random"}, "trials": 8}


@pytest.fixture(scope="module")
def undisturbed(cohort: Path) -> list[dict[str, str]]:
    """The same sweep by a driver that nobody kills."""
    path = cohort / "calm.yaml"
    path.write_text(write_yaml({**BASE, "config": f"{cohort}/mae.yaml", "runs": str(cohort / "calm"), **PRUNED}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setattr(drive_module, "_POLL_SECONDS", 0.02)
        patch.setattr(results, "draw", lambda _, sweep: sweep.folder / "study.csv")
        patch.setattr(results, "_optuna_pictures", lambda *_: [])
        assert sweep(path) == 0
    return outcome(table(cohort / "calm"))


def test_asha_ends_what_is_not_among_the_best_half_at_a_rung(cohort: Path, undisturbed: list[dict[str, str]]) -> None:
    """With the law of the stand-in a trial's order among others is the same at every step, so each rung can be worked out."""
    rows = undisturbed
    reached: dict[int, list[float]] = {2: [], 4: [], 8: []}
    for row in rows:
        law = abs(np.log10(float(row["optim.lr"])) + 3) + float(row["optim.weight_decay"])
        end = 8
        for step in (2, 4):
            reached[step].append(law)
            if sorted(reached[step]).index(law) >= max(1, len(reached[step]) // 2):
                end = step
                break
        assert (row["state"], int(row["step"])) == ("complete" if end == 8 else "pruned", end)
        assert float(row["value"]) == pytest.approx(law + 1 / end)
    assert {row["state"] for row in rows} == {"complete", "pruned"}
    best = min((row for row in rows if row["state"] == "complete"), key=lambda row: float(row["value"]))
    assert load_config(cohort / "calm" / "study" / "best.yaml").optim.lr == float(best["optim.lr"])


def test_hyperband_prunes_too(make: Make, tmp_path: Path) -> None:
    assert sweep(make(**{**PRUNED, "pruner": {"kind": "hyperband", "min_steps": 2, "factor": 2}, "trials": 6})) == 0
    assert {row["state"] for row in table(tmp_path)} == {"complete", "pruned"}


def drive(path: Path, *words: str) -> int:
    """A driver in a process of its own; its id."""
    pid = os.fork()
    if not pid:
        try:
            os._exit(sweep(path, *words))
        except BaseException:
            os._exit(99)
    return pid


def wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def die_after(writes: int) -> None:
    """This process, a driver, is killed right after so many writes to the study."""
    done: list[str] = []

    def deadly(write: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = write(*args, **kwargs)
            done.append(write.__name__)
            if len(done) == writes:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    study.add_trial = deadly(study.add_trial)
    optuna.Study.tell = deadly(optuna.Study.tell)  # type: ignore[method-assign]
    for name in ("report", "set_user_attr", "should_prune"):
        setattr(optuna.trial.Trial, name, deadly(getattr(optuna.trial.Trial, name)))


def test_drivers_killed_again_and_again_lose_and_double_nothing(
    make: Make, tmp_path: Path, undisturbed: list[dict[str, str]]
) -> None:
    """Drivers live for one, two and three writes to the study in turn, so that one dies between any two."""
    path, lives = make(**{**PRUNED, "trials": 6}), 0
    code = -signal.SIGKILL
    while code == -signal.SIGKILL:
        assert lives < 60
        pid = os.fork()
        if not pid:
            try:
                die_after(1 + lives % 3)
                os._exit(sweep(path))
            except BaseException:
                os._exit(99)
        lives += 1
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 0
    assert lives > 10
    assert outcome(table(tmp_path)) == undisturbed[:6]
    assert all(row["deaths"] == "0" for row in table(tmp_path))
    assert not any(Process(run).alive() for run in (tmp_path / "study").glob("trial_*"))


@pytest.mark.parametrize("ends", [False, True], ids=["trains on", "ends before"])
def test_a_training_that_a_killed_driver_left_is_found_and_not_doubled(make: Make, tmp_path: Path, ends: bool) -> None:
    """Also where it has finished by the time somebody looks."""
    path, folder = make(trials=2), tmp_path / "study"
    folder.mkdir()
    (folder / "slow.txt").write_text("0.15")
    pid = drive(path)
    metrics = folder / "trial_0000" / "metrics.jsonl"
    wait_for(lambda: metrics.is_file() and metrics.read_text().count("\n") >= 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    left = Process(folder / "trial_0000")
    assert left.alive()
    assert left.gpus() == []
    if ends:
        wait_for(lambda: not left.alive())
    assert sweep(path) == 0
    assert (folder / "trial_0000" / "starts").read_text() == "x"
    assert [(row["state"], row["deaths"]) for row in table(tmp_path)] == [("complete", "0")] * 2
    with pytest.raises(G3nError, match="holds a study of another plan"):
        sweep(make(trials=2, metric="val/other"))


def test_a_killed_trial_goes_on_from_its_checkpoint_a_few_times(make: Make, tmp_path: Path) -> None:
    path, folder = make(trials=1, retries=2), tmp_path / "study"
    folder.mkdir()
    (folder / "slow.txt").write_text("0.15")
    pid = drive(path)
    run = folder / "trial_0000"
    for turn in range(2):
        wait_for(lambda turn=turn: len(list(run.glob("ckpt/*/COMPLETE"))) >= turn + 1)
        wait_for(Process(run).alive)
        Process(run).kill()
        wait_for(lambda turn=turn: (run / "starts").read_text() == "x" * (turn + 2))
    assert os.waitpid(pid, 0)[1] == 0
    (row,) = table(tmp_path)
    assert (row["state"], row["step"], row["deaths"]) == ("complete", "8", "2")
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6, 8]


def test_a_trial_that_is_killed_too_often_fails_and_the_sweep_goes_on(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deadly(run: Path, *words: Any) -> Any:
        child = sweeps.stand_in(run, *words)
        if run.name == "trial_0001":
            os.killpg(child.pid, signal.SIGKILL)
        return child

    assert run_sweep(load_sweep(make(trials=3, retries=1)), "again", deadly) == 0
    rows = table(tmp_path)
    assert [row["state"] for row in rows] == ["complete", "fail", "complete"]
    assert rows[1]["deaths"] == "2"
    assert "ended with -9 at step 0, 2 times" in rows[1]["reason"]


def test_a_mistake_that_every_trial_makes_ends_the_sweep_with_its_words(make: Make, tmp_path: Path) -> None:
    (tmp_path / "study").mkdir()
    (tmp_path / "study" / "fail.txt").write_text("no memory for trainer.micro_batch")
    with pytest.raises(
        G3nError, match=r"the first 3 trials of '.*study' failed; the last: no memory for trainer.micro_batch"
    ):
        sweep(make())
    assert not (tmp_path / "study" / "trial_0003").exists()


def test_a_metric_that_is_not_measured_ends_the_sweep_and_its_training(make: Make, tmp_path: Path) -> None:
    with pytest.raises(G3nError, match="metric 'val/maskd' is not measured; did you mean 'val/masked'"):
        sweep(make(metric="val/maskd"))
    assert not Process(tmp_path / "study" / "trial_0000").alive()


def test_ctrl_c_leaves_checkpoints_and_the_same_command_goes_on(
    make: Make, tmp_path: Path, undisturbed: list[dict[str, str]]
) -> None:
    path, folder = make(**PRUNED), tmp_path / "study"
    folder.mkdir()
    (folder / "slow.txt").write_text("0.3")
    pid = drive(path)
    wait_for((folder / "trial_0000" / "metrics.jsonl").is_file)
    time.sleep(0.5)
    os.kill(pid, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    assert not Process(folder / "trial_0000").alive()
    assert list(folder.glob("trial_0000/ckpt/*/COMPLETE"))
    (folder / "slow.txt").unlink()
    assert sweep(path) == 0
    assert outcome(table(tmp_path)) == undisturbed


def test_another_plan_in_the_same_folder_is_refused_and_more_trials_are_not(make: Make, tmp_path: Path) -> None:
    assert sweep(make(trials=2)) == 0
    first = outcome(table(tmp_path))
    with pytest.raises(
        G3nError, match=r"another plan \(config.trainer.steps: 8 -> 6\); set it back or give another name"
    ):
        sweep(make(overrides=["trainer.steps=6", "trainer.eval_every=2", "trainer.save_every=2"]))
    assert sweep(make(trials=3, parallel=2, retries=5)) == 0
    assert outcome(table(tmp_path))[:2] == first
    assert len(table(tmp_path)) == 3


def test_the_cpu_is_not_asked_for_where_ranks_would_take_gpus(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(G3nError, match="gpus 0 is for machines without a GPU; here are 1"):
        sweep(make())
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1,GPU-2")
    with pytest.raises(G3nError, match="names 'GPU-1', but deepspeed takes numbers alone"):
        sweep(make(gpus=1))


def test_gpus_are_given_to_one_trial_each(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,9")
    seen: list[tuple[str, str]] = []

    def launch(run: Path, words: Sequence[str], environment: Mapping[str, str], log: Path) -> Any:
        seen.append((run.name, environment["CUDA_VISIBLE_DEVICES"]))
        assert "--num_gpus" not in words
        return sweeps.stand_in(run, words, environment, log)

    assert run_sweep(load_sweep(make(gpus=2, parallel=8, trials=2)), "again", launch) == 0
    assert sorted(seen) == [("trial_0000", "4,5"), ("trial_0001", "6,7")]
    assert Process(tmp_path / "study" / "trial_0001").gpus() == ["6", "7"]


def test_mlflow_is_filled_in_later_where_it_was_away(make: Make, tmp_path: Path) -> None:
    """Nothing was tracked; the same command with tracking, twice, gives the study and its trials once."""
    from mlflow.tracking import MlflowClient

    assert sweep(make(trials=2)) == 0
    for _ in range(2):
        assert sweep(make(trials=2, overrides=[*BASE["overrides"], "tracking.mlflow=true"])) == 0
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("g3n").experiment_id])
    (parent,) = [r for r in runs if r.info.run_name == "study"]
    children = sorted((r for r in runs if r is not parent), key=lambda r: r.info.run_name)
    assert [r.info.run_name for r in children] == ["trial_0000", "trial_0001"]
    rows = table(tmp_path)
    for child, row in zip(children, rows, strict=True):
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert (child.info.status, child.data.tags["g3n.state"]) == ("FINISHED", "complete")
        history = client.get_metric_history(child.info.run_id, "val/masked")
        assert [m.step for m in history] == [2, 4, 6, 8]
        assert history[-1].value == pytest.approx(float(row["value"]))
    assert len(client.get_metric_history(parent.info.run_id, "val/masked")) == 2
    assert parent.info.status == "FINISHED"


def test_a_tail_gives_new_rows_once_and_all_again_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.rows() == []
    path.write_text('{"step": 1}\n{"st')
    assert tail.rows() == [{"step": 1}]
    with open(path, "a") as file:
        file.write('ep": 2}\n')
    assert tail.rows() == [{"step": 2}]
    (tmp_path / "part").write_text('{"step": 1}\n')
    (tmp_path / "part").replace(path)
    assert tail.rows() == [{"step": 1}]


def test_the_command_of_a_trial_is_a_users(tmp_path: Path) -> None:
    words = process.command(tmp_path / "trial.yaml", 2, False)
    assert Path(words[0]).name == "deepspeed"
    assert words[5:7] == ["--num_gpus", "2"]
    assert Path(words[7]).parts[-2:] == ("g3n", "train.py")
    assert words[8:] == ["--config", str(tmp_path / "trial.yaml"), "--resume", "auto"]
