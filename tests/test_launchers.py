"""The same sweep by every launcher, each really run on this machine: the same table, whoever ran the jobs.

Takes about a minute of one core: `pytest -m slow tests/test_launchers.py`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cifar import checkpoint
from cifar.run import Run
from tests.conftest import REPOSITORY, Command, read_rows

QUICK = ["data=digits", "model=mlp", "model.widths=[8]", "data.image_size=8", "trainer.device=cpu", "logger=none"]
SWEEP = ["-m", *QUICK, "trainer.epochs=1", "optimizer.lr=0.1,-1,0.01", "data.batch_size=64,128"]
LAUNCHERS = {
    "basic": [],
    "submitit": ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=5"],
    "ray": ["hydra/launcher=ray_local", "hydra.launcher.ray.init.num_cpus=2"],
}
TIMES = ("dir", "seconds", "images_per_second")


def table(command: Command, folder: str) -> dict:
    """What `compare --json` says of a sweep, but for where it lies and how long it took."""
    compared = json.loads(command("compare", folder, "--json").stdout)
    for run in compared["runs"]:
        for key in TIMES:
            run.pop(key, None)
            run["metrics"].pop(key, None)
    for group in compared["groups"]:
        for key in ("dirs", *TIMES):
            group.pop(key, None)
    return compared


@pytest.mark.slow
def test_every_launcher_gives_the_same_table(command: Command, tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="needs pip install 'cifar[ray]'")
    tables = {}
    for name, launcher in LAUNCHERS.items():
        done = command("train", *SWEEP, *launcher, f"hydra.sweep.dir={name}", timeout=280)
        assert done.returncode == 1, done.stderr  # two of the six jobs ask for a negative learning rate
        assert "6 runs, ranked by best validation accuracy" in done.stdout, name
        assert "optimizer.lr=-1: must be greater than or equal to 0" in done.stderr
        results = [Run(tmp_path / name / str(number)).result() for number in range(6)]
        assert [result["status"] for result in results] == ["finished"] * 2 + ["failed"] * 2 + ["finished"] * 2
        tables[name] = table(command, name)
    assert tables["submitit"] == tables["basic"]
    assert tables["ray"] == tables["basic"]


@pytest.mark.slow
def test_a_preempted_job_saves_and_goes_on_when_it_is_requeued(command: Command, tmp_path: Path) -> None:
    """SIGUSR2 is how SLURM, told so by submitit, announces the end of a job's time or its place to another."""
    sweep = ["-m", *QUICK, "trainer.epochs=40", "seed=0", "trainer.log_every=5"]
    assert command("train", *sweep, "hydra.sweep.dir=whole").returncode == 0
    process = subprocess.Popen(
        [sys.executable, "-m", "cifar.train", *sweep, "hydra.sweep.dir=sweep", *LAUNCHERS["submitit"]],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    job = tmp_path / "sweep" / "0"
    while not (job / "metrics.jsonl").exists() or not read_rows(job):  # it is there, empty, before the first step
        assert process.poll() is None
        time.sleep(0.02)
    [controller] = [path.name.split("_")[0] for path in (tmp_path / "sweep" / ".submitit").glob("*/*_submitted.pkl")]
    children = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGUSR2)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    said = (job / "train.log").read_text()
    assert said.count("stopped by SIGUSR2 at ") == 1, said
    whole, survived = (Run(tmp_path / name / "0") for name in ("whole", "sweep"))
    assert survived.result()["status"] == "finished"
    states = [checkpoint.load(run.last) for run in (whole, survived)]
    for key in ("model", "optimizer", "rows", "step", "best"):
        assert checkpoint.digest(states[0][key]) == checkpoint.digest(states[1][key]), key
    assert len(read_rows(whole.dir)) == len(read_rows(survived.dir))
