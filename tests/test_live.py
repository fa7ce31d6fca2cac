"""What a sweep shows while it runs, against folders as runs leave them and on a real pseudo-terminal."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from cifar.config import CONF
from cifar.live import PERIOD, View, clock, plan
from cifar.run import Run
from tests.conftest import REPOSITORY


def write(
    folder: Path, status: str, overrides: list[str], epochs: int = 10, rows: list[dict] | None = None, **more
) -> None:
    (folder / ".hydra").mkdir(parents=True, exist_ok=True)
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump({"trainer": {"epochs": epochs}}))
    result = {"status": status, "overrides": overrides, "best": None, "seconds": {"total": 0.0}} | more
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows or []))


def ended(epoch: int, seconds: float, accuracy: float, steps: int = 20) -> dict:
    return {
        "epoch": epoch,
        "step": steps * epoch,
        "seconds": seconds,
        "train/accuracy": 0.1,
        "val/accuracy": accuracy,
        "images_per_second": 1.0,
    }


def rows(table) -> list[list[str]]:
    return [list(cells) for cells in zip(*(column.cells for column in table.columns), strict=True)]


def test_time_left_of_a_job_and_of_the_sweep(tmp_path: Path) -> None:
    write(tmp_path / "0", "finished", ["optimizer.lr=1"])  # by an earlier start
    write(tmp_path / "1", "failed", ["optimizer.lr=2"])  # is run again
    view = View(tmp_path, 6, ["optimizer.lr"])
    view.started = 0.0
    view.look(0.0)
    assert view.footer(5.0) == "1 of 6 jobs done, 5 s gone"

    write(tmp_path / "1", "running", ["data=digits", "optimizer.lr=2"], rows=[ended(1, 10.0, 0.5), ended(2, 20.0, 0.6)])
    write(
        tmp_path / "2",
        "running",
        ["data=digits", "optimizer.lr=3"],
        rows=[{"epoch": 1, "step": 5, "seconds": 3.0, "train/accuracy": 0.25}],
    )
    view.look(100.0)
    # Job 1: 2 of 10 epochs in 20 s; job 2 knows no epoch's length yet.
    assert rows(view.table(100.0)) == [
        ["job 1", "optimizer.lr=2", "epoch 2/10", "accuracy 60.00%", "1:20 left"],
        ["job 2", "optimizer.lr=3", "epoch 1/10", "accuracy 25.00%", ""],
    ]
    assert rows(view.table(130.0))[0][-1] == "50 s left"
    # A whole job is 100 s: 80 of job 1, 100 of job 2 and 3 jobs to come, two at a time.
    assert view.left(100.0) == (80 + 100 + 3 * 100) / 2

    write(
        tmp_path / "1",
        "finished",
        ["optimizer.lr=2"],
        rows=[ended(10, 90.0, 0.6)],
        best={"value": 0.75},
        seconds={"total": 98.0},
    )
    write(tmp_path / "2", "failed", ["optimizer.lr=3"])
    write(
        tmp_path / "3",
        "running",
        ["optimizer.lr=4"],
        rows=[ended(5, 60.0, 0.5), {"epoch": 6, "step": 110, "seconds": 66.0, "train/accuracy": 0.9}],
    )
    view.look(200.0)
    assert rows(view.table(200.0)) == [["job 3", "optimizer.lr=4", "epoch 6/10", "accuracy 50.00%", "54 s left"]]
    # A whole job is (98 + 120) / 2 = 109 s: 54 of job 3 and two to come.
    assert view.footer(200.0) == f"3 of 6 jobs done, 1 failed, 3:20 gone, about {clock(54 + 2 * 109)} left"


def test_a_log_file_gets_few_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    view = View(tmp_path, 2, ["optimizer.lr"], ended=1)
    view.started = 0.0
    for second in range(100):  # an epoch each second
        write(tmp_path / "1", "running", ["optimizer.lr=2"], 200, [ended(second + 1, second + 1.0, 0.5)])
        view.say(float(second))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 100 // PERIOD
    assert (
        lines[0]
        == "job 1, optimizer.lr=2, epoch 31/200, accuracy 50.00%, 2:49 left; 1 of 3 jobs done, 30 s gone, about 6:09 left"
    )
    write(tmp_path / "1", "finished", ["optimizer.lr=2"], best={"value": 0.75}, seconds={"total": 100.0})
    for second in (100.0, 101.0):
        view.say(second)
    assert (
        capsys.readouterr().out
        == "job 1, optimizer.lr=2, finished, accuracy 75.00%, in 1:40; 2 of 3 jobs done, 1:40 gone, about 1:40 left\n"
    )


def test_newest_rows_reads_the_end_alone(tmp_path: Path) -> None:
    run = Run(tmp_path)
    assert run.newest_rows() == []
    for step in range(100):
        run.log({"step": step})
    assert run.newest_rows() == run.rows()
    assert run.newest_rows(size=41) == [{"step": 97}, {"step": 98}, {"step": 99}]
    with run.metrics.open("a") as file:
        file.write('{"step": 1')
    assert run.newest_rows(size=41)[-1] == {"step": 99}


@pytest.mark.parametrize(
    ("overrides", "jobs", "keys"),
    [
        (["optimizer.lr=0.1,0.2", "seed=range(3)", "data=digits"], 6, ["optimizer.lr", "seed"]),
        (["hparams_search=lr_momentum_batch"], 8, ["optimizer.lr", "optimizer.momentum", "data.batch_size"]),
        (["hparams_search=lr_momentum_batch", "optimizer.lr=1"], 4, ["optimizer.momentum", "data.batch_size"]),
        (["hparams_search=optuna_tpe"], 20, ["optimizer.lr", "optimizer.momentum", "data.batch_size"]),
    ],
)
def test_the_number_of_jobs(overrides: list[str], jobs: int, keys: list[str]) -> None:
    with initialize_config_dir(CONF, version_base="1.3"):
        choice = [item for item in overrides if item.startswith("hparams")]
        config = compose("config", overrides=choice, return_hydra_config=True)
    config.hydra.overrides.task = overrides
    found, varying = plan(config)
    assert found == jobs
    assert set(keys) <= set(varying)


def test_a_terminal_gets_a_line_a_job_in_place(tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    line = [
        "-m",
        "data=digits",
        "model=mlp",
        "model.widths=[16]",
        "data.image_size=8",
        "logger=none",
        "trainer.epochs=60",
        "optimizer.lr=0.1,0.01",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "cifar.train", *line], cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "TERM": "xterm"}, stdin=follower, stdout=follower, stderr=follower,
    )  # fmt: skip
    os.close(follower)
    shown = b""
    while True:
        try:
            shown += os.read(leader, 4096)
        except OSError:  # the other side closed
            break
    assert process.wait(timeout=60) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert re.search(
        r"job 0 +optimizer\.lr=0\.1 +epoch \d+/60 +accuracy \d+\.\d\d% +\d+ s left\r\n0 of 2 jobs done, \d+ s gone, about",
        text,
    )
    assert re.search(r"job 1 +optimizer\.lr=0\.01 +epoch \d+/60", text)
    assert "\x1b[1A" in shown.decode()  # drawn over, not below
    assert "it/s" not in text
    assert "step/s" not in text
    assert "epoch 1/60: train loss" not in text  # it is in the run's train.log
    assert "2 runs, ranked by best validation accuracy" in text
