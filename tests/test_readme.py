"""Every command of the README is run, in its order, as written; those marked `network` or `cluster` are only parsed."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from PIL import Image

from cifar.config import CONF, check
from tests.conftest import REPOSITORY

BLOCKS = re.findall(r"^```sh ?(\w*)\n(.*?)^```", (REPOSITORY / "README.md").read_text(), re.MULTILINE | re.DOTALL)
COMMANDS = [(kind, line) for kind, block in BLOCKS for line in block.splitlines()]
SET_UP = [line for _, line in COMMANDS if line.startswith("python3 -m venv")]
OFFLINE = [line for kind, line in COMMANDS if kind == "" and line not in SET_UP]
NETWORK, SLOW, CLUSTER = ([line for kind, line in COMMANDS if kind == name] for name in ("network", "slow", "cluster"))


def make_images(folder: Path) -> None:
    for split in ("train", "test"):
        for label, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
            (folder / "photos" / split / label).mkdir(parents=True)
            for number in range(40):
                image = Image.new("RGB", (40, 32), tuple(channel + number for channel in colour))
                image.save(folder / "photos" / split / label / f"{number}.png")
    for name in ("one.png", "two.png"):
        Image.new("RGB", (48, 64), "white").save(folder / name)


@pytest.mark.timeout(900)  # some two dozen commands, each a process of its own
def test_every_command_without_network_works_in_its_order(tmp_path: Path) -> None:
    assert len(OFFLINE) > 10
    make_images(tmp_path)
    python = Path(sys.executable)
    for line in OFFLINE:
        assert line.startswith("python -m cifar."), line
        arguments = [str(python), *shlex.split(line)[1:]]
        if "hparams_search" in line or " -m data=digits optimizer.lr" in line:
            # As written but quicker; tests/test_sweep.py runs such a grid to its end.
            arguments += ["trainer.epochs=1", "model=mlp", "logger.mode=disabled"]
        done = subprocess.run(
            arguments, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        assert done.stdout.strip(), line


@pytest.mark.parametrize("line", NETWORK)
def test_commands_that_need_the_network_compose(line: str) -> None:
    module, *overrides = [word for word in shlex.split(line)[2:] if word != "-m"]
    assert module == "cifar.train"
    with initialize_config_dir(CONF, version_base="1.3"):
        check(compose("config", overrides=[re.sub(r"=([^,\[]+),.*", r"=\1", override) for override in overrides]))


@pytest.mark.parametrize("line", [line for line in CLUSTER if "cifar.train" in line])
def test_commands_for_a_cluster_compose(line: str) -> None:
    overrides = [word for word in shlex.split(line.partition("-m cifar.train ")[2]) if word != "-m"]
    if "hydra/launcher=ray" in overrides:
        pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="needs pip install 'cifar[ray]'")
    given = [re.sub(r"=range\(.*|=([^,\[]+),.*", lambda match: f"={match[1] or 0}", override) for override in overrides]
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("config", [*given, "hydra.job.num=0", "hydra.job.id=0"], return_hydra_config=True)
        assert cfg.hydra.launcher._target_
        check(compose("config", [item for item in given if not item.lstrip("+").startswith("hydra")]))


@pytest.mark.slow
@pytest.mark.parametrize("line", SLOW)
def test_commands_that_start_several_processes_work(line: str, tmp_path: Path) -> None:
    program, *arguments = shlex.split(line)
    assert program in ("python", "torchrun")
    if "hydra/launcher=ray_local" in arguments:
        pytest.importorskip("hydra_plugins.hydra_ray_launcher", reason="needs pip install 'cifar[ray]'")
    command = [sys.executable, *(["-m", "torch.distributed.run"] if program == "torchrun" else []), *arguments]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    results = [json.loads(path.read_text()) for path in tmp_path.rglob("result.json")]
    assert {result["status"] for result in results} == {"finished"}


@pytest.mark.network
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("line", NETWORK)
def test_commands_that_need_the_network_work(line: str, tmp_path: Path) -> None:
    arguments = [sys.executable, *shlex.split(line)[1:]]
    subprocess.run(arguments, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, check=True, timeout=3600)


def test_set_up_is_two_commands_and_ci_runs_the_second() -> None:
    assert len(SET_UP) == 2
    assert SET_UP[0].endswith(".venv/bin/pip install -e . && .venv/bin/python -m cifar.train data=digits")
    assert SET_UP[1].endswith("pytest")
    assert r"grep -m 1 -E '^python3 -m venv .*pytest$' README.md" in (REPOSITORY / ".ci" / "run").read_text()


def test_adding_a_model_as_the_readme_says(tmp_path: Path) -> None:
    readme = (REPOSITORY / "README.md").read_text()
    for folder in ("cifar", "conf"):
        shutil.copytree(REPOSITORY / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name, text in re.findall(r"^```(?:python|yaml)\n# (\S+)\n(.*?)^```", readme, re.MULTILINE | re.DOTALL):
        (tmp_path / name).write_text(text)
    command = [
        "-m",
        "cifar.train",
        "model=linear",
        "model.bias=false",
        "data=digits",
        "logger=none",
        "trainer.epochs=1",
    ]
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
