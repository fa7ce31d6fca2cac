"""Jobs trained as one against the same jobs by themselves, for every setting in which they may differ."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir

from cifar import checkpoint, fused
from cifar.config import CONF
from cifar.fused import Group
from cifar.launcher import FUSABLE, FusedLauncher, divide, explain, share
from cifar.run import Job, Run
from cifar.train import train
from tests.conftest import REPOSITORY, Command, read_rows

RUN = ["data=digits", "data.image_size=8", "data.val_size=177", "data.batch_size=32"]
RUN += ["trainer.device=cpu", "trainer.log_every=10", "logger=none", "optimizer.lr=0.02"]
MLP = ["model=mlp", "model.widths=[16]"]
NORMED = ["model=resnet18", "model.width=4", "model.blocks=[1,1]", "data.fraction=0.2"]
EVERYTHING = [
    "augment=standard",
    "augment.crop=1",
    "schedule=cosine",
    "optimizer.weight_decay=0.01",
    "trainer.ema_decay=0.95",
]

# What varies, and what else is set: the first two jobs differ in one setting, the third is the first with another seed.
VARIED = {
    "optimizer.lr": (["optimizer.lr=0.02", "optimizer.lr=0.05"], EVERYTHING),
    "optimizer.momentum": (["optimizer.momentum=0.5", "optimizer.momentum=0.9"], EVERYTHING),
    "optimizer.weight_decay": (["optimizer.weight_decay=0.1", "optimizer.weight_decay=0"], ["optimizer.nesterov=true"]),
    "optimizer.betas": (["optimizer.betas=[0.9,0.99]", "optimizer.betas=[0.5,0.9]"], ["optimizer=adam", "optimizer.lr=0.003"]),
    "loss.label_smoothing": (["loss.label_smoothing=0", "loss.label_smoothing=0.3"], EVERYTHING),
    "schedule": (["schedule.final=0", "schedule.final=0.9"], ["schedule=linear"]),
    "model.dropout": (["model.dropout=0.1", "model.dropout=0.5"], ["trainer.clip_norm=1"]),
    "data.fraction": (["data.fraction=1", "data.fraction=0.7"], ["augment.mixup=0.4", "trainer.accumulate=2"]),
    "seed": (["seed=3", "seed=4"], EVERYTHING),
    "norm": (["optimizer.lr=0.002", "optimizer.lr=0.001"], NORMED),
    "adamw": (["optimizer.lr=0.002", "optimizer.lr=0.001"], ["optimizer=adamw", "optimizer.weight_decay=0.1"]),
}  # fmt: skip
# The largest difference of a weight after 200 steps, and of a logged loss or accuracy. Weights are of order 0.1 to 1.
TOLERANCE = {"fp32": (1e-3, 5e-3), "bf16": (0.4, 0.1)}


def configs(folder: Path, *jobs: list[str]) -> list:
    with initialize_config_dir(CONF, version_base="1.3"):
        return [
            (
                compose("config", [*RUN, *([] if "model=resnet18" in overrides else MLP), *overrides]),
                Job(folder / str(number)),
            )
            for number, overrides in enumerate(jobs)
        ]


def together(folder: Path, *jobs: list[str], most: int | None = None) -> Group:
    group = Group([lambda cfg=cfg, job=job: train(cfg, job) for cfg, job in configs(folder, *jobs)], most)
    group.run()
    return group


def alone(folder: Path, *jobs: list[str]) -> None:
    for cfg, job in configs(folder, *jobs):
        train(cfg, job)


def weights(folder: Path) -> torch.Tensor:
    content = checkpoint.load(Run(folder).last)
    states = [content["model"], *([content["ema"]] if content["ema"] else [])]
    return torch.cat([value.flatten().float() for state in states for value in state.values()])


def distance(one: Path, other: Path) -> float:
    return (weights(one) - weights(other)).abs().max().item()


def assert_same_record(ours: Path, theirs: Path, tolerance: float) -> None:
    rows, expected = read_rows(ours), read_rows(theirs)
    assert [row.keys() for row in rows] == [row.keys() for row in expected]
    for row, reference in zip(rows, expected, strict=True):
        # The accuracy of a class, of 35 images, is left out: one image is 3 %.
        for key in (key for key in row if key not in ("seconds", "images_per_second") and "accuracy/" not in key):
            assert row[key] == pytest.approx(reference[key], rel=tolerance, abs=tolerance), (key, row, reference)
    results = [Run(folder).result() for folder in (ours, theirs)]
    for key in ("status", "seed", "config_hash", "epochs", "steps", "error"):
        assert results[0][key] == results[1][key], key


@pytest.fixture
def computed_as_one(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many networks each pass computed."""
    from cifar.stack import Stack

    passes, plain = [], Stack.backward
    monkeypatch.setattr(Stack, "backward", lambda self, *a: passes.append(len(self.number)) or plain(self, *a))
    return passes


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("setting", VARIED)
def test_each_job_equals_itself_alone(setting: str, precision: str, tmp_path: Path, computed_as_one: list[int]) -> None:
    values, others = VARIED[setting]
    epochs = 28 if setting == "norm" else 6
    common = [*others, f"trainer.precision={precision}", f"trainer.epochs={epochs}"]
    jobs = [[*common, *([] if setting == "seed" else ["seed=3"]), value] for value in values]
    jobs.append([item for item in jobs[0] if not item.startswith("seed=")] + ["seed=5"])
    together(tmp_path / "fused", *jobs)
    passes = computed_as_one[:]
    alone(tmp_path / "alone", *jobs)
    steps = [Run(tmp_path / "fused" / str(number)).result()["steps"] for number in range(3)]
    assert max(steps) >= 200
    assert passes.count(3) >= min(steps) - 2 * epochs  # all but the last, smaller batches of jobs with fewer images
    assert len(computed_as_one) == len(passes)  # by themselves they are not stacked

    of_weights, of_rows = TOLERANCE[precision]
    for number in range(3):
        ours, theirs = tmp_path / "fused" / str(number), tmp_path / "alone" / str(number)
        assert distance(ours, theirs) < of_weights
        assert_same_record(ours, theirs, of_rows)
    # Were a setting of one job to leak into another, the other would end where the first is, far outside the tolerance.
    # In bf16 rounding alone moves a run by as much as a setting does.
    apart = min(distance(tmp_path / "alone" / str(a), tmp_path / "alone" / str(b)) for a, b in ((0, 1), (0, 2), (1, 2)))
    assert precision == "bf16" or apart > 5 * of_weights


