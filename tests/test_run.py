import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cifar.run import Run, RunError, environment, find_runs
from cifar.signals import Interrupted


def test_result_is_running_then_finished(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    with run.recording(seed=3, overrides=["seed=3"]) as result:
        running = json.loads((tmp_path / "run" / "result.json").read_text())
        assert (running["status"], running["seed"], running["overrides"], running["error"]) == (
            "running",
            3,
            ["seed=3"],
            None,
        )
        result["steps"] = 7
    finished = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (finished["status"], finished["steps"]) == ("finished", 7)
    assert set(finished) == {
        "status", "error", "overrides", "config_hash", "seed", "metrics", "best", "epochs", "steps", "seconds",
        "images_per_second", "environment", "wandb",
    }  # fmt: skip
    assert set(finished["seconds"]) == {"total", "train", "eval"}


def test_a_failure_is_recorded_with_its_traceback(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with pytest.raises(ZeroDivisionError), run.recording():
        1 / 0  # noqa: B018
    result = run.result()
    assert result["status"] == "failed"
    assert "ZeroDivisionError: division by zero" in result["error"]
    assert "ZeroDivisionError" in (tmp_path / "train.log").read_text()


def test_an_interruption_is_recorded_in_a_line(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with pytest.raises(KeyboardInterrupt), run.recording():
        raise Interrupted(signal.SIGTERM, "at step 5")
    assert (run.result()["status"], run.result()["error"]) == ("failed", "stopped by SIGTERM at step 5")


def test_rows_round_trip_and_a_cut_line_is_left_out(tmp_path: Path) -> None:
    run = Run(tmp_path)
    rows = [
        {"step": 1, "train/loss": 0.5},
        {"step": 2, "train/loss": math.nan, "val/accuracy": 0.25},
        {"step": 3, "lr": 1.0},
    ]
    for row in rows:
        run.log(row)
    with run.metrics.open("a") as file:
        file.write('{"step": 4, "tra')
    assert run.rows() == [rows[0], rows[1] | {"train/loss": None}, rows[2]]
    assert run.last_values() == {"train/loss": None, "val/accuracy": 0.25, "lr": 1.0}
    run.keep_rows(2)
    run.log({"step": 3})
    assert [row["step"] for row in run.rows()] == [1, 2, 3]


def test_checkpoint_is_the_best_else_the_last(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with pytest.raises(RunError, match="no checkpoint in it"):
        _ = run.checkpoint
    run.last.parent.mkdir()
    run.last.touch()
    assert run.checkpoint == run.last
    run.best.touch()
    assert run.checkpoint == run.best


def test_find_runs_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("sweep/10", "sweep/2", "sweep/0", "single"):
        (tmp_path / name / ".hydra").mkdir(parents=True)
    (tmp_path / "sweep" / "wandb").mkdir()
    assert [run.dir.name for run in find_runs([tmp_path / "sweep"])] == ["0", "2", "10"]
    assert [run.dir.name for run in find_runs([tmp_path])] == ["single", "0", "2", "10"]
    assert [
        run.dir.name for run in find_runs([tmp_path / "single", tmp_path / "single", tmp_path / "sweep" / "2"])
    ] == ["single", "2"]
    with pytest.raises(RunError, match=r"nowhere: no such folder"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(RunError, match=r"wandb: no run in it"):
        find_runs([tmp_path / "sweep" / "wandb"])


def test_environment_names_machine_versions_and_commit() -> None:
    found = environment(torch.device("cpu"))
    assert found["device"] == "cpu"
    assert found["torch"] == torch.__version__
    assert found["python"] == sys.version.split()[0]
    assert f"{torch.get_num_threads()} threads" in found["device_name"]
    here = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    if here.returncode == 0:
        assert found["git_commit"] == here.stdout.strip()
        assert isinstance(found["git_dirty"], bool)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"not a run's folder"):
        Run(tmp_path).settings()
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(RunError, match=r"result\.json: not readable as JSON"):
        Run(tmp_path).result()
