"""One run over several processes, really started by torchrun: the result of one process, one writer, no process left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from cifar import checkpoint
from cifar.augment import Augment
from cifar.config import CONF
from cifar.data.batches import Batches, Normalize
from cifar.data.dataset import Split
from cifar.distributed import World, is_running
from cifar.run import Job, Run
from cifar.sweep import Callbacks
from cifar.train import train as train_run
from tests.conftest import REPOSITORY, read_rows

# 1,261 images in batches of 45: every batch is cut unevenly, and of the last one's single image process 1 has none.
RUN = ["data=digits", "model=mlp", "model.widths=[32]", "data.image_size=8", "trainer.device=cpu", "logger=none"]
RUN += ["data.batch_size=45", "data.val_size=177", "augment.crop=1", "augment.flip=0.5", "augment.mixup=0.4"]
RUN += ["loss.label_smoothing=0.1", "optimizer.lr=0.05", "optimizer.momentum=0.9", "schedule=cosine"]
RUN += ["trainer.ema_decay=0.95", "trainer.clip_norm=1", "trainer.log_every=7", "trainer.checkpoint_every=10"]
RUN += ["trainer.epochs=3", "trainer.eval_batch_size=50"]
# Sums of float32 in another order; the largest difference seen was 2e-7.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def start(folder: Path, processes: int, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    return subprocess.Popen(
        [sys.executable, "-m", *(torchrun if processes > 1 else []), "cifar.train", *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{folder}", "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train(folder: Path, processes: int, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    process = start(folder, processes, *arguments, **environment)
    out, err = process.communicate(timeout=200)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def train_here(folder: Path) -> None:
    """Train, or go on, by this very process."""
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("config", RUN)
    torch.set_num_threads(1)
    train_run(cfg, Job(folder))


def assert_same_run(one: Path, other: Path) -> None:
    states = [checkpoint.load(Run(folder).last) for folder in (one, other)]
    for key in ("model", "ema"):
        torch.testing.assert_close(states[1][key], states[0][key], **TOLERANCE)
    momenta = [[entry["momentum_buffer"] for entry in state["optimizer"]["state"].values()] for state in states]
    torch.testing.assert_close(momenta[1], momenta[0], **TOLERANCE)
    for key in ("epoch", "batch", "step", "rows", "images", "skipped", "data"):
        assert states[1][key] == states[0][key], key
    rows = [read_rows(folder) for folder in (one, other)]
    assert len(rows[0]) == len(rows[1])
    for ours, theirs in zip(*rows, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - {"seconds", "images_per_second"}:
            assert theirs[key] == pytest.approx(ours[key], rel=1e-5, abs=1e-5), (key, ours, theirs)
    results = [Run(folder).result() for folder in (one, other)]
    assert [result["status"] for result in results] == ["finished"] * 2
    assert results[1]["best"]["epoch"] == results[0]["best"]["epoch"]
    assert results[1]["metrics"]["test/accuracy"] == results[0]["metrics"]["test/accuracy"]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run by one process that the others are held against."""
    folder = tmp_path_factory.mktemp("one") / "run"
    train_here(folder)
    return folder


def test_two_processes_train_what_one_does_and_one_writes(one: Path, tmp_path: Path) -> None:
    done = train(tmp_path, 2, *RUN)
    assert done.returncode == 0, done.stderr
    [run] = (tmp_path / "outputs").iterdir()  # each process has its own time stamp, and one has a folder
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    assert_same_run(one, run)
    assert [Run(folder).result()["environment"]["processes"] for folder in (one, run)] == [1, 2]
    assert done.stdout.count("epoch 1/3: ") == 1
    assert "error" not in done.stderr