def test_every_fusable_setting_is_held_against_alone() -> None:
    assert {*VARIED} - {"norm", "adamw"} == {*FUSABLE}


@pytest.mark.parametrize("leak", ["optimizer", "loss", "generators"])
def test_a_leak_would_be_seen(leak: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison fails where jobs do share what they must not."""
    jobs = [
        ["seed=3", "model.dropout=0.3", "optimizer.lr=0.02"],
        ["seed=4", "model.dropout=0.3", "loss.label_smoothing=0.3"],
    ]
    if leak == "optimizer":
        rate = {"lr": 0.03}
        monkeypatch.setattr("cifar.trainer.set_learning_rates", lambda of, _: [g.update(rate) for g in of.param_groups])
    elif leak == "loss":
        monkeypatch.setattr("cifar.stack._kind", lambda loss: None)
    else:
        monkeypatch.setattr(Group, "_as", lambda self, member: __import__("contextlib").nullcontext())
    together(tmp_path / "fused", *jobs)
    monkeypatch.undo()
    alone(tmp_path / "alone", *jobs)
    assert max(distance(tmp_path / "fused" / str(n), tmp_path / "alone" / str(n)) for n in range(2)) > 1e-3


def test_a_job_that_diverges_leaves_the_others_unharmed(tmp_path: Path, command: Command) -> None:
    sweep = [
        *RUN,
        *MLP,
        "-m",
        "hydra/launcher=fused",
        "optimizer.lr=0.02,1e30,0.01",
        "trainer.epochs=2",
        "hydra.sweep.dir=sweep",
    ]
    done = command("train", *sweep)
    assert done.returncode == 1
    assert "#0-2: 3 jobs as one, varying optimizer.lr" in done.stdout
    results = [Run(tmp_path / "sweep" / str(number)).result() for number in range(3)]
    assert [result["status"] for result in results] == ["finished", "failed", "finished"]
    assert "is not finite at step 2 (epoch 1)" in results[1]["error"]
    assert "is not finite at step 2 (epoch 1)" in done.stderr
    alone(tmp_path / "alone", *[[f"optimizer.lr={lr}", "trainer.epochs=2"] for lr in (0.02, 0.01)])
    for number, reference in ((0, 0), (2, 1)):
        assert distance(tmp_path / "sweep" / str(number), tmp_path / "alone" / str(reference)) < 1e-5
    assert "epoch 2/2" in (tmp_path / "sweep" / "2" / "train.log").read_text()
    assert (tmp_path / "sweep" / "0" / "train.log").read_text().count("epoch 2/2") == 1  # each log is its job's own


def test_too_many_for_the_memory_train_in_waves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, computed_as_one: list[int]
) -> None:
    monkeypatch.setattr(fused, "available_memory", lambda request: 2.5 * fused.memory_a_job(request))
    jobs = [[f"seed={seed}", "trainer.epochs=1"] for seed in range(5)]
    with caplog.at_level(logging.INFO, "cifar.fused"):
        together(tmp_path / "fused", *jobs)
    assert "5 jobs are too many for the memory: 2 at a time" in caplog.text
    assert {*computed_as_one} == {2}
    alone(tmp_path / "alone", *jobs)
    for number in range(5):
        assert distance(tmp_path / "fused" / str(number), tmp_path / "alone" / str(number)) < 1e-5


def test_memory_a_job_counts_what_is_kept(tmp_path: Path) -> None:
    seen = []
    cfg, job = configs(tmp_path, ["trainer.epochs=1"])[0]

    def size(self: Group, first: fused.Member, jobs: int) -> int:
        seen.append(fused.memory_a_job(first.request))
        return 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Group, "_size", size)
        Group([lambda: train(cfg, job)]).run()
    of_weights = 4 * (192 * 16 + 16 + 16 * 10 + 10)
    # Images, hidden values before and after ReLU, logits: at the least what is kept, at the most twice that and the weights.
    kept = 4 * 32 * (192 + 16 + 10)
    assert 7 * of_weights + kept <= seen[0] <= 9 * of_weights + 4 * kept


def test_data_is_read_once_and_a_batch_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cifar.data.batches import Batches
    from cifar.data.digits import Digits

    loaded, prepared = [], []
    load, prepare = Digits.load, Batches._prepare
    monkeypatch.setattr(Digits, "load", lambda self: loaded.append(1) or load(self))
    monkeypatch.setattr(Batches, "_prepare", lambda self, *a: prepared.append(a[1:]) or prepare(self, *a))
    together(tmp_path, *[[f"optimizer.lr={lr}", "trainer.epochs=2", "augment.flip=0.5"] for lr in (0.01, 0.02, 0.03)])
    assert len(loaded) == 1
    assert prepared == [(0, 0), (0, 32), (1, 0), (1, 32)]  # two chunks of 1,024 images an epoch


def test_a_network_that_cannot_be_stacked_trains_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, computed_as_one: list[int]
) -> None:
    from cifar.models.mlp import MLP

    plain = MLP.forward
    monkeypatch.setattr(MLP, "forward", lambda self, x: plain(self, x + 0.01 * torch.randn_like(x) * self.training))
    jobs = [[f"seed={seed}", "trainer.epochs=2"] for seed in range(2)]
    together(tmp_path / "fused", *jobs)
    assert computed_as_one == []
    assert caplog.text.count("not fused, each job computes its own steps: vmap: called random operation") == 1
    alone(tmp_path / "alone", *jobs)
    for number in range(2):
        assert distance(tmp_path / "fused" / str(number), tmp_path / "alone" / str(number)) == 0


def test_threads_and_kernels_are_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A group computes with all threads and oneDNN, and its trainers set theirs: the next group must not find either."""
    torch.set_num_threads(3)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    jobs = [["trainer.threads=1", "trainer.onednn=false", "trainer.epochs=1", f"seed={seed}"] for seed in range(2)]
    together(tmp_path, *jobs)
    assert torch.get_num_threads() == 3
    assert not torch.backends.mkldnn.enabled


@pytest.mark.parametrize(
    "own", [{"precision": "fp16"}, {"compile": True}, {"cuda_graph": True}], ids=lambda own: next(iter(own))
)
def test_what_a_network_needs_by_itself_is_not_fused(own: dict, caplog: pytest.LogCaptureFixture) -> None:
    """A gradient scaler, for one, is each job's own, and divides gradients by a scale that a stack would not have given them."""
    trainer = SimpleNamespace(**({"precision": "fp32", "compile": False, "cuda_graph": False} | own), backward="plain")
    Group([]).join(trainer)
    assert trainer.backward == "plain"
    assert f"not fused, one job after the other: trainer.{next(iter(own))}=" in caplog.text


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("received", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_sweep_goes_on_where_it_was(
    received: signal.Signals, processes: int, tmp_path: Path, command: Command
) -> None:
    sweep = [
        *RUN,
        *MLP,
        "-m",
        "hydra/launcher=fused",
        "seed=0,1,2",
        "trainer.epochs=20",
        "trainer.checkpoint_every=5",
        f"hydra.launcher.processes={processes}",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "cifar.train", *sweep, "hydra.sweep.dir=sweep"], cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    jobs = [tmp_path / "sweep" / str(number) for number in range(3)]
    while not all((job / "checkpoints" / "last.pt").exists() for job in jobs):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(received)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (143 if received == signal.SIGTERM else -9), err
    steps = [checkpoint.load(Run(job).last)["step"] for job in jobs]
    if received == signal.SIGTERM:
        assert processes == 2 or max(steps) - min(steps) <= 1  # the signal came between two jobs' turns
        stopped = [result for job in jobs if (result := Run(job).result())["status"] == "failed"]
        assert len(stopped) >= 2  # a job by itself may have ended already
        for result in stopped:
            assert result["error"].startswith("stopped by SIGTERM at "), result["error"]
        assert "stopped by SIGTERM " in err
    assert max(steps) < 20 * 38
    done = command("train", *sweep, "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    alone(
        tmp_path / "alone", *[[f"seed={seed}", "trainer.epochs=20", "trainer.checkpoint_every=5"] for seed in range(3)]
    )
    for number in range(3):
        assert distance(jobs[number], tmp_path / "alone" / str(number)) < 1e-3
        assert_same_record(jobs[number], tmp_path / "alone" / str(number), 1e-3)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_changed_sweep_is_refused(processes: int, tmp_path: Path, command: Command) -> None:
    sweep = [*RUN, *MLP, "-m", "hydra/launcher=fused", "seed=0,1,2,3", "trainer.epochs=1", "hydra.sweep.dir=sweep"]
    sweep += [f"hydra.launcher.processes={processes}"]
    assert command("train", *sweep).returncode == 0
    before = [(tmp_path / "sweep" / str(number) / "result.json").read_bytes() for number in range(4)]
    done = command("train", *sweep, "optimizer.lr=0.07")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len(lines) == processes
    assert all("holds a run of another configuration: optimizer.lr was 0.02 and is 0.07" in line for line in lines)
    assert [(tmp_path / "sweep" / str(number) / "result.json").read_bytes() for number in range(4)] == before


def test_a_killed_process_leaves_the_others_jobs_alone(tmp_path: Path, command: Command) -> None:
    (tmp_path / "saboteur.py").write_text(
        "import os, signal\nfrom cifar.loss import cross_entropy\n\n\n"
        "def killed(logits, targets, label_smoothing: float = 0.0):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    sweep = [*RUN, *MLP, "-m", "hydra/launcher=fused", "seed=0,1,2,3", "trainer.epochs=1", "hydra.launcher.processes=2"]
    losses = "loss._target_=cifar.loss.cross_entropy,saboteur.killed"
    done = command("train", *sweep, losses, "hydra.sweep.dir=sweep", CIFAR_TARGETS="saboteur", PYTHONPATH=f"{REPOSITORY}:{tmp_path}")  # fmt: skip
    assert done.returncode == 1
    results = [Run(tmp_path / "sweep" / str(number)).result() for number in range(8)]
    assert [result["status"] for result in results[::2]] == ["finished"] * 4
    assert not [result for result in results[1::2] if result and result["status"] != "running"]
    assert "no word from it: killed?" in done.stderr


def test_the_table_is_that_of_the_basic_launcher(tmp_path: Path, command: Command) -> None:
    sweep = [*RUN, *MLP, "-m", "optimizer.lr=0.02,-1,0.01", "model.widths=[16],[8]", "trainer.epochs=1"]
    tables = []
    for name, launcher in (
        ("basic", []),
        ("fused", ["hydra/launcher=fused"]),
        ("two", ["hydra/launcher=fused", "hydra.launcher.processes=2"]),
    ):
        done = command("train", *sweep, *launcher, f"hydra.sweep.dir={name}")
        assert done.returncode == 1
        assert done.stderr.count("job ") == 2
        assert "optimizer.lr=-1: must be greater than or equal to 0" in done.stderr
        compared = json.loads(command("compare", name, "--json").stdout)
        tables.append(
            [(run["status"], run["settings"], run["best"] and run["best"]["epoch"]) for run in compared["runs"]]
        )
    assert tables[0] == tables[1] == tables[2]
    assert "#0, #2, #4: 3 jobs as one, varying optimizer.lr" in done.stdout
    assert "in 2 processes: #0; #2, #4" in done.stdout
    assert "#1, #3, #5: 3 jobs as one, varying optimizer.lr; not with #0: model.widths=[8]" in done.stdout


def test_wandb_runs_side_by_side(tmp_path: Path, command: Command) -> None:
    sweep = [
        *RUN,
        *MLP,
        "-m",
        "hydra/launcher=fused",
        "optimizer.lr=0.02,0.01",
        "trainer.epochs=1",
        "hydra.sweep.dir=sweep",
    ]
    done = command("train", *sweep, "logger=wandb", "logger.mode=offline")
    assert done.returncode == 0, done.stderr
    results = [Run(tmp_path / "sweep" / str(number)).result() for number in range(2)]
    for result in results:
        [data] = (tmp_path / "sweep" / "wandb").glob(f"offline-run-*-{result['wandb']['id']}/run-*.wandb")
        summary = subprocess.run(
            [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--summary", "--json", str(data.parent)],
            capture_output=True, text=True, check=True, timeout=60, env=os.environ | {"WANDB_ERROR_REPORTING": "false"},
        )  # fmt: skip
        told = json.loads(summary.stdout)
        assert told["config"]["optimizer"]["lr"] == float(
            re.findall("optimizer.lr=(.*)", "\n".join(result["overrides"]))[-1]
        )
        assert told["summary"]["test/accuracy"]["last"] == result["metrics"]["test/accuracy"]


def settings(**changes) -> dict:
    return {
        "seed": 0, "resume": None, "model": {"_target_": "m", "widths": [1], "dropout": 0.0},
        "optimizer": {"_target_": "o", "lr": 0.1, "nesterov": False}, "data": {"_target_": "d", "batch_size": 4, "fraction": 1.0},
        "schedule": {"_target_": "s", "warmup": 0.1}, "trainer": {"epochs": 2}, "augment": {"flip": 0.5},
    } | changes  # fmt: skip


@pytest.mark.parametrize(
    ("change", "fused_with_it"),
    [({"seed": 1}, True), ({"schedule": {"_target_": "other", "final": 1.0}}, True),
     ({"model": {"_target_": "m", "widths": [1], "dropout": 0.5}}, True),
     ({"optimizer": {"_target_": "o", "lr": 0.2, "nesterov": False}}, True),
     ({"optimizer": {"_target_": "o", "lr": 0.1, "nesterov": True}}, False),
     ({"data": {"_target_": "d", "batch_size": 4, "fraction": 0.5}}, True),
     ({"data": {"_target_": "d", "batch_size": 8, "fraction": 1.0}}, False),
     ({"model": {"_target_": "m", "widths": [2], "dropout": 0.0}}, False),
     ({"trainer": {"epochs": 3}}, False), ({"augment": {"flip": 0.1}}, False)],
)  # fmt: skip
def test_what_is_fused(change: dict, fused_with_it: bool) -> None:
    groups = divide({0: settings(), 1: settings(**change), 2: settings()})
    assert [list(group) for group in groups] == ([[0, 1, 2]] if fused_with_it else [[0, 2], [1]])


def test_it_says_what_is_fused_and_why_not_the_rest() -> None:
    jobs = {n: settings(seed=n) for n in range(4)}
    jobs |= {4: settings(trainer={"epochs": 3}), 5: settings(seed=5)}
    assert explain(divide(jobs)) == [
        "#0-3, #5: 5 jobs as one, varying seed",
        "#4: on its own; not with #0: trainer.epochs=3",
    ]


def test_the_launcher_is_listed_and_its_settings_checked(command: Command) -> None:
    assert "FusedLauncher" in command("train", "--info", "plugins").stdout
    assert FusedLauncher.__module__.startswith("hydra_plugins.")
    done = command("train", "-m", "hydra/launcher=fused", "hydra.launcher.max_jobs=0", *RUN, *MLP, "seed=0,1")
    assert done.returncode == 1
    assert "hydra.launcher.max_jobs=0: must be at least 1" in done.stderr
    assert done.stderr.count("\n") == 1


def test_jobs_on_the_same_batches_share_a_process() -> None:
    jobs = {number: settings(seed=number % 2) for number in range(6)}
    assert share(jobs, 2) == [[0, 2, 4], [1, 3, 5]]
    assert share(jobs, 3) == [[0, 2], [1, 4], [3, 5]]
    assert share(jobs, 1) == [[0, 1, 2, 3, 4, 5]]
