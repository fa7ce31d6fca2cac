import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cifar import logger
from cifar.run import Job

SETTINGS = {"seed": 3, "optimizer": {"lr": 0.1}, "data": {"root": str(Path.home() / "images")}}


def summary(folder: Path) -> dict:
    (run,) = (folder / "wandb").glob("offline-run-*")
    command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--summary", "--json", str(run)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)


def test_an_offline_run_is_read_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    job = Job(tmp_path, ["optimizer.lr=0.1", "+note=a=b"])
    with caplog.at_level("INFO"), logger.wandb(job, SETTINGS, None, mode="auto", project="p", tags=["t"]) as log:
        for step, accuracy, loss in ((1, 0.5, 1.0), (2, 0.75, 0.5), (3, 0.25, 0.75)):
            log.log({"epoch": 1, "step": step, "val/accuracy": accuracy, "val/loss": loss})
        info = log.info
    assert (info["mode"], Path(info["dir"]).name.endswith(info["id"])) == ("offline", True)
    assert f"wandb sync {tmp_path}/wandb/offline-run-*" in caplog.text
    run = summary(tmp_path)
    assert (run["project"], run["tags"], run["run_id"], run["state"]) == ("p", ["t"], info["id"], "finished")
    assert run["config"]["optimizer"] == {"lr": 0.1}
    assert run["config"]["overrides"] == {"optimizer.lr": "0.1", "note": "a=b"}
    assert run["config"]["data"]["root"] == "~/images"
    assert run["summary"]["val/accuracy"] == {"max": 0.75, "last": 0.25}
    assert run["summary"]["val/loss"] == {"min": 0.5, "last": 0.75}


def test_a_resumed_run_keeps_its_id(tmp_path: Path) -> None:
    with logger.wandb(Job(tmp_path), {}, "abcd1234", mode="offline") as log:
        assert log.info["id"] == "abcd1234"


def test_auto_is_online_only_with_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    assert logger._mode(wandb) == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert logger._mode(wandb) == "disabled"
    monkeypatch.delenv("WANDB_MODE")
    done = subprocess.run(
        [sys.executable, "-c", "import wandb; from cifar.logger import _mode; print(_mode(wandb))"],
        env=os.environ | {"WANDB_API_KEY": "f" * 40}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stdout.strip().splitlines()[-1] == "online", done.stderr


def test_none_has_no_trace(tmp_path: Path) -> None:
    with logger.none(Job(tmp_path), SETTINGS, None) as log:
        log.log({"step": 1})
        assert log.info is None
    assert list(tmp_path.iterdir()) == []


def test_the_command_to_upload_can_be_copied_into_a_shell(tmp_path: Path) -> None:
    folders = [tmp_path / "it's a sweep" / "wandb" / f"offline-run-{number}" for number in range(2)]
    for folder in folders:
        folder.mkdir(parents=True)
    line = logger.sync_command(tmp_path / "it's a sweep").replace("wandb sync", "printf '%s\\n'")
    assert subprocess.run(line, shell=True, capture_output=True, text=True, check=True).stdout.splitlines() == list(
        map(str, folders)
    )
