"""Sweeps, in processes of their own: folders, W&B's offline runs, the table, failures."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cifar.sweep import arguments_of_resumed_run
from tests.conftest import REPOSITORY, Command

QUICK = ["data=digits", "model=mlp", "model.widths=[8]", "data.image_size=8", "trainer.device=cpu", "trainer.epochs=1"]


def offline_runs(folder: Path) -> list[dict]:
    """What W&B itself reads from the offline runs under a folder, as its own records."""
    found = []
    for run in sorted((folder / "wandb").glob("offline-run-*")):
        listed = subprocess.run(
            [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(run)],
            capture_output=True, text=True, check=True, timeout=60, env=os.environ | {"WANDB_ERROR_REPORTING": "false"},
        )  # fmt: skip
        summarized = subprocess.run(
            [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--summary", "--json", str(run)],
            capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        found.append({"records": listed.stdout, **json.loads(summarized.stdout)})
    return found


def test_a_grid_of_eight(command: Command, tmp_path: Path) -> None:
    done = command("train", *QUICK, "hparams_search=lr_momentum_batch", "hydra.sweep.dir=sweeps/grid", timeout=280)
    assert done.returncode == 0, done.stderr
    sweep = tmp_path / "sweeps" / "grid"
    results = [json.loads((sweep / str(number) / "result.json").read_text()) for number in range(8)]
    assert all(result["status"] == "finished" for result in results)
    settings = {
        tuple(item for item in result["overrides"] if re.match(r"optimizer|data\.batch", item)) for result in results
    }
    assert len(settings) == 8

    # In a log file: a line when a job ends, and no more for jobs that take seconds.
    lines = [line for line in done.stdout.splitlines() if re.match(r"job \d", line)]
    assert [line.partition(",")[0] for line in lines] == [f"job {number}" for number in range(8)]
    assert "8 of 8 jobs done" in lines[-1]
    assert "epoch 1/1" not in done.stdout

    # The table at the end: one row a job, ranked by validation, only what differs.
    table = done.stdout[done.stdout.index("8 runs, ranked by best validation") :].splitlines()[1:11]
    header, *rows = [line.split() for line in table if "──" not in line]
    assert {"rank", "job", "lr", "momentum", "batch_size"} <= set(header)
    assert len(rows) == 8
    assert "seed" not in header

    compared = json.loads(command("compare", "sweeps/grid", "--json").stdout)
    best = [run["best"]["value"] for run in compared["runs"]]
    assert best == sorted(best, reverse=True)
    assert best[0] == max(result["best"]["value"] for result in results)
    assert set(compared["runs"][0]["settings"]) == {"optimizer.lr", "optimizer.momentum", "data.batch_size"}
    by_csv = list(csv.DictReader(io.StringIO(command("compare", "sweeps/grid", "--csv").stdout)))
    assert [float(row["best/val/accuracy"]) for row in by_csv] == best

    runs = offline_runs(sweep)
    assert len(runs) == 8
    assert f"wandb sync {Path('sweeps/grid/wandb')}/offline-run-*" in done.stdout
    assert {run["run_id"] for run in runs} == {result["wandb"]["id"] for result in results}
    assert {run["config"]["job"] for run in runs} == set(range(8))
    for run in runs:
        result = results[run["config"]["job"]]
        assert run["state"] == "finished"
        assert run["config"]["sweep"] == "grid"
        assert run["config"]["overrides"]["optimizer.lr"] in ("0.1", "0.01")
        assert run["config"]["optimizer"]["lr"] == float(run["config"]["overrides"]["optimizer.lr"])
        assert run["summary"]["val/accuracy"]["max"] == result["best"]["value"]
        assert run["summary"]["val/accuracy"]["last"] == result["metrics"]["val/accuracy"]
        assert run["summary"]["test/accuracy"]["last"] == result["metrics"]["test/accuracy"]
        assert re.search(r'"run_?group": *"grid"', run["records"], re.IGNORECASE), "not in the sweep's group"


def test_failures_do_not_stop_the_others(command: Command, tmp_path: Path) -> None:
    done = command(
        "train",
        "-m",
        *QUICK,
        "logger=none",
        "hydra.sweep.dir=sweep",
        "optimizer.lr=0.1,-1,0.01",
        "data.batch_size=64,5000",
        timeout=200,
    )
    assert done.returncode == 1
    statuses = [json.loads((tmp_path / "sweep" / str(job) / "result.json").read_text())["status"] for job in range(6)]
    assert statuses == ["finished", "failed", "failed", "failed", "finished", "failed"]
    assert "6 runs, ranked by best validation accuracy" in done.stdout
    assert "report: sweep/report.html\n" in done.stdout
    assert "data.batch_size=5000" in (tmp_path / "sweep" / "report.html").read_text()
    for told in (
        "sweep/2: failed",
        "optimizer.lr=-1: must be greater than or equal to 0",
        "data.batch_size=5000",
        "Traceback",
    ):
        assert told in done.stderr


def test_no_trace_of_wandb_without_it(command: Command, tmp_path: Path) -> None:
    program = (
        "import sys; sys.argv = ['train.py', *sys.argv[1:]]\n"
        "from cifar.train import cli\ncli()\n"
        "sys.exit('wandb was imported' if 'wandb' in sys.modules else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *QUICK, "logger=none"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not [path for path in tmp_path.rglob("*") if "wandb" in path.name]
    assert "W&B" not in done.stdout


def test_a_resumed_run_replays_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "it's run"
    (run / ".hydra").mkdir(parents=True)
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.pt").touch()
    recorded = [
        "model=mlp",
        "optimizer.lr=0.1",
        "+x=1",
        "resume=auto",
        "hparams_search=lr_momentum_batch",
        "hydra.callbacks.x=1",
    ]
    (run / ".hydra" / "overrides.yaml").write_text("".join(f"- {item}\n" for item in recorded))
    resumed = arguments_of_resumed_run([f"resume={run}", "optimizer.lr=0.2", "model=net"])
    assert resumed[:-1] == [
        "+x=1",
        "optimizer.lr=0.2",
        "model=net",
        "resume=auto",
        f"hydra.run.dir='{tmp_path}/it\\'s run'",
    ]
    assert resumed[-1] == "hydra.mode=RUN"
    for untouched in (["resume=auto", "a=1"], ["resume=null"], ["a=1", "-m"]):
        assert arguments_of_resumed_run(untouched) == untouched
    with pytest.raises(ValueError, match=r"goes on with one run"):
        arguments_of_resumed_run(["-m", f"resume={run}"])
    with pytest.raises(ValueError, match=r"resume=nowhere: no checkpoint in it"):
        arguments_of_resumed_run(["resume=nowhere"])


def test_a_killed_job_does_not_take_the_others_down(command: Command, tmp_path: Path) -> None:
    """Five jobs in processes of their own: one raises, one exits with status 0, one is SIGKILLed; two finish."""
    (tmp_path / "saboteur.py").write_text(
        "import os, signal, sys\n\n\n"
        "def raises(logits, targets):\n    raise ArithmeticError('sabotage')\n\n\n"
        "def exits(logits, targets):\n    sys.exit(0)\n\n\n"
        "def killed(logits, targets):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    losses = "cifar.loss.mean_squared_error,saboteur.raises,saboteur.exits,saboteur.killed,cifar.loss.cross_entropy"
    sweep = [
        "-m",
        *QUICK,
        "logger=none",
        "hydra.sweep.dir=sweep",
        "hydra/launcher=submitit_local",
        "hydra.launcher.timeout_min=5",
    ]
    path = f"{REPOSITORY}{os.pathsep}{tmp_path}"
    done = command(
        "train", *sweep, "loss=mse", f"loss._target_={losses}", timeout=280, CIFAR_TARGETS="saboteur", PYTHONPATH=path
    )
    assert done.returncode != 0
    results = [json.loads((tmp_path / "sweep" / str(job) / "result.json").read_text()) for job in range(5)]
    assert [result["status"] for result in results] == ["finished", "failed", "failed", "running", "finished"]
    for told in ("ArithmeticError: sabotage", "SystemExit: 0", "sweep/3: running\nno word from it: killed?"):
        assert told in done.stderr
    assert "5 runs, ranked by" in done.stdout
