"""Kill it anywhere, lose nothing: what goes on afterwards is the run that would have been, bit for bit on a CPU."""

import ast
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

LOOP = Path(__file__).parent / "kill_loop.py"
RUN = ["data=digits", "model=mlp", "model.widths=[16]", "data.image_size=8", "trainer.device=cpu", "logger=none"]
RUN += [
    "trainer.checkpoint_every=3",
    "trainer.log_every=4",
    "data.val_size=400",
    "optimizer.lr=0.05",
]
RECIPES = {
    "sgd": ["optimizer.momentum=0", "schedule=cosine"],
    "augmentation": ["augment.crop=1", "augment.flip=0.5", "augment.mixup=0.4", "schedule=one_cycle"],
    "ema": ["trainer.ema_decay=0.95", "optimizer.nesterov=true"],
    "accumulation": ["trainer.accumulate=3", "optimizer=adamw", "optimizer.lr=0.003", "trainer.clip_norm=1"],
}


def loop(folder: Path, seed: int, kills: int, *overrides: str) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, str(LOOP), str(seed), str(kills), *overrides], cwd=folder,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return ast.literal_eval(done.stdout.strip().splitlines()[-1])


def timeless(folder: Path) -> list[dict]:
    return [{key: row[key] for key in row if key not in ("seconds", "images_per_second")} for row in read_rows(folder)]


def survives(tmp_path: Path, recipe: str, seed: int, kills: int, epochs: int) -> dict[str, int]:
    """Kill a run `kills` times and hold it against the uninterrupted one; return the kills of each kind."""
    settings = [*RUN, *RECIPES[recipe], "resume=auto", f"trainer.epochs={epochs}"]
    loop(tmp_path, 0, 0, *settings, "hydra.run.dir=whole")
    survived = loop(tmp_path, seed, kills, *settings, "hydra.run.dir=killed")
    assert sum(survived.values()) >= kills, survived
    whole, killed = (checkpoint.load(tmp_path / name / "checkpoints" / "last.pt") for name in ("whole", "killed"))
    for key in whole:
        if key not in ("seconds", "settings"):
            assert checkpoint.digest(killed[key]) == checkpoint.digest(whole[key]), (
                f"{recipe}: {key} differs after {survived}"
            )
    assert timeless(tmp_path / "killed") == timeless(tmp_path / "whole")
    results = [Run(tmp_path / name).result() for name in ("whole", "killed")]
    assert results[0]["best"] == results[1]["best"]
    assert results[0]["metrics"]["test/accuracy"] == results[1]["metrics"]["test/accuracy"]
    best = [checkpoint.load(tmp_path / name / "checkpoints" / "best.pt") for name in ("whole", "killed")]
    assert checkpoint.digest(best[0]["model"]) == checkpoint.digest(best[1]["model"])
    leftovers = [path.name for path in (tmp_path / "killed" / "checkpoints").iterdir() if path.name.endswith(".tmp")]
    assert leftovers == [], "a killed save's half-written file was never removed"
    return survived


def test_six_kills(tmp_path: Path) -> None:
    survived = survives(tmp_path, "augmentation", seed=1, kills=6, epochs=16)
    assert set(survived) == {"step", "save", "time"}


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("recipe", RECIPES)
def test_many_kills(recipe: str, tmp_path: Path) -> None:
    survived = survives(tmp_path, recipe, seed=2, kills=15, epochs=60)
    print(recipe, survived)


def finished(command: Command, *overrides: str) -> None:
    done = command("train", *RUN, "trainer.epochs=2", "hydra.run.dir=run", *overrides)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("damage", ["truncated", "zeroed", "flipped"])
def test_a_damaged_checkpoint_is_skipped_and_that_is_said(damage: str, command: Command, tmp_path: Path) -> None:
    settings = [*RUN, "trainer.checkpoint_every=null", "hydra.run.dir=run"]
    assert command("train", *settings, "trainer.epochs=2").returncode == 0
    run = Run(tmp_path / "run")
    newest, older = run.checkpoints()
    content = newest.read_bytes()
    weights = next(iter(checkpoint.load(newest)["model"].values()))
    position = content.find(weights.numpy().tobytes())
    assert position > 0
    flipped = content[:position] + bytes([content[position] ^ 16]) + content[position + 1 :]
    newest.write_bytes({"truncated": content[:-1000], "zeroed": bytes(len(content)), "flipped": flipped}[damage])

    done = command("train", "resume=run", "trainer.epochs=3")
    assert done.returncode == 0, done.stderr
    assert f"skipped a checkpoint: run/checkpoints/{newest.name}" in done.stdout
    assert f"going on from run/checkpoints/{older.name}" in done.stdout
    assert command("train", *settings[:-1], "trainer.epochs=3", "hydra.run.dir=whole").returncode == 0
    whole, mended = (checkpoint.load(tmp_path / name / "checkpoints" / "last.pt") for name in ("whole", "run"))
    for key in ("model", "optimizer", "rows", "step", "best"):
        assert checkpoint.digest(mended[key]) == checkpoint.digest(whole[key]), key
    assert timeless(tmp_path / "run") == timeless(tmp_path / "whole")