def test_a_killed_process_ends_the_run_and_one_process_goes_on(one: Path, tmp_path: Path) -> None:
    (tmp_path / "saboteur.py").write_text(
        "import os, signal\nfrom cifar import loss\n\ncalls = 0\n\n\n"
        "def cross_entropy(logits, targets, label_smoothing: float = 0.0):\n"
        "    global calls\n    calls += 1\n"
        "    if calls == 45 and os.environ['RANK'] == '1':\n        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return loss.cross_entropy(logits, targets, label_smoothing)\n"
    )
    target = "loss._target_=saboteur.cross_entropy"
    done = train(tmp_path, 2, *RUN, "hydra.run.dir=run", target, CIFAR_TARGETS="saboteur")
    assert done.returncode != 0
    [told] = [line for line in done.stderr.splitlines() if "error: " in line]
    assert told.startswith("error: process 1 of 2 (pid ")
    assert told.endswith(
        ") is gone without a word: killed?; the run ended with it. "
        "Start it again with resume=FOLDER, with any number of processes"
    )
    result = Run(tmp_path / "run").result()
    assert result["status"] == "failed"
    assert told.removeprefix("error: ") in result["error"]
    assert checkpoint.load(Run(tmp_path / "run").last)["step"] in (30, 40)

    train_here(tmp_path / "run")
    assert_same_run(one, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_all_at_one_step_and_two_go_on(sent: signal.Signals, one: Path, tmp_path: Path) -> None:
    process = start(tmp_path, 2, *RUN, "hydra.run.dir=run", "trainer.epochs=2000", "schedule=constant")
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not read_rows(tmp_path / "run"):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(sent)
    _, err = process.communicate(timeout=30)
    assert process.returncode != 0
    [told] = [line for line in err.splitlines() if line.startswith(f"stopped by {sent.name} at ")]
    step = checkpoint.load(Run(tmp_path / "run").last)["step"]
    assert told.endswith(
        (f"at step {step}", f"at step {step}, before its validation", f"at the end of epoch {step / 29:g}")
    )
    assert Run(tmp_path / "run").result()["status"] == "failed"

    epochs = f"trainer.epochs={step // 29 + 2}"
    assert train(tmp_path, 2, "resume=run", epochs).returncode == 0
    assert train(tmp_path, 1, *RUN, "hydra.run.dir=whole", "schedule=constant", epochs).returncode == 0
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_an_error_in_one_process_is_told_and_recorded_by_the_other(tmp_path: Path) -> None:
    (tmp_path / "saboteur.py").write_text(
        "import os\nfrom cifar import loss\n\n\n"
        "def cross_entropy(logits, targets, label_smoothing: float = 0.0):\n"
        "    if os.environ['RANK'] == '1':\n        raise ArithmeticError('sabotage')\n"
        "    return loss.cross_entropy(logits, targets, label_smoothing)\n"
    )
    target = "loss._target_=saboteur.cross_entropy"
    done = train(tmp_path, 2, *RUN, "hydra.run.dir=run", target, CIFAR_TARGETS="saboteur")
    assert done.returncode != 0
    assert "process 1: error: ArithmeticError: sabotage" in done.stderr
    assert "\nerror: process 1 of 2 failed: ArithmeticError: sabotage; the run ended with it." in f"\n{done.stderr}"
    assert "ArithmeticError: sabotage" in Run(tmp_path / "run").result()["error"]


@pytest.mark.slow
def test_what_all_meet_is_told_once(tmp_path: Path) -> None:
    done = train(tmp_path, 2, *RUN, "hydra.run.dir=run", "optimizer.lr=1e30", "trainer.clip_norm=null")
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(told) == 1, told
    assert told[0].startswith("error: the loss or a gradient is not finite at step ")
    for arguments, message in (
        (["optimizer.lr=-1"], "error: optimizer.lr=-1: must be greater than or equal to 0"),
        (["-m", "seed=0,1"], "error: torchrun starts one run over several processes, and this is a sweep"),
    ):
        done = train(tmp_path, 2, *RUN, *arguments)
        assert done.returncode != 0
        assert next(line for line in done.stderr.splitlines() if "error: " in line).startswith(message)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    done = train(tmp_path, 2, "data=digits", "--cfg", "job")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("log_every:") == 1


@pytest.mark.slow
def test_batch_norm_sees_parts_as_with_accumulate(tmp_path: Path) -> None:
    """Two processes take the steps of accumulate=2, whose parts are the same halves; statistics become their mean."""
    small = [item for item in RUN if not item.startswith(("model", "data.val_size", "data.batch_size"))]
    small += ["model=torchvision", "model.name=shufflenet_v2_x0_5", "data.image_size=16", "data.drop_last=true"]
    small += ["data.batch_size=64", "data.fraction=0.2", "trainer.epochs=1", "trainer.ema_decay=null"]
    for folder, processes, parts in (("one", 1, 2), ("two", 2, 1)):
        done = train(tmp_path, processes, *small, f"hydra.run.dir={folder}", f"trainer.accumulate={parts}")
        assert done.returncode == 0, done.stderr
    one, two = (checkpoint.load(Run(tmp_path / name).last)["model"] for name in ("one", "two"))
    same, other = [], []
    for name in one:
        close = torch.allclose(two[name].double(), one[name].double(), rtol=1e-3, atol=1e-4)
        (same if close else other).append(name)
    assert all("running" in name or "num_batches" in name for name in other), other
    assert any("weight" in name for name in same)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_parts_make_up_the_batches_of_one_process(size: int) -> None:
    split = Split(torch.randint(0, 256, (23, 3, 8, 8), dtype=torch.uint8), torch.arange(23) % 4)
    augment = Augment(4, crop=1, flip=0.5, mixup=0.3, cutmix=1.0)

    def batches(rank: int = 0, size: int = 1) -> Batches:
        return Batches(split, Normalize((0.5,) * 3, (0.5,) * 3), 7, augment=augment, seed=3, rank=rank, size=size)

    parts = [list(batches(rank, size).epoch(1)) for rank in range(size)]
    whole = list(batches().epoch(1))
    assert [len(images) for images, _ in whole] == [batches().images_in(step) for step in range(4)] == [7, 7, 7, 2]
    for step, batch in enumerate(whole):
        for kind in range(2):
            assert torch.equal(torch.cat([part[step][kind] for part in parts]), batch[kind])
    in_order = [images for rank in range(size) for images in batches(rank, size).in_order()]
    assert torch.equal(torch.cat(in_order), torch.cat(list(batches().in_order())))
    assert {len(images) for images in in_order} <= {7, 2, 0}, "not the batches that one process evaluates"


def test_a_sweep_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("config", ["data=digits", "hydra.job.num=0", "hydra.job.id=0"], return_hydra_config=True)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as left:
        Callbacks().on_multirun_start(cfg)
    assert left.value.code == 1
    assert capsys.readouterr().err.startswith(
        "error: torchrun starts one run over several processes, and this is a sweep"
    )


def test_each_process_needs_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    World(0, 2).check(torch.device("cpu"))
    World().check(torch.device("cuda"))
    with pytest.raises(ValueError, match=r"started 2 processes on a machine with 1 GPU: --nproc-per-node 1, or"):
        World(0, 2).check(torch.device("cuda"))
    with pytest.raises(ValueError, match=r"trainer.device=mps: not for several processes"):
        World(0, 2).check(torch.device("mps"))


def test_masks_differ_between_processes_and_are_the_same_again() -> None:
    drawn = {}
    for rank in (0, 1, 2, 1):
        torch.manual_seed(0)
        World(rank, 3).reseed(seed=0, step=5)
        values = torch.rand(4).tolist()
        assert drawn.setdefault(rank, values) == values
    torch.manual_seed(0)
    assert drawn[0] == torch.rand(4).tolist()
    assert len({tuple(values) for values in drawn.values()}) == 3


def test_a_zombie_is_not_running() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    assert is_running(os.getpid())
    deadline = time.monotonic() + 20
    while is_running(child.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not is_running(child.pid)
    child.wait()
    assert not is_running(child.pid)
