"""The command as a user runs it, in a process of its own."""

import fcntl
import json
import logging
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
import yaml
from hydra.core.global_hydra import GlobalHydra

from cifar import checkpoint
from cifar.train import cli
from tests.conftest import REPOSITORY, Command, read_rows

QUICK = ["data=digits", "model=mlp", "model.widths=[16]", "data.image_size=8", "trainer.device=cpu", "logger=none"]


def only(folder: Path) -> Path:
    (found,) = [path for path in folder.iterdir() if path.is_dir()]
    return found


def test_a_run_leaves_its_folder(command: Command, tmp_path: Path) -> None:
    done = command("train", *QUICK, "trainer.epochs=3", "trainer.log_every=10", "optimizer.lr=0.1")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    run = only(tmp_path / "outputs")
    assert {path.name for path in run.iterdir()} == {
        ".hydra",
        "train.log",
        "metrics.jsonl",
        "checkpoints",
        "result.json",
    }
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    assert kept == {"last.pt", "best.pt", "step-0000000040.pt", "step-0000000060.pt"}

    rows = read_rows(run)
    assert [(row["epoch"], row["step"]) for row in rows] == [
        (1, 10),
        (1, 20),
        (2, 30),
        (2, 40),
        (3, 50),
        (3, 60),
        (3, 60),
    ]
    assert list(rows[0]) == ["epoch", "step", "seconds", "train/loss", "train/accuracy", "lr"]
    assert ["val/accuracy" in row for row in rows] == [False, True] * 3 + [False]
    assert "test/accuracy" in rows[-1]

    result = json.loads((run / "result.json").read_text())
    assert (result["status"], result["error"], result["seed"], result["epochs"], result["steps"]) == (
        "finished",
        None,
        0,
        3,
        60,
    )
    assert result["overrides"] == [*QUICK, "trainer.epochs=3", "trainer.log_every=10", "optimizer.lr=0.1"]
    assert result["metrics"]["test/accuracy"] == rows[-1]["test/accuracy"] > 0.5
    assert result["metrics"]["test/accuracy/3"] == rows[-1]["test/accuracy/3"]
    values = [row["val/accuracy"] for row in rows if "val/accuracy" in row]
    assert result["best"] == {"metric": "val/accuracy", "value": max(values), "epoch": values.index(max(values)) + 1}
    assert result["wandb"] is None
    assert result["images_per_second"] == pytest.approx(3 * 1258 / result["seconds"]["train"])
    assert result["seconds"]["total"] > result["seconds"]["train"] + result["seconds"]["eval"]

    saved = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    assert {"model", "optimizer", "ema"} <= set(saved)
    assert saved["data"]["classes"] == [str(label) for label in range(10)]
    assert "epoch 3/3: train loss" in (run / "train.log").read_text()
    assert "accuracy on the 359 test images" in done.stdout
    assert yaml.safe_load((run / ".hydra" / "config.yaml").read_text())["optimizer"]["lr"] == 0.1
    assert str(Path.home()) not in (run / "train.log").read_text()


