"""No file from outside runs code, no name leaves its folder, no secret reaches a record."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from cifar.config import ConfigError
from cifar.data.imagefolder import read_image
from cifar.sweep import refuse_targets_for_hydra
from tests.conftest import Command

QUICK = ["data=digits", "model=mlp", "model.widths=[8]", "data.image_size=8", "trainer.device=cpu", "trainer.epochs=1"]


class Bite:
    """Unpickled, it would write the marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "it-ran"


def test_the_bite_bites(marker: Path) -> None:
    pickle.loads(pickle.dumps(Bite(marker)))
    assert marker.exists()


def test_a_foreign_run_folder_runs_nothing(command: Command, tmp_path: Path, marker: Path) -> None:
    assert command("train", *QUICK, "logger=none", "hydra.run.dir=run").returncode == 0
    run = tmp_path / "run"
    config, overrides = run / ".hydra" / "config.yaml", run / ".hydra" / "overrides.yaml"
    good, replayed = config.read_text(), overrides.read_text()
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")

    config.write_text(
        good.replace("cifar.models.mlp.MLP", "os.system").replace("widths:", f"command: touch '{marker}'\n  widths:")
    )
    for name, arguments in (("evaluate", ["run"]), ("predict", ["run", "image.png"])):
        done = command(name, *arguments)
        assert done.returncode == 1
        assert done.stderr.startswith("error: model._target_=os.system is not allowed")
    config.write_text(f"!!python/object/apply:os.system [\"touch '{marker}'\"]")
    for name, arguments in (("evaluate", ["run"]), ("compare", ["run"])):
        assert not marker.exists(), name
        command(name, *arguments)
    config.write_text(good)

    for line, told in (
        (
            f"+hydra.callbacks.x={{_target_:os.system,command:touch {marker}}}",
            None,
        ),  # what Hydra is told is not replayed
        ("model._target_=os.system", "error: model._target_=os.system is not allowed"),
        ("+augment.x={_target_:os.system}", "error: augment.x._target_=os.system is not allowed"),
    ):
        overrides.write_text(replayed + f'- "{line}"\n')
        done = command("train", "resume=run", "trainer.epochs=2")
        assert done.stderr.startswith(told) if told else done.returncode == 0, done.stderr
    overrides.write_text(replayed)

    for path in (run / "checkpoints").iterdir():
        torch.save({"model": Bite(marker)}, path)
    for name, arguments in (
        ("evaluate", ["run"]),
        ("predict", ["run", "image.png"]),
        ("train", ["resume=run", "trainer.epochs=3"]),
    ):
        done = command(name, *arguments)
        assert done.returncode == 1
        assert "not a readable checkpoint" in done.stderr
    assert not marker.exists()


@pytest.mark.parametrize(
    "content",
    [
        lambda marker: pickle.dumps(Bite(marker)),
        lambda marker: (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(%pipe%touch "
            + str(marker).encode()
            + b") (w) file\nshowpage\n"
        ),
        lambda marker: (
            b"push graphic-context\nimage over 0,0 0,0 'https://x\"|touch "
            + str(marker).encode()
            + b"\"'\npop graphic-context"
        ),
        lambda marker: b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>",
    ],
    ids=["pickle", "postscript", "mvg", "svg"],
)
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".eps"])
def test_an_image_runs_nothing(content, suffix: str, tmp_path: Path, marker: Path) -> None:
    path = tmp_path / f"image{suffix}"
    path.write_bytes(content(marker))
    with pytest.raises(ValueError, match=rf"image\{suffix}"):
        read_image(path, 8)
    assert not marker.exists()


@pytest.mark.parametrize(
    "argument",
    [
        "+hydra.callbacks.x._target_=os.system",
        "+hydra.callbacks.x={_target_:os.system}",
        "hydra.callbacks.sweep._target_=os.system",
        "hydra.launcher._target_=os.system",
        "hydra.sweeper={_target_:os.system}",
        "+hydra.job_logging.handlers.x.class=os.system",
        "+hydra.hydra_logging.handlers.x={'()':os.system}",
    ],
)
def test_what_hydra_builds_is_refused_on_the_command_line(argument: str) -> None:
    with pytest.raises(ConfigError, match="what Hydra itself builds"):
        refuse_targets_for_hydra(["data=digits", argument])


def test_other_settings_of_hydra_are_the_users() -> None:
    refuse_targets_for_hydra(
        ["hydra.run.dir=x", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.verbose=true", "-m"]
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["hydra.job.name=../../escaped"], "hydra.job.name=../../escaped"),
        (["-m", "seed=0", "hydra.sweep.subdir=../../escaped"], "hydra.sweep.subdir=../../escaped"),
        (["-m", "seed=0", "hydra.sweep.subdir=/tmp/escaped"], "hydra.sweep.subdir=/tmp/escaped"),
        (["logger.project=${oc.env:WANDB_API_KEY}"], "${oc.env:WANDB_API_KEY}"),
    ],
)
def test_names_that_leave_their_folder_are_refused(
    arguments: list[str], named: str, command: Command, tmp_path: Path
) -> None:
    done = command("train", *arguments, *QUICK, WANDB_API_KEY="k" * 40, WANDB_MODE="offline")
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {named}")
    assert list(tmp_path.iterdir()) == []


def test_no_secret_and_no_home_folder_in_any_record(tmp_path: Path) -> None:
    """The run lies inside the home folder and is named by absolute paths; half of it fails, which leaves a traceback."""
    home = tmp_path / "home" / "somebody"
    work = home / "work"
    work.mkdir(parents=True)
    secrets = {"WANDB_API_KEY": "canary0" * 6, "AWS_SECRET_ACCESS_KEY": "canary1" * 6, "HF_TOKEN": "canary2" * 6}
    environment = (
        os.environ
        | secrets
        | {"HOME": str(home), "WANDB_DATA_DIR": str(home / "data"), "WANDB_CACHE_DIR": str(home / "cache")}
    )
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-m", "cifar.train", "-m", *QUICK, "logger.mode=offline", "data.batch_size=64,5000",
         f"hydra.sweep.dir={work}/sweep"],
        cwd=work, env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    files = [path for path in (work / "sweep").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert any(path.name == "result.json" for path in files)
    for path in files:
        content = path.read_bytes()
        for name, secret in secrets.items():
            assert secret.encode() not in content, f"{name} is in {path}"
        assert str(home).encode() not in content, f"the home folder is in {path}"
