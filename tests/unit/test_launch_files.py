"""docs/launch: scripts that parse, name what exists, and come back until a run is finished."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from g3n.train import load_config, parse
from tests import nano
from tests.launch import ROOT, environment

FOLDER = ROOT / "docs" / "launch"
SCRIPTS = sorted([*FOLDER.glob("*.sh"), *FOLDER.glob("*.sbatch")])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse_and_name_configs_that_exist(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = path.read_text()
    assert "set -euo pipefail" in text
    for config in re.findall(r"configs/[\w/]+\.yaml", text):
        assert load_config(ROOT / config).name
    for script in re.findall(r"(?:docs/launch/\w+\.py|g3n/\w+\.py)", text):
        assert (ROOT / script).is_file()


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.sbatch")), ids=lambda p: p.name)
def test_batch_scripts_are_warned_in_time_and_start_one_task_a_gpu(path: Path) -> None:
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", path.read_text(), re.M))
    assert options["signal"] == "USR1@180"  # to the tasks, not to the script (B:)
    assert options["ntasks-per-node"] == options["gpus-per-node"]


def test_the_kubernetes_job_has_what_its_ranks_need() -> None:
    service, job = yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text())
    assert (service["kind"], service["spec"]["clusterIP"]) == ("Service", "None")
    spec = job["spec"]
    assert (job["apiVersion"], job["kind"], spec["completionMode"]) == ("batch/v1", "Job", "Indexed")
    pod = spec["template"]["spec"]
    [container] = pod["containers"]
    command = container["command"]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert f"--master_addr={job['metadata']['name']}-0.{pod['subdomain']}" in command
    assert f"--nnodes={spec['completions']}" in command
    assert spec["completions"] == spec["parallelism"]
    assert f"--nproc_per_node={container['resources']['limits']['nvidia.com/gpu']}" in command
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    words = command[command.index("g3n/train.py") + 1 :]
    args = parse(words)
    config = load_config(ROOT / args.config, args.overrides)
    mounts = {m["mountPath"]: m.get("readOnly", False) for m in container["volumeMounts"]}
    assert mounts[config.runs] is False
    assert str(config.data.shards).startswith("/data")


def test_the_hostfile_is_read_by_deepspeed() -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    assert fetch_hostfile(str(FOLDER / "hostfile")) == {"gpu001": 8, "gpu002": 8}


def test_a_batch_job_comes_back_until_its_run_is_finished(tmp_path: Path) -> None:
    """srun and scontrol are pretended; the training is real. It is warned in its third step, comes back, and finishes."""
    nano.shards(tmp_path / "shards")
    config = nano.configs(tmp_path)["mae"]
    tools = tmp_path / "bin"
    tools.mkdir()
    log = tmp_path / "requeued"
    scripts = {
        # srun passes SIGUSR1 on to its tasks, as SLURM does
        "srun": f'shift\n"$@" & task=$!\nif [ ! -e {log} ]; then\n'
        f'  while [ "$(grep -c train/loss {tmp_path}/runs/mae/metrics.jsonl 2>/dev/null || echo 0)" -lt 3 ]; do sleep 0.1; done\n'
        "  kill -USR1 $task\nfi\nwait $task",
        "scontrol": f'echo "$@" >> {log}',
    }
    for name, text in scripts.items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tools / name).chmod(0o755)
    env = environment()
    env |= {"PATH": f"{tools}{os.pathsep}{env['PATH']}", "CONFIG": str(config), "SLURM_JOB_ID": "77"}
    line = ["bash", str(FOLDER / "slurm.sbatch"), "trainer.steps=300", "trainer.save_every=300", "trainer.panels=false"]
    first = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert first.returncode == 0, first.stdout[-2000:] + first.stderr[-2000:]
    assert "stopped by SIGUSR1" in first.stdout
    assert log.read_text() == "requeue 77\n"
    second = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert second.returncode == 0, second.stdout[-2000:] + second.stderr[-2000:]
    assert second.stdout.rstrip().endswith("finished")
    assert log.read_text() == "requeue 77\n"  # not again


def test_finished_says_no_for_a_run_that_never_began(tmp_path: Path) -> None:
    nano.shards(tmp_path / "shards")
    line = [sys.executable, str(FOLDER / "finished.py"), "--config", str(nano.configs(tmp_path)["mae"])]
    assert subprocess.run(line, env=environment(), capture_output=True).returncode == 1