def test_same_seed_same_run(command: Command, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        done = command("train", *QUICK, "trainer.epochs=1", f"seed={seed}", f"hydra.run.dir={name}", "augment=mixup")
        assert done.returncode == 0, done.stderr
    first, same, other = (checkpoint.load(tmp_path / name / "checkpoints" / "last.pt")["model"] for name in "abc")
    assert checkpoint.digest(first) == checkpoint.digest(same) != checkpoint.digest(other)


def test_resume_with_more_epochs_equals_one_go(command: Command, tmp_path: Path) -> None:
    settings = [*QUICK, "optimizer.momentum=0.9", "trainer.ema_decay=0.9", "trainer.log_every=7"]
    assert command("train", *settings, "trainer.epochs=3", "hydra.run.dir=whole").returncode == 0
    assert command("train", *settings, "trainer.epochs=1", "hydra.run.dir=parts").returncode == 0
    done = command("train", "resume=parts", "trainer.epochs=3")
    assert done.returncode == 0, done.stderr
    whole, parts = (checkpoint.load(tmp_path / name / "checkpoints" / "last.pt") for name in ("whole", "parts"))
    for key in ("model", "optimizer", "ema", "best", "step", "images"):
        assert checkpoint.digest(parts[key]) == checkpoint.digest(whole[key]), key
    timeless = [[{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in read_rows(tmp_path / name)]
                for name in ("whole", "parts")]  # fmt: skip
    assert timeless[1] == timeless[0]


def test_a_finished_run_is_not_overwritten(command: Command, tmp_path: Path) -> None:
    assert command("train", *QUICK, "trainer.epochs=1", "hydra.run.dir=run").returncode == 0
    before = (tmp_path / "run" / "result.json").read_bytes()
    done = command("train", *QUICK, "trainer.epochs=1", "hydra.run.dir=run", "seed=1")
    assert done.returncode != 0
    assert done.stderr == "error: hydra.run.dir=run holds a run already; resume=auto goes on with it\n"
    assert (tmp_path / "run" / "result.json").read_bytes() == before


BAD = [
    (["optimizer.lrr=1"], "optimizer.lrr"),
    (["model=nett"], "model=nett: no such choice; model can be mlp, net, resnet18"),
    (["optimizer.lr=abc"], "optimizer.lr=abc"),
    (["trainer.epochs=two"], "trainer.epochs=two"),
    (["optimizer.lr=-1"], "optimizer.lr=-1"),
    (["data=digits", "data.batch_size=0"], "data.batch_size=0"),
    (["data=digits", "data.batch_size=5000"], "data.batch_size=5000"),
    (["data=digits", "data.val_size=5000"], "data.val_size=5000"),
    (["data=digits", "trainer.device=mps"], "trainer.device=mps"),
    (["data.root=nowhere", "data.download=false"], "data.root=nowhere"),
    (["data=imagefolder"], "data.root is not set"),
    (["data=imagefolder", "data.root=nowhere"], "data.root=nowhere"),
    (["data=digits", "model._target_=os.system"], "model._target_=os.system is not allowed"),
    (["resume=nowhere"], "resume=nowhere"),
    (["data=digits", "model=net", "data.image_size=8"], "data.image_size"),
    (["data=digits", "model=torchvision", "model.weights=nowhere.pt"], "model.weights=nowhere.pt"),
]


@pytest.mark.parametrize(("arguments", "named"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_input_gets_one_line(
    arguments: list[str], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if "trainer.device=mps" in arguments and torch.backends.mps.is_available():
        pytest.skip("this machine has MPS")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments, "logger=none"])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")
    monkeypatch.setattr("cifar.train.failures", [])
    handlers = logging.getLogger().handlers[:]
    GlobalHydra.instance().clear()
    with pytest.raises(SystemExit) as stopped:
        cli()
    for handler in set(logging.getLogger().handlers) - set(handlers):  # Hydra's, of the run's train.log
        handler.close()
    logging.getLogger().handlers[:] = handlers
    assert stopped.value.code == 1
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert named in error
    for result in tmp_path.glob(
        "outputs/*/result.json"
    ):  # known only once the data was read: recorded as failed, whole
        assert json.loads(result.read_text())["status"] == "failed"


def test_bad_input_in_a_process_of_its_own(command: Command, tmp_path: Path) -> None:
    done = command("train", "optimizer.lr=abc", "data=digits")
    assert (done.returncode, done.stderr) == (1, "error: optimizer.lr=abc: must be a valid number\n")


def test_a_refused_setting_leaves_no_folder(command: Command, tmp_path: Path) -> None:
    assert command("train", "data=digits", "optimizer.lr=-1").returncode != 0
    assert list(tmp_path.iterdir()) == []


def test_full_error_shows_the_traceback(command: Command) -> None:
    done = command("train", "data=imagefolder", "data.root=nowhere", "logger=none", HYDRA_FULL_ERROR="1")
    assert done.returncode != 0
    assert "Traceback" in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["--cfg", "job", "experiment=tutorial"]])
def test_questions_are_answered_without_torch(arguments: list[str], tmp_path: Path) -> None:
    program = (
        "import sys; sys.argv[0] = 'train.py'\n"
        "from cifar.train import cli\n"
        "try:\n    cli()\n"
        "finally:\n    print([name for name in ('torch', 'wandb', 'sklearn', 'matplotlib', 'optuna', 'rich') if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.stderr == "[]\n"
    assert "optimizer" in done.stdout


def test_help_lists_groups_choices_and_settings(command: Command) -> None:
    shown = command("train", "--help", "optimizer=adam").stdout
    for text in (
        "model: mlp, net, resnet18",
        "data: cifar10, cifar100, digits, imagefolder",
        "cifar.optimizer.adam",
        "--hydra-help",
    ):
        assert text in shown
    assert "_base" not in shown
    wrong = command("train", "--help", "optimizer=nope")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (1, 1)


def test_wandb_adds_no_traceback_to_a_line(command: Command) -> None:
    done = command("train", *QUICK[:-1], "optimizer.lr=1e30", "logger.mode=offline")
    assert done.returncode == 1
    assert done.stderr.startswith("error: the loss or a gradient is not finite")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_a_signal_saves_and_resume_goes_on(sent: signal.Signals, status: int, command: Command, tmp_path: Path) -> None:
    settings = [*QUICK, "trainer.epochs=200", "trainer.log_every=5"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cifar.train", *settings, "hydra.run.dir=run"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not read_rows(tmp_path / "run"):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(sent)
    _, error = process.communicate(timeout=30)
    assert process.returncode == status
    assert error.startswith(f"stopped by {sent.name} at")
    assert error.count("\n") == 1
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["status"], result["error"]) == ("failed", error.strip())
    assert result["steps"] == checkpoint.load(tmp_path / "run" / "checkpoints" / "last.pt")["step"] > 0
    epochs = result["epochs"] + 2
    assert command("train", "resume=run", f"trainer.epochs={epochs}").returncode == 0
    assert command("train", *settings, f"trainer.epochs={epochs}", "hydra.run.dir=whole").returncode == 0
    interrupted, whole = (checkpoint.load(tmp_path / name / "checkpoints" / "last.pt") for name in ("run", "whole"))
    for key in ("model", "optimizer", "step", "rows", "best"):
        assert checkpoint.digest(interrupted[key]) == checkpoint.digest(whole[key]), key


def test_a_terminal_gets_a_progress_bar(tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "cifar.train", *QUICK, "trainer.epochs=2"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, stdin=follower, stdout=follower, stderr=follower,
    )  # fmt: skip
    os.close(follower)
    shown = b""
    while True:
        try:
            shown += os.read(leader, 4096)
        except OSError:  # the other side closed
            break
    assert process.wait(timeout=60) == 0
    assert b"epoch 1/2:   0%|" in shown
    assert b"epoch 2/2:   0%|" in shown


def test_the_console_script_is_the_same_entry() -> None:
    import tomllib

    scripts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts["cifar-train"] == "cifar.train:cli"