def test_no_valid_checkpoint_is_an_error_not_a_fresh_start(command: Command, tmp_path: Path) -> None:
    finished(command)
    for path in Run(tmp_path / "run").checkpoints():
        path.write_bytes(b"")
    rows = read_rows(tmp_path / "run")
    done = command("train", "resume=run", "trainer.epochs=3")
    assert done.returncode == 1
    assert done.stderr.startswith("error: no valid checkpoint to go on from: run/checkpoints/step-")
    assert done.stderr.count("\n") == 1
    assert read_rows(tmp_path / "run") == rows


def test_a_full_disk_during_a_save_keeps_the_previous_checkpoint(command: Command, tmp_path: Path) -> None:
    finished(command)
    run = Run(tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.checkpoints()}
    limit = len(before[run.checkpoints()[0].name]) // 2
    program = (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "import sys; sys.argv = ['train.py', 'resume=run', 'trainer.epochs=3']\n"
        "from cifar.train import cli; cli()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: run/checkpoints/step-")
    assert "could not be written" in done.stderr
    assert done.stderr.count("\n") == 1
    assert {path.name: path.read_bytes() for path in run.checkpoints()} == before
    assert checkpoint.load(run.last)["epoch"] == 2
    assert run.result()["status"] == "failed"
    assert command("train", "resume=run", "trainer.epochs=3").returncode == 0


def test_a_second_run_in_the_same_folder_is_refused(command: Command, tmp_path: Path) -> None:
    settings = [*RUN, "trainer.epochs=2000", "hydra.run.dir=run", "resume=auto"]
    first = subprocess.Popen(
        [sys.executable, "-m", "cifar.train", *settings], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert first.poll() is None
            time.sleep(0.05)
        second = command("train", *settings)
        assert second.returncode == 1
        assert second.stderr == "error: run: another process is at work in this folder\n"
        assert first.poll() is None
        assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "running"
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    done = command("train", *settings, "trainer.epochs=1")  # the lock died with the first
    assert done.returncode == 0, done.stderr


def test_a_requeued_job_goes_on_with_the_same_command_line(command: Command, tmp_path: Path) -> None:
    settings = [*RUN, "hydra.run.dir=run", "resume=auto"]
    first = subprocess.Popen(
        [sys.executable, "-m", "cifar.train", *settings, "trainer.epochs=500"], cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert first.poll() is None
        time.sleep(0.05)
    asked = time.perf_counter()
    first.send_signal(signal.SIGTERM)
    assert first.wait(timeout=10) == 143
    assert time.perf_counter() - asked < 10
    step = checkpoint.load(tmp_path / "run" / "checkpoints" / "last.pt")["step"]
    epochs = step // 15 + 2
    done = command("train", *settings, f"trainer.epochs={epochs}")
    assert done.returncode == 0, done.stderr
    steps = [row["step"] for row in read_rows(tmp_path / "run")]
    assert steps == sorted(steps)


def test_a_killed_sweep_repeats_only_what_is_missing(command: Command, tmp_path: Path) -> None:
    settings = [*RUN, "-m", "seed=0,1,2", "hydra.sweep.dir=sweep"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cifar.train", "-m", *[item for item in settings if item != "-m"], "trainer.epochs=30"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not (tmp_path / "sweep" / "1" / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    first = (tmp_path / "sweep" / "0" / "result.json").read_bytes()
    assert json.loads(first)["status"] == "finished"

    changed = command("train", *settings, "trainer.epochs=30", "optimizer.lr=0.07")
    assert changed.returncode == 1
    assert "sweep/0 holds a run of another configuration: optimizer.lr was 0.05 and is 0.07" in changed.stderr
    assert (tmp_path / "sweep" / "0" / "result.json").read_bytes() == first
    assert "lr: 0.05" in (tmp_path / "sweep" / "0" / ".hydra" / "config.yaml").read_text()

    done = command("train", *settings, "trainer.epochs=30")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "sweep" / "0" / "result.json").read_bytes() == first
    assert "1 of 3 jobs done already" in done.stdout
    assert "sweep/0: finished already" in (tmp_path / "sweep" / "0" / "train.log").read_text()
    assert [Run(tmp_path / "sweep" / str(job)).result()["status"] for job in range(3)] == ["finished"] * 3


def test_divergence_stops_before_the_weights_change(command: Command, tmp_path: Path) -> None:
    done = command("train", *RUN, "optimizer.lr=1e30", "hydra.run.dir=run", "trainer.checkpoint_every=1")
    assert done.returncode == 1
    assert done.stderr.startswith("error: the loss or a gradient is not finite at step ")
    assert "on the training split's images " in done.stderr
    assert done.stderr.count("\n") == 1
    run = Run(tmp_path / "run")
    assert run.result()["status"] == "failed"
    assert all(value.isfinite().all() for value in checkpoint.load(run.last)["model"].values())
